"""What a container has only while it runs: volumes, root filesystem, bundle, interfaces, ports, its process.

All of it is had, or none.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path

import msgspec

from netstore.errors import NetstoreError, Unavailable
from netstore.kernel.paths import closing
from netstore.launcher import rows, terminals
from netstore.launcher.bundle import Bundle, root_propagation, specification
from netstore.launcher.creation import divided, wanted_ports
from netstore.launcher.etc import Etc, read_etc, write
from netstore.launcher.filesystem import Directories, make_directory
from netstore.launcher.fitting import check_mounts, check_working_dir
from netstore.launcher.links import environment
from netstore.launcher.mounting import Mounting
from netstore.launcher.runtime import Process, Runtime
from netstore.launcher.terminals import Attaching
from netstore.launcher.users import resolve
from netstore.model import Container, Image, Mount, Sandbox
from netstore.networks.manager import NetworkManager
from netstore.store import Store
from netstore.volumes.manager import VolumeManager

__all__ = ["Running"]


class Running:
    """Starts containers, and gives back what they had. Callers hold the container's lock."""

    def __init__(
        self, store: Store, networks: NetworkManager, volumes: VolumeManager, mounting: Mounting,
        directories: Directories, attaching: Attaching,
    ) -> None:  # fmt: skip
        self._store = store
        self._networks = networks
        self._volumes = volumes
        self._mounting = mounting
        self._directories = directories
        self._attaching = attaching
        self._runtime: Runtime | None = None

    async def detect(self, run_dir: Path) -> None:
        """Look for an OCI runtime."""
        self._runtime = await Runtime.detect(run_dir)

    @property
    def version(self) -> str:
        """The OCI runtime and its version, "" when there is none."""
        return self._runtime.version if self._runtime else ""

    @property
    def runtime(self) -> Runtime:
        """The OCI runtime.

        Raises:
            Unavailable: there is none.
        """
        if self._runtime is None:
            raise Unavailable(
                "no OCI runtime on this node", hint="install conmon and crun (or runc), restart netstored"
            )
        return self._runtime

    def exit_code(self, container_id: str) -> int | None:
        """Return how a container ended, None when its supervisor left no word of it."""
        return self._runtime.exit_code(container_id) if self._runtime else None

    async def start(self, joined: rows.Joined) -> Process:
        """Give a container what it needs, and start it.

        Raises:
            FailedPrecondition: the command cannot be run; metadata exit_code is 126 or 127.
            AddressTaken: a host port has a holder.
            Unavailable: no OCI runtime.
        """
        container, image, sandbox, _ = joined
        runtime, directory = self.runtime, self._directories.path(container.id)
        try:
            await self._volumes.hold((mount.volume_id for mount in container.mounts), container.id)
            staged = await self._mounting.stage(container)
            etc = await self._store.read(lambda tx: read_etc(tx, sandbox))
            await asyncio.to_thread(self._write_bundle, container, image, sandbox, etc, staged)
            if sandbox.container_id == container.id:
                await self._connect(joined)
            started = await runtime.create(
                container.id, directory, self._directories.log(container.id),
                streams=terminals.conmon_arguments(container.spec), propagates=bool(root_propagation(container.mounts)),
            )  # fmt: skip
            await asyncio.to_thread(self._directories.unstage, container.id)
            await self._attaching.connect(container.id, directory)
            await runtime.start(container.id)
        except BaseException as error:
            self._attaching.refuse(container.id, f"container {container.name} could not be started")
            await self.clear(container)
            if isinstance(error, NetstoreError):
                await self._store.write(partial(rows.record_failure, container_id=container.id, error=error))
            raise
        return started

    async def _connect(self, joined: rows.Joined) -> None:
        container, image, sandbox, endpoints = joined
        if not any(network.interface for _, network, _ in endpoints):
            await self._networks.sandboxes.raise_loopback(sandbox)
        ports = divided(wanted_ports(container.spec, image), [(each, network) for each, network, _ in endpoints])
        await self._networks.endpoints.activate(sandbox, ports)

    def _write_bundle(
        self, container: Container, image: Image, sandbox: Sandbox, etc: Etc, staged: list[tuple[Mount, Path | None]]
    ) -> None:
        """Mount the root filesystem and write the bundle. Blocking."""
        spec, config = container.spec, image.config
        rootfs = self._directories.mount(container.id, image.layers)
        with closing(os.open(rootfs, os.O_RDONLY | os.O_DIRECTORY)) as root:
            identity = resolve(root, spec.user or config.user)
            working_dir = spec.working_dir or config.working_dir or "/"
            for target in ("/dev", "/proc", "/sys", "/etc"):  # where the runtime mounts, whatever the image has
                make_directory(root, target, 0, 0)
            check_mounts(root, spec, staged)
            check_working_dir(root, working_dir, staged)
            make_directory(root, working_dir, identity.uid, identity.gid)
        files = self._directories.path(sandbox.container_id)
        if sandbox.container_id == container.id or not (files / "hosts").exists():
            write(files, etc)
        document = specification(
            Bundle(
                container_id=container.id,
                rootfs=rootfs,
                directory=self._directories.path(container.id),
                args=container.args,
                files=files,
                env=(*environment(container.name, etc.links), *config.env, *spec.env),
                working_dir=working_dir,
                identity=identity,
                hostname=etc.hostname,
                domainname=spec.domainname,
                namespace=sandbox.path,
                mounts=staged,
                read_only=spec.read_only,
                terminal=spec.tty,
            )
        )
        (self._directories.path(container.id) / "config.json").write_bytes(msgspec.json.encode(document))

    async def clear(self, container: Container) -> None:
        """Give back what only a running container holds: runtime state, root filesystem, interfaces, ports."""
        if self._runtime:
            await self._runtime.delete(container.id)
        await asyncio.to_thread(self._directories.unmount, container.id)
        await self._volumes.staging.release_all(container.id)
        sandbox, others = await self._store.read(lambda tx: rows.sharing(tx, container))
        if not others:
            await self._networks.endpoints.deactivate(sandbox)
