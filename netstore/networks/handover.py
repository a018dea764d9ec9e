"""Hands the resolver's sockets of each sandbox to netstore-resolver, and keeps duplicates.

One SOCK_SEQPACKET connection to RUN_DIR/resolver.sock; a message is JSON, with descriptors beside it (SCM_RIGHTS):

    resolver -> netstored   {"held": "<sandbox id>"} + UDP, TCP     for each one that it serves, when we connect
                            {"held": "", "version": "<its>"}        the end of them
    netstored -> resolver   {"add": "<sandbox id>"} + UDP, TCP
                            {"remove": "<sandbox id>"}
                            {"end": ""}                             to one of another version, that a new one takes over

The relay's one listening socket goes the same way, under the name `RELAY` in place of a sandbox's id.

So whichever of the two is restarted gets the sockets back from the other, and a query that waits in one is not lost.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import socket
import struct
import time
from collections import deque
from pathlib import Path
from types import TracebackType

import structlog

from netstore.networks.supervision import ResolverProcess

__all__ = ["RELAY", "Channel", "ResolverLink"]

log = structlog.get_logger(__name__)

_RETRY_SECONDS = 0.1
_ADOPT_SECONDS = 0.5
_PATIENCE_SECONDS = 5.0
"""So long connections to [::1] wait for a resolver that is restarted."""
RELAY = "::1"
Sockets = tuple[socket.socket, ...]


class Channel:
    """One end of the connection. What is posted while the other end is slow waits here; nobody waits for it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._waiting: deque[tuple[dict[str, str], Sockets]] = deque()

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.clear()
        asyncio.get_running_loop().remove_writer(self._connection)
        self._connection.close()

    def post(self, message: dict[str, str], sockets: Sockets = ()) -> None:
        """Send one message and, with it, duplicates of sockets. A connection that broke is the reader's to find."""
        self._waiting.append((message, sockets))
        self._flush()

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            message, sockets = self._waiting[0]
            rights = array.array("i", [each.fileno() for each in sockets])
            try:
                if -1 not in rights:  # else closed while it waited: nobody needs it any more
                    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
                    self._connection.sendmsg([json.dumps(message).encode()], ancillary)
            except BlockingIOError:
                loop.add_writer(self._connection, self._flush)
                return
            except OSError:
                self._waiting.clear()
                break
            self._waiting.popleft()
        loop.remove_writer(self._connection)

    async def receive(self) -> tuple[dict[str, str], Sockets]:
        """Return one message and the sockets that came with it.

        Raises:
            ConnectionError: the other end is gone.
        """
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._connection, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._connection)
        data, rights, _, _ = socket.recv_fds(self._connection, 4096, 2)
        if not data:
            raise ConnectionResetError
        return json.loads(data), tuple(socket.socket(fileno=each) for each in rights)


class ResolverLink:
    """Our end. What is added while the resolver is away is sent when it is back; nothing here waits for it.

    With a `process` the resolver is started when nobody answers, and again when it ends.
    """

    def __init__(self, run_dir: Path, process: ResolverProcess | None = None) -> None:
        self._path = run_dir / "resolver.sock"
        self._process = process
        self._sockets: dict[str, Sockets] = {}
        self._channel: Channel | None = None
        self._known = False
        self._seen = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether the resolver is there."""
        return self._channel is not None

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
        if self._channel:
            self._channel.post({"add": sandbox_id}, sockets)

    async def remove(self, sandbox_id: str) -> None:
        """Close a sandbox's sockets, here and there; one that has none is a success."""
        sockets = self._sockets.pop(sandbox_id, None)
        if sockets:
            _close(sockets)
            if self._channel:
                self._channel.post({"remove": sandbox_id})

    async def _stay_connected(self, first: asyncio.Event) -> None:
        while True:
            with contextlib.suppress(OSError, json.JSONDecodeError):
                await self._session(first)
            first.set()
            if self._process:
                await self._process.ensure()
            if time.monotonic() - self._seen > _PATIENCE_SECONDS:
                for listener in self._sockets.get(RELAY, ()):
                    _refuse_waiting(listener)
            await asyncio.sleep(_RETRY_SECONDS)

    async def _session(self, first: asyncio.Event) -> None:
        """Take back what the resolver holds, give it what it lacks, and wait for the connection's end."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        with Channel(connection) as channel:
            connection.connect(str(self._path))
            served = set[str]()
            while True:
                message, sockets = await channel.receive()
                if not message["held"]:
                    break
                if self._adopt(channel, message["held"], sockets):
                    served.add(message["held"])
            self._channel, self._known = channel, True
            first.set()
            for sandbox_id in self._sockets.keys() - served:
                channel.post({"add": sandbox_id}, self._sockets[sandbox_id])
            log.info("the resolver is connected", adopted=len(served))
            if self._process and self._process.found(message.get("version", "")):
                channel.post({"end": ""})
            try:
                await channel.receive()
            finally:
                self._channel, self._seen = None, time.monotonic()
                log.warning("the resolver is away; names wait until it is back")

    def _adopt(self, channel: Channel, sandbox_id: str, sockets: Sockets) -> bool:
        """Take sockets that the resolver holds for a sandbox; says whether they are the ones to be served."""
        ours = self._sockets.get(sandbox_id)
        if ours is None and sockets and not self._known:  # we were restarted: they were ours
            self._sockets[sandbox_id] = sockets
            return True
        same = ours is not None and _identity(ours) == _identity(sockets)
        _close(sockets)
        if ours is None:
            channel.post({"remove": sandbox_id})
        return same


def _refuse_waiting(listener: socket.socket) -> None:
    """Reset the connections to [::1] that wait for the relay: nobody is there to serve them."""
    listener.setblocking(False)
    with contextlib.suppress(OSError):
        while True:
            client, _ = listener.accept()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()


def _identity(sockets: Sockets) -> list[int]:
    return [os.fstat(each.fileno()).st_ino for each in sockets]


def _close(sockets: Sockets) -> None:
    for each in sockets:
        each.close()
