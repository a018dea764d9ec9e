"""Sandboxes: the namespaces that endpoints go into, the launcher's own and those that engines name."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import structlog

from netstore.errors import InvalidArgument, KernelError, NetstoreError
from netstore.kernel import namespaces
from netstore.kernel.sandboxes import close_resolver, open_resolver, raise_loopback
from netstore.model import Sandbox, SandboxRef, new_id
from netstore.networks.context import Context
from netstore.store import Transaction

__all__ = ["OpenSandbox", "Sandboxes", "container_sandbox", "known_sandbox"]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OpenSandbox:
    """A sandbox while it is worked on, and its namespace's descriptor: None for the host's own.

    A sandbox that a caller named by path or pid has a new id until `known_sandbox` finds the row of its inode. One that
    an engine moves interfaces into has no descriptor either.
    """

    sandbox: Sandbox
    namespace: int | None


class Sandboxes:
    """The sandboxes of a node."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._store = context.store

    async def create(self, container_id: str, *, dns_servers: tuple[str, ...] = ()) -> Sandbox:
        """Make and pin a namespace for a container; the caller's transaction adds the row.

        Raises:
            KernelError: it cannot be made; nothing is left.
        """
        sandbox_id = new_id()
        path = self._context.netns_dir / sandbox_id[:32]
        inode = await self._context.apply(namespaces.create, path)
        return Sandbox(id=sandbox_id, path=str(path), inode=inode, container_id=container_id, dns_servers=dns_servers)

    async def discard(self, sandbox: Sandbox) -> None:
        """Unpin a container's namespace and forget its resolver's sockets; its row is gone already."""
        await self._context.resolver.remove(sandbox.id)
        if sandbox.path and sandbox.container_id:
            await self._context.remove(namespaces.remove, self._context.netns_dir / sandbox.id[:32])

    async def restore(self, sandbox: Sandbox) -> Sandbox:
        """Make a container's namespace anew, after a reboot took it away; what was inside is applied by the caller."""
        path = self._context.netns_dir / sandbox.id[:32]
        await self._context.remove(namespaces.remove, path)
        inode = await self._context.apply(namespaces.create, path)
        restored = replace(sandbox, path=str(path), inode=inode)
        await self._store.write(lambda tx: tx.sandboxes.update(restored))
        await self._context.resolver.remove(sandbox.id)
        return restored

    @asynccontextmanager
    async def open(self, ref: SandboxRef) -> AsyncIterator[OpenSandbox]:
        """Open the sandbox that a caller names, and close its descriptor in the end.

        Raises:
            InvalidArgument: the path or pid is no network namespace, or is the host's.
            NotFound: no such container.
        """
        if ref.container:
            sandbox = await self._store.read(lambda tx: container_sandbox(tx, ref.container))
            async with self.reopen(sandbox) as opened:
                yield opened
            return
        if ref.moved_id:
            yield OpenSandbox(Sandbox(id=ref.moved_id, path="", resolver=False), None)
            return
        path, field = (ref.netns_path, "netns_path") if ref.netns_path else (f"/proc/{ref.pid}/ns/net", "pid")
        if not ref.netns_path and ref.pid < 1:
            raise InvalidArgument("sandbox", "", "a netns_path, a pid or a container")
        namespace = namespaces.open_namespace_at_once(path, field=field)
        if namespace is None:
            namespace = await self._context.apply(namespaces.open_namespace, path, field=field)
        try:
            sandbox = Sandbox(id=new_id(), path=path, inode=os.fstat(namespace).st_ino)
            yield OpenSandbox(sandbox, namespace)
        finally:
            os.close(namespace)

    @asynccontextmanager
    async def reopen(self, sandbox: Sandbox) -> AsyncIterator[OpenSandbox]:
        """Open a sandbox that the store knows.

        Raises:
            KernelError: its namespace is gone.
        """
        if not sandbox.path:
            yield OpenSandbox(sandbox, None)
            return
        namespace = await self._context.apply(namespaces.open_pinned, sandbox.path, sandbox.inode)
        if namespace is None:
            raise KernelError(
                errno.ENOENT,
                "opening the sandbox",
                sandbox.path,
                hint="`netstore system check --repair` restores what it can",
            )
        try:
            yield OpenSandbox(sandbox, namespace)
        finally:
            os.close(namespace)

    async def serve_names(self, opened: OpenSandbox) -> None:
        """Give a sandbox its resolver, where it has none yet.

        Raises:
            KernelError: the sockets or the redirect cannot be made.
        """
        if self.wants_names(opened):
            assert opened.namespace is not None
            await self._context.apply(raise_loopback, opened.namespace)
            await self.add_resolver(opened, await self._context.apply(open_resolver, opened.namespace))

    def wants_names(self, opened: OpenSandbox) -> bool:
        """Say whether a sandbox can have a resolver and has none yet."""
        sandbox = opened.sandbox
        return opened.namespace is not None and sandbox.resolver and not self._context.resolver.holds(sandbox.id)

    async def add_resolver(self, opened: OpenSandbox, sockets: tuple[socket.socket, socket.socket]) -> None:
        """Hand a sandbox's sockets, open already, to netstore-resolver."""
        await self._context.resolver.add(opened.sandbox.id, *sockets)

    @staticmethod
    def discard_resolver(opened: OpenSandbox, sockets: tuple[socket.socket, socket.socket]) -> None:
        """Close sockets that were not handed over, and take their redirect away. Blocking."""
        for each in sockets:
            each.close()
        if opened.namespace is not None:
            with contextlib.suppress(NetstoreError):  # what failed before is what the caller is told
                close_resolver(opened.namespace)

    async def stop_names(self, opened: OpenSandbox) -> None:
        """Take its resolver from a sandbox that lives on without us."""
        if not self._context.resolver.holds(opened.sandbox.id):
            return
        await self._context.resolver.remove(opened.sandbox.id)
        if opened.namespace is not None:
            try:
                await self._context.apply(close_resolver, opened.namespace)
            except NetstoreError as error:
                log.warning("redirect of names left behind", sandbox=opened.sandbox.path, error=str(error))

    async def raise_loopback(self, sandbox: Sandbox) -> None:
        """Set `lo` up in a sandbox that gets no interface (network none)."""
        async with self.reopen(sandbox) as opened:
            if opened.namespace is not None:
                await self._context.apply(raise_loopback, opened.namespace)


def known_sandbox(tx: Transaction, sandbox: Sandbox) -> Sandbox | None:
    """Return the row of a sandbox, or of the one whose namespace it is by another path or pid."""
    if sandbox.container_id or not sandbox.inode:
        return tx.sandboxes.get(sandbox.id)
    return next(iter(tx.sandboxes.all("inode = ?", sandbox.inode)), None)


def container_sandbox(tx: Transaction, reference: str) -> Sandbox:
    """Return the sandbox of a container by name, id or id prefix.

    Raises:
        NotFound: no such container.
    """
    return tx.sandboxes.require(tx.containers.find(reference).sandbox_id)
