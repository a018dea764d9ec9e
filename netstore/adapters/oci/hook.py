"""Hooks: a container's state in, calls of the managers, nothing out; what fails keeps the container from starting."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial

from netstore.adapters.oci.messages import LABEL, Bundle, State, decode
from netstore.adapters.programs import Refusal
from netstore.api.v1 import endpoint_pb2
from netstore.errors import AddressTaken, FailedPrecondition, KernelError, NetstoreError, NotFound
from netstore.kernel.paths import closing, open_in_root
from netstore.launcher.places import Places
from netstore.model import Endpoint, MountRef, MountSpec, Network, Sandbox
from netstore.networks.context import KeyedLocks
from netstore.networks.manager import NetworkManager
from netstore.networks.planning import AttachRequest
from netstore.rpc.endpoints import to_attach

__all__ = ["Hook"]

# Written so that the index of the schema serves it.
_OF_CONTAINER = f"""json_extract(body, '$.labels."{LABEL}"') = ?"""
_MOST = 4 << 20
Joined = tuple[Endpoint, Network, Sandbox]


class Hook:
    """Carries out calls. Those about one container come one after the other."""

    def __init__(self, networks: NetworkManager, places: Places) -> None:
        self._networks = networks
        self._endpoints = networks.endpoints
        self._places = places
        self._locks = KeyedLocks()

    async def answer(self, variables: Mapping[str, str], body: bytes) -> bytes:
        """Carry out a call; nothing is printed.

        Raises:
            Refusal: it failed.
        """
        stage, state = variables.get("HOOK_COMMAND", ""), decode(body)
        try:
            async with self._locks.hold(state.owner):
                match stage:
                    case "createRuntime" | "prestart":  # the same moment, by the name that it had before
                        await self._attach(state)
                    case "poststop":
                        await self._detach(state)
                    case _:
                        raise Refusal(f"{stage[:200]!r} is no stage of ours", "createRuntime, prestart or poststop")
        except NetstoreError as error:
            raise Refusal(error.what, error.hint) from error
        return b""

    def describe(self, refusal: Refusal, body: bytes) -> bytes:
        """Return what is printed of a failure."""
        return (f"{refusal.msg} ({refusal.details})" if refusal.details else refusal.msg).encode()

    async def _attach(self, state: State) -> None:
        wanted = state.wanted()
        if not state.pid:
            raise Refusal("the container's state has no pid", "use the stage createRuntime")
        if not (wanted.networks or wanted.volumes):
            return
        bundle = state.read(await asyncio.to_thread(_config, state))
        async with AsyncExitStack() as undo:
            if wanted.networks:
                await self._join(state, bundle, wanted.networks, undo)
            await self._mount(state, bundle, wanted.volumes, undo)
            undo.pop_all()

    async def _join(
        self, state: State, bundle: Bundle, specs: Sequence[endpoint_pb2.EndpointSpec], undo: AsyncExitStack
    ) -> None:
        """Attach to networks, once what an earlier run of the container left, which never saw poststop, is gone."""
        path, inode = await asyncio.to_thread(_namespace, state.pid, bundle.netns)
        present = set()
        for endpoint, _, sandbox in await self._of(state):
            if sandbox.inode == inode:
                present.add(endpoint.id)
            else:
                await self._endpoints.detach(endpoint.id)
        requests = []
        for spec in specs:
            spec.sandbox.netns_path = path
            requests.append(to_attach(endpoint_pb2.Endpoint(spec=spec, labels=state.labels())))
        for endpoint, network, _ in await self._attach_all(requests):
            if not state.has(endpoint):
                raise FailedPrecondition(
                    f"{path} is attached to network {network.name} already, by somebody else",
                    hint=f"leave {network.name} out of the annotation",
                )
            if endpoint.id not in present:
                undo.push_async_callback(self._endpoints.detach, endpoint.id)

    async def _attach_all(self, requests: Sequence[AttachRequest]) -> list[Joined]:
        """Attach; what one holds that ended, and never saw poststop, is taken."""
        try:
            return await self._endpoints.attach(requests)
        except AddressTaken:
            if not await self._networks.stale():
                raise
            await self._networks.check(repair=True)
            return await self._endpoints.attach(requests)

    async def _mount(self, state: State, bundle: Bundle, specs: Sequence[MountSpec], undo: AsyncExitStack) -> None:
        """Mount volumes beneath the root that the container is about to get."""
        ref, root = MountRef(pid=state.pid), bundle.root.path
        for spec in specs:
            await self._places.mount(ref, spec, exchange=False, root=root)
            undo.push_async_callback(partial(self._places.unmount, ref, spec.target, force=True, root=root))

    async def _detach(self, state: State) -> None:
        """Undo what was attached, as far as it goes; then tell what failed. Mounts went with the first process."""
        leaving = [] if state.in_pod else [endpoint.id for endpoint, _, _ in await self._of(state)]
        done = await asyncio.gather(*map(self._endpoints.detach, leaving), return_exceptions=True)
        await self._places.expire()
        for failed in done:
            if isinstance(failed, BaseException):
                raise failed

    async def _of(self, state: State) -> list[Joined]:
        found = await self._endpoints.all(_OF_CONTAINER, state.owner)
        return [joined for joined in found if state.has(joined[0])]


def _namespace(pid: int, joined: str) -> tuple[str, int]:
    """Return the path and the inode of a process's network namespace; one that it joined ends with its owner's path."""
    path = f"/proc/{pid}/ns/net"
    try:
        inode = os.stat(path).st_ino
    except OSError as error:
        raise _ended(pid) from error
    try:
        same = bool(joined) and os.stat(joined).st_ino == inode
    except (OSError, ValueError):
        same = False
    return (joined if same else path), inode


def _config(state: State) -> bytes:
    """Read a bundle's config.json, as the container's first process sees it: by the runtime's own paths."""
    try:
        root = os.open(f"/proc/{state.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _ended(state.pid) from error
    try:
        with closing(root):
            opened = open_in_root(root, f"{state.bundle}/config.json", os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(opened, "rb") as file:
            return file.read(_MOST)
    except (OSError, KernelError) as error:
        raise Refusal(f"{state.bundle}/config.json cannot be read: {error}") from error


def _ended(pid: int) -> NotFound:
    return NotFound("process", str(pid), hint="it has ended")
