"""Hands the resolver's sockets of each sandbox to netstore-resolver, and keeps duplicates.

One SOCK_SEQPACKET connection to RUN_DIR/resolver.sock; a message is JSON, with descriptors beside it (SCM_RIGHTS):

    resolver -> netstored   {"held": "<sandbox id>"} + UDP, TCP     for each one that it serves, when we connect
                            {"held": ""}                            the end of them
    netstored -> resolver   {"add": "<sandbox id>"} + UDP, TCP
                            {"remove": "<sandbox id>"}

The relay's one listening socket goes the same way, under the name `RELAY` in place of a sandbox's id.

So whichever of the two is restarted gets the sockets back from the other, and a query that waits in one is not lost.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import socket
from pathlib import Path

import structlog

__all__ = ["RELAY", "ResolverLink", "receive", "send"]

log = structlog.get_logger(__name__)

_RETRY_SECONDS = 0.2
_ADOPT_SECONDS = 0.5
RELAY = "::1"
Sockets = tuple[socket.socket, ...]


def send(connection: socket.socket, message: dict[str, str], sockets: Sockets = ()) -> None:
    """Send one message and, with it, duplicates of sockets."""
    rights = array.array("i", [each.fileno() for each in sockets])
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if sockets else []
    connection.sendmsg([json.dumps(message).encode()], ancillary)


def receive(connection: socket.socket) -> tuple[dict[str, str], Sockets]:
    """Return one message and the sockets that came with it; an empty one at the end of the connection."""
    data, rights, _, _ = socket.recv_fds(connection, 4096, 2)
    return (json.loads(data) if data else {}), tuple(socket.socket(fileno=each) for each in rights)


class ResolverLink:
    """Our end. What is added while the resolver is away is sent when it is back; nothing here waits for it."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "resolver.sock"
        self._sockets: dict[str, Sockets] = {}
        self._connection: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether the resolver is there."""
        return self._connection is not None

    def held(self) -> set[str]:
        """Return the ids of sandboxes whose sockets there are."""
        return set(self._sockets) - {RELAY}

    def relay_port(self) -> int:
        """Return the port on which the relay listens, 0 when it has no socket."""
        return next((int(each.getsockname()[1]) for each in self._sockets.get(RELAY, ())), 0)

    def holds(self, sandbox_id: str) -> bool:
        """Say whether there are sockets of that sandbox; any thread may ask."""
        return sandbox_id in self._sockets

    async def start(self) -> None:
        """Connect, waiting a moment for a resolver that runs already: it may hold sockets that we need."""
        first = asyncio.Event()
        self._task = asyncio.create_task(self._stay_connected(first), name="resolver link")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ADOPT_SECONDS):
                await first.wait()

    async def close(self) -> None:
        """Disconnect; the resolver goes on with the sockets that it has."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for sockets in self._sockets.values():
            _close(sockets)
        self._sockets.clear()

    async def add(self, sandbox_id: str, *sockets: socket.socket) -> None:
        """Take the sockets of a sandbox, or of the relay, over and hand duplicates to the resolver."""
        await self.remove(sandbox_id)
        self._sockets[sandbox_id] = sockets
        self._send({"add": sandbox_id}, sockets)

    async def remove(self, sandbox_id: str) -> None:
        """Close a sandbox's sockets, here and there; one that has none is a success."""
        sockets = self._sockets.pop(sandbox_id, None)
        if sockets:
            _close(sockets)
            self._send({"remove": sandbox_id})

    def _send(self, message: dict[str, str], sockets: Sockets = ()) -> None:
        if self._connection:
            try:
                send(self._connection, message, sockets)
            except OSError as error:
                log.warning("the resolver does not take messages", reason=str(error))

    async def _stay_connected(self, first: asyncio.Event) -> None:
        while True:
            with contextlib.suppress(OSError):
                await self._session(first)
            first.set()
            self._connection = None
            await asyncio.sleep(_RETRY_SECONDS)

    async def _session(self, first: asyncio.Event) -> None:
        """Take back what the resolver holds, give it what it lacks, and wait for the connection's end."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as connection:
            connection.setblocking(False)
            connection.connect(str(self._path))
            held: set[str] = set()
            while True:
                await _readable(connection)
                message, sockets = receive(connection)
                if not message.get("held"):
                    break
                if message["held"] in self._sockets:  # ours go to it below: they may be newer
                    _close(sockets)
                elif sockets:
                    held.add(message["held"])
                    self._sockets[message["held"]] = sockets
            self._connection = connection
            first.set()
            for sandbox_id in self._sockets.keys() - held:
                send(connection, {"add": sandbox_id}, self._sockets[sandbox_id])
            log.info("the resolver is connected", adopted=len(held))
            await _readable(connection)
            connection.recv(1)
            log.warning("the resolver went away; names wait until it is back")
            self._connection = None


async def _readable(connection: socket.socket) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)


def _close(sockets: Sockets) -> None:
    for each in sockets:
        each.close()
