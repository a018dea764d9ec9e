"""Containers: create, start, stop, remove; and the tasks that watch over those that run.

A container outlives the daemon: conmon holds its log and exit status, its sandbox is pinned, its root filesystem stays
mounted. After a restart the daemon takes up its supervisors again by pidfd.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import structlog

from netstore import systemd
from netstore.errors import FailedPrecondition, InUse, NetstoreError, NotFound
from netstore.kernel.paths import closing
from netstore.launcher import rows, terminals
from netstore.launcher.bundle import process
from netstore.launcher.creation import Draft, Reserved, draft, reserve_container
from netstore.launcher.etc import Etc, host_changes, read_etc, refresh
from netstore.launcher.execution import Execution
from netstore.launcher.filesystem import Directories
from netstore.launcher.images.catalogue import Images
from netstore.launcher.links import environment
from netstore.launcher.logs import Line, follow
from netstore.launcher.mounting import Mounting
from netstore.launcher.places import Places
from netstore.launcher.restarts import Restarts
from netstore.launcher.running import Running
from netstore.launcher.runtime import is_alive, wait_for_exit
from netstore.launcher.signals import parse_signal
from netstore.launcher.terminals import Attached, Attaching, Size
from netstore.launcher.usage import Use, usage
from netstore.launcher.users import Identity, resolve
from netstore.model import (
    Container,
    ContainerSpec,
    ContainerState,
    Finding,
    Image,
    Kind,
    Restart,
    Sandbox,
)
from netstore.networks.context import KeyedLocks
from netstore.networks.manager import NetworkManager
from netstore.store import Store, Transaction
from netstore.volumes.manager import VolumeManager

__all__ = ["ContainerManager", "Joined"]

log = structlog.get_logger(__name__)

_LOST = 255
"""Exit code of a container whose supervisor did not write one, such as after a power cut."""

_READABLE_SECONDS = 2.0
"""So long after its start a container with auto_remove is there, ended or not: who started it reads how it went."""

_ENDING_SECONDS = 60.0
"""So long containers may take to be cleared away when the machine goes down."""

Joined = rows.Joined


class ContainerManager:
    """The containers of a node. Asks networks and volumes as any engine would."""

    def __init__(
        self, store: Store, networks: NetworkManager, volumes: VolumeManager, state_dir: Path, run_dir: Path
    ) -> None:
        self._store = store
        self._networks = networks
        self._volumes = volumes
        self._run_dir = run_dir
        self.images = Images(store, state_dir / "images")
        self._directories = Directories(state_dir / "containers", self.images.layers)
        self._mounting = Mounting(store, volumes, self.images, self._directories)
        self._locks = KeyedLocks()
        self.places = Places(store, volumes, self._mounting, self._locks)
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._follower: asyncio.Task[None] | None = None
        self._restarts = Restarts(self._start_again)
        self._attaching = Attaching()
        self._running = Running(store, networks, volumes, self._mounting, self._directories, self._attaching)
        networks.endpoints.changed = self._refresh

    @property
    def runtime_version(self) -> str:
        """The OCI runtime and its version, "" when there is none."""
        return self._running.version

    async def start_up(self) -> None:
        """Take up what runs, finish what ended while nobody looked, remove what a crash left."""
        await self._running.detect(self._run_dir)
        await self.images.start()
        containers = await self._store.read(lambda tx: tx.containers.all())
        await asyncio.to_thread(self._directories.clean, [container.id for container in containers])
        for container in containers:
            await asyncio.to_thread(self._directories.unstage, container.id)
            if container.state is ContainerState.EXITED and container.spec.auto_remove:
                await self._remove_ended(container.id)
            elif container.state is not ContainerState.RUNNING:
                await self._running.clear(container)
            elif is_alive(container.supervisor_pid, container.supervisor_start):
                await self._take_up_volumes(container)
                await self.places.take_up(container, repair=True)
                self._watch(container)
            else:
                await self._ended(container.id)
        await self.places.start_up()
        self._follower = asyncio.create_task(self._follow_host(), name="host's resolv.conf")

    async def start_again(self) -> None:
        """Start, in the background, what is to run whenever the node does. Called once, when all else is ready."""
        for container in await self._store.read(lambda tx: tx.containers.all()):
            self._restarts.consider(container, booted=True)

    async def _take_up_volumes(self, container: Container) -> None:
        try:
            await self._volumes.hold((mount.volume_id for mount in container.mounts), container.id, again=True)
        except NetstoreError as error:
            log.error("a volume of a running container cannot be staged", container=container.name, error=str(error))

    async def close(self) -> None:
        """Stop watching; containers go on."""
        tasks = [*self._watchers.values(), *([self._follower] if self._follower else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, self._restarts.close(), return_exceptions=True)

    async def check(self, *, repair: bool) -> list[Finding]:
        """Find containers that are said to run and do not, and mounts that are said to be there and are not."""
        findings = []
        for container in await self._store.read(lambda tx: tx.containers.all()):
            alive = is_alive(container.supervisor_pid, container.supervisor_start)
            if container.state is ContainerState.RUNNING and not alive and container.id not in self._watchers:
                if repair:
                    await self._ended(container.id)
                findings.append(
                    Finding(kind=Kind.CONTAINER, resource_id=container.id, name=container.name, repaired=repair,
                            detail="its process is gone")
                )  # fmt: skip
            elif alive:
                findings += await self.places.take_up(container, repair=repair)
        return findings + await self.places.check(repair=repair)

    async def create(
        self, name: str, spec: ContainerSpec, *, labels: Mapping[str, str], request_id: str = ""
    ) -> tuple[Joined, list[str]]:
        """Make a container, its volumes, sandbox and reservations; with warnings.

        Raises:
            NotFound, AlreadyExists, AddressTaken, InvalidArgument, FailedPrecondition: see the contract.
        """
        plan = await self._store.read(lambda tx: draft(tx, name, spec, labels))
        sandbox = plan.joined or (
            Sandbox(id=plan.container.id, path="", container_id=plan.container.id, resolver=False)
            if plan.on_host
            else await self._networks.sandboxes.create(plan.container.id, dns_servers=spec.dns_servers)
        )
        async with self._networks.endpoints.alone(sandbox), contextlib.AsyncExitStack() as undo:
            if plan.joined is None:
                undo.push_async_callback(self._networks.sandboxes.discard, sandbox)
            undo.push_async_callback(asyncio.to_thread, self._directories.remove, plan.container.id)
            await asyncio.to_thread(self._make_directory, plan)
            reserved = await self._store.write(
                lambda tx: reserve_container(tx, plan, sandbox, self._volumes, request_id)
            )
            if reserved.fresh:
                undo.push_async_callback(self._undo, reserved)
                await self._networks.endpoints.claim(reserved.sandbox, [network for network, _ in plan.networks])
                await self._volumes.apply(list(reserved.made))
                await self._mounting.fill(reserved.container, reserved.image, reserved.container.mounts)
                undo.pop_all()
        return await self.get(reserved.container.id), list(plan.warnings)

    async def _undo(self, reserved: Reserved) -> None:
        await self._store.write(lambda tx: rows.forget(tx, reserved.container))
        await self._volumes.discard(list(reserved.made))

    def _make_directory(self, plan: Draft) -> None:
        """Make the container's directory and check its user. Blocking."""
        self._directories.make(plan.container.id)
        with closing(self._directories.overlay(plan.container.id, plan.image.layers)) as rootfs:
            resolve(rootfs, plan.container.spec.user or plan.image.config.user)

    async def get(self, reference: str) -> Joined:
        """Return a container by name, id or id prefix, with its image, sandbox and endpoints."""
        return await self._store.read(lambda tx: rows.joined(tx, tx.containers.find(reference)))

    async def all(self, where: str = "1", *values: object) -> list[Joined]:
        """Return the containers that an SQL condition of the table selects, oldest first."""
        return await self._store.read(lambda tx: rows.all_joined(tx, where, *values))

    async def start(self, reference: str) -> Joined:
        """Start a container; one that runs is left as it is.

        Raises:
            FailedPrecondition: the command cannot be run; metadata exit_code is 126 or 127.
            AddressTaken: a host port has a holder.
        """
        found = (await self.get(reference))[0]
        self._restarts.forget(found.id)
        await self._start(found.id, restart_count=0)
        return await self.get(found.id)

    async def _start_again(self, container_id: str) -> None:
        container = await self._store.read(lambda tx: tx.containers.require(container_id))
        await self._start(container_id, restart_count=container.restart_count + 1)

    async def _start(self, container_id: str, *, restart_count: int) -> None:
        async with self._locks.hold(container_id):
            joined = await self.get(container_id)
            if joined[0].state is ContainerState.RUNNING:
                return
            started = await self._running.start(joined)

            def record(tx: Transaction) -> Container:
                present = tx.containers.require(container_id)
                revision = tx.event(Kind.CONTAINER, "start", container_id, present.name)
                running = replace(
                    present, state=ContainerState.RUNNING, pid=started.pid, supervisor_pid=started.supervisor_pid,
                    supervisor_start=started.supervisor_start, exit_code=0, message="", start_time=time.time(),
                    revision=revision, stopped=False, restart_count=restart_count,
                )  # fmt: skip
                tx.containers.update(running)
                return running

            self._watch(await self._store.write(record))

    async def _refresh(self, sandbox: Sandbox) -> None:
        """Make /etc of the containers that run in a sandbox follow its endpoints and the host's resolv.conf."""

        def running(tx: Transaction) -> Etc | None:
            found = tx.containers.all("sandbox_id = ?", sandbox.id)
            return read_etc(tx, sandbox) if any(each.state is ContainerState.RUNNING for each in found) else None

        if etc := await self._store.read(running):
            await asyncio.to_thread(refresh, self._directories.path(sandbox.container_id), etc)

    async def _follow_host(self) -> None:
        """Pass on what changes in the host's resolv.conf; those who ask netstore-resolver have no copy of it."""
        async for _ in host_changes():
            for sandbox in await self._store.read(lambda tx: tx.sandboxes.all("container_id != ''")):
                await self._refresh(sandbox)

    def _watch(self, container: Container) -> None:
        async def watch() -> None:
            await wait_for_exit(container.supervisor_pid, container.supervisor_start)
            try:
                await self._ended(container.id, readable_seconds=_READABLE_SECONDS)
            except NetstoreError as error:
                log.error("cleaning up after a container failed", container=container.name, error=str(error))

        task = asyncio.create_task(watch(), name=f"container {container.name}")
        self._watchers[container.id] = task
        task.add_done_callback(lambda _: self._watchers.pop(container.id, None))

    async def _ended(self, container_id: str, *, readable_seconds: float = 0.0) -> None:
        """Record how a container ended, after what it held was given back; remove it where that was asked for."""
        async with self._locks.hold(container_id):
            container = await self._store.read(lambda tx: tx.containers.get(container_id))
            if container is None or container.state is not ContainerState.RUNNING:
                return
            code = self._running.exit_code(container_id)
            await self._running.clear(container)

            def record(tx: Transaction) -> Container:
                present = tx.containers.require(container_id)
                status = _LOST if code is None else code
                revision = tx.event(Kind.CONTAINER, "die", container_id, present.name, exit_code=status)
                message = "its supervisor ended without an exit status" if code is None else ""
                ended = replace(
                    present, state=ContainerState.EXITED, pid=0, exit_code=status, message=message,
                    finish_time=time.time(), revision=revision,
                )  # fmt: skip
                tx.containers.update(ended)
                return ended

            self._restarts.consider(await self._store.write(record))
        if container.spec.auto_remove:
            left = container.start_time + readable_seconds - time.time()
            await asyncio.sleep(max(0.0, min(left, readable_seconds)))
            await self._remove_ended(container_id)

    async def _remove_ended(self, container_id: str) -> None:
        """Remove a container with auto_remove, unless who started it did."""
        with contextlib.suppress(NotFound):
            await self.delete(container_id, force=False, volumes=True)

    async def stop(self, reference: str, *, timeout: float | None, signal_: signal.Signals | None) -> Joined:
        """Ask a container to stop, and kill it when it does not in `timeout` seconds. One that does not run is left."""
        container, image, _, _ = await self.get(reference)
        await self._let_be(container)
        patience = container.spec.stop_timeout if timeout is None else timeout
        await self._end(container, signal_ or _stop_signal(container, image), patience)
        return (
            await self.get(container.id)
            if not container.spec.auto_remove
            else (container, image, Sandbox(id="", path=""), [])
        )

    async def restart(self, reference: str, *, timeout: float | None, signal_: signal.Signals | None) -> Joined:
        """Stop a container, and start it; one that does not run is started.

        Raises:
            FailedPrecondition: it is removed when it ends; else as `start`.
        """
        container = (await self.get(reference))[0]
        if container.spec.auto_remove:
            raise FailedPrecondition(f"container {container.name} is removed when it ends (--rm)", hint="run it anew")
        await self.stop(container.id, timeout=timeout, signal_=signal_)
        return await self.start(container.id)

    async def shut_down(self) -> None:
        """Stop every container in its own time: the machine goes down. Policies start them when it is back."""
        await self._restarts.close()
        running = await self.all("json_extract(body, '$.state') = 'running'")
        patience = max((container.spec.stop_timeout for container, _, _, _ in running), default=0.0)
        systemd.notify(f"EXTEND_TIMEOUT_USEC={int((patience + _ENDING_SECONDS) * 1e6)}")
        ends = [self._end(each, _stop_signal(each, image), each.spec.stop_timeout) for each, image, _, _ in running]
        await asyncio.gather(*ends, return_exceptions=True)

    async def _let_be(self, container: Container) -> None:
        """Have no policy start a container again that somebody stops."""
        self._restarts.forget(container.id)
        if container.spec.restart is not Restart.NO:
            await self._store.write(partial(rows.mark_stopped, container_id=container.id))

    async def _end(self, container: Container, number: signal.Signals, timeout: float) -> None:
        watcher = self._watchers.get(container.id)
        if watcher is None or container.state is not ContainerState.RUNNING:
            return
        for each, patience in ((number, timeout), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(container.pid, each)
            done, _ = await asyncio.wait([watcher], timeout=patience)
            if done:
                return

    async def kill(self, reference: str, number: signal.Signals) -> None:
        """Send a signal to a container's main process.

        Raises:
            FailedPrecondition: it does not run.
        """
        container = (await self.get(reference))[0]
        rows.require_running(container)
        if number is signal.SIGKILL:
            await self._let_be(container)
        with contextlib.suppress(ProcessLookupError):
            os.kill(container.pid, number)

    async def wait(self, reference: str) -> int:
        """Return a container's exit code once it does not run."""
        container = (await self.get(reference))[0]
        async with self._locks.hold(container.id):  # one that is just being started runs first
            pass
        while True:
            changed = self._store.changed()
            found = await self._store.read(lambda tx: tx.containers.get(container.id))
            if found is None:
                return await self._exit_of_removed(container.id)
            if found.state is not ContainerState.RUNNING:
                return found.exit_code
            await asyncio.shield(changed)

    async def _exit_of_removed(self, container_id: str) -> int:
        """Return how a container ended that is gone by now, from the event that told it."""
        query = (
            "SELECT json_extract(attributes, '$.exit_code') FROM events WHERE resource_id = ? AND action = 'die'"
            " ORDER BY revision DESC"
        )
        row = await self._store.read(lambda tx: tx.row(query, container_id))
        return int(row[0]) if row else _LOST

    async def delete(self, reference: str, *, force: bool, volumes: bool) -> None:
        """Remove a container, its sandbox and reservations; its anonymous volumes too when asked for.

        Raises:
            FailedPrecondition: it runs and `force` is not set.
            InUse: other containers have joined its sandbox.
        """
        container, _, sandbox, _ = await self.get(reference)
        if container.state is ContainerState.RUNNING:
            if not force:
                raise FailedPrecondition(
                    f"container {container.name} is running", hint="stop it first, or remove it with --force",
                    reason="CONTAINER_RUNNING",
                )  # fmt: skip
            await self._store.read(lambda tx: rows.refuse_joined(tx, container))
        await self._let_be(container)
        await self._end(container, signal.SIGKILL, 0)
        async with self._locks.hold(container.id):
            if await self._store.read(lambda tx: tx.containers.get(container.id)) is None:
                return  # as it ended: it was to be removed then
            anonymous = await self._store.write(lambda tx: rows.remove(tx, container.id))
            self._attaching.refuse(container.id, f"container {container.name} is removed")
            await asyncio.to_thread(self._directories.remove, container.id)
            if sandbox.container_id == container.id:
                await self._networks.sandboxes.discard(sandbox)
        if volumes:
            for volume_id in anonymous:
                with contextlib.suppress(InUse):
                    await self._volumes.delete(volume_id)

    async def logs(self, reference: str, *, follow_: bool, tail: int | None, since: float) -> AsyncIterator[list[Line]]:
        """Yield what a container printed, then, with `follow_`, what it prints until it ends."""
        container = (await self.get(reference))[0]
        ended = self.wait(container.id) if follow_ else None
        async for lines in follow(self._directories.log(container.id), tail=tail, since=since, ended=ended):
            yield lines

    async def attach(self, reference: str, *, stdin: bool, size: Size | None) -> tuple[Container, Awaitable[Attached]]:
        """Return a container and what will join its streams: at once where it runs, else before it is started.

        Raises:
            FailedPrecondition: input, or a size, for one that takes none. What is returned raises it, too.
        """
        found = (await self.get(reference))[0]
        async with self._locks.hold(found.id):  # it is not just being started
            container = (await self.get(found.id))[0]
            terminals.check(container, stdin=stdin, size=size)
            if container.state is ContainerState.RUNNING:
                return container, Attached.open(self._directories.path(container.id))
            return container, self._attaching.expect(container.id)

    async def exec(
        self, reference: str, command: list[str], *, env: list[str], working_dir: str, user: str, terminal: Size | None
    ) -> Execution:
        """Prepare a further process in a running container, with a terminal of that size unless it is None.

        Raises:
            FailedPrecondition: it does not run.
        """
        container, image, sandbox, _ = await self.get(reference)
        rows.require_running(container)
        etc = await self._store.read(lambda tx: read_etc(tx, sandbox))
        directory = self._directories.path(container.id)

        def identity() -> Identity:
            with closing(os.open(directory / "rootfs", os.O_RDONLY | os.O_DIRECTORY)) as root:
                return resolve(root, user or container.spec.user or image.config.user)

        document = process(
            command, (*environment(container.name, etc.links), *image.config.env, *container.spec.env, *env),
            working_dir or container.spec.working_dir or image.config.working_dir,
            await asyncio.to_thread(identity), hostname=etc.hostname, terminal=terminal is not None,
        )  # fmt: skip
        return Execution(self._running.runtime, container.id, directory, document, terminal)

    async def usage(self) -> list[Use]:
        """Return what images, containers and volumes take of the node. May be slow."""
        joined = await self.all()
        trees = {each.id: self._directories.path(each.id) / "diff" for each, _, _, _ in joined}
        return await usage(joined, trees, await self.images.all(), self._volumes)

    def log_path(self, container: Container) -> str:
        """Return where a container's log is."""
        return str(self._directories.log(container.id))


def _stop_signal(container: Container, image: Image) -> signal.Signals:
    return parse_signal(container.spec.stop_signal or image.config.stop_signal or "SIGTERM")
