"""Questions that are not ours to answer: asked of the host's name servers, from the host's network namespace."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from netstore.errors import KernelError
from netstore.kernel.inotify import PathWatch
from netstore.resolver.wire import REFUSED, SERVFAIL

__all__ = ["Upstreams", "split_server"]

log = structlog.get_logger(__name__)

_ATTEMPT_SECONDS = 2.0
_DOUBT_SECONDS = 0.5  # for a server that was silent the last time
_REPEAT_SECONDS = 0.8  # then the question is sent again: UDP may lose it
_AVOID_SECONDS = 30.0
_LOOK_SECONDS = 1.0
_MAX_SERVERS = 3
_MAX_UNDERWAY = 1024
_HEADER_BYTES = 12
Server = tuple[str, int]


class _Answer(asyncio.DatagramProtocol):
    def __init__(self, question: bytes) -> None:
        self._question = question
        self.received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if _is_answer(data, self._question) and not self.received.done():
            self.received.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.received.done():
            self.received.set_exception(exc)


class Upstreams:
    """Name servers in order: those given, else those of the host's resolv.conf, which is read again when it changes."""

    def __init__(self, given: list[str], resolv_conf: Path) -> None:
        self._given = [split_server(each) for each in given]
        self._resolv_conf = resolv_conf
        self._watch: PathWatch | None = None
        self._read: list[Server] = []
        self._looked = -_LOOK_SECONDS
        self._silent: dict[Server, float] = {}
        self._underway: dict[tuple[bytes, tuple[str, ...], bool], asyncio.Task[bytes | None]] = {}

    def start(self, stack: contextlib.ExitStack) -> None:
        """Watch the host's resolv.conf, until the stack is closed. Without a watch it is looked at once a second."""
        if not self._given:
            try:
                self._watch = stack.enter_context(PathWatch(self._resolv_conf))
                self._watch.changed.set()
            except (KernelError, OSError) as error:
                log.warning("the host's resolv.conf is looked at once a second", reason=str(error))

    def servers(self) -> list[Server]:
        """Return up to three servers."""
        if self._given:
            return self._given[:_MAX_SERVERS]
        # One that is missing is looked for too: its directory may be one that was not there to be watched.
        due = time.monotonic() - self._looked >= _LOOK_SECONDS and (not self._watch or not self._read)
        if due or (self._watch and self._watch.changed.is_set()):
            if self._watch:
                self._watch.changed.clear()
            self._looked = time.monotonic()
            self._read = _name_servers(self._resolv_conf)
        return self._read[:_MAX_SERVERS]

    async def ask(self, question: bytes, servers: Sequence[str] = (), *, tcp: bool) -> bytes | None:
        """Return the first useful answer of these servers, or else of the host's; None when no server gave one.

        The same question, asked by many at once, goes out once: so does one that a server sends back to us in a loop.
        """
        key = (question[2:], tuple(servers[:_MAX_SERVERS]), tcp)
        task = self._underway.get(key)
        if task is None:
            if len(self._underway) >= _MAX_UNDERWAY:
                return None
            task = asyncio.get_running_loop().create_task(self._ask(*key))
            self._underway[key] = task
            task.add_done_callback(lambda _: self._underway.pop(key, None))
        answer = await asyncio.shield(task)
        return question[:2] + answer[2:] if answer else None

    async def _ask(self, rest: bytes, given: Sequence[str], tcp: bool) -> bytes | None:  # noqa: FBT001
        """Ask one server after the other: SERVFAIL, REFUSED and silence lead to the next.

        One that was silent is asked last for a while, and after that is given less time until it answers again.
        """
        question, last = os.urandom(2) + rest, None
        for server in self._in_order([split_server(each) for each in given] or self.servers()):
            patience = _DOUBT_SECONDS if server in self._silent else _ATTEMPT_SECONDS
            try:
                async with asyncio.timeout(patience):
                    last = await (_ask_tcp(server, question) if tcp else _ask_udp(server, question))
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                if server not in self._silent:
                    log.warning("a name server is silent: others are asked first", server=server[0])
                self._silent[server] = time.monotonic() + _AVOID_SECONDS
                continue
            if self._silent.pop(server, 0):
                log.info("a name server answers again", server=server[0])
            if last[3] & 0xF not in (SERVFAIL, REFUSED):
                break
        return last

    def _in_order(self, servers: list[Server]) -> list[Server]:
        now = time.monotonic()
        return sorted(servers, key=lambda server: self._silent.get(server, 0.0) > now)


def _is_answer(data: bytes, question: bytes) -> bool:
    return len(data) >= _HEADER_BYTES and data[:2] == question[:2] and bool(data[2] & 0x80)


async def _ask_udp(server: Server, question: bytes) -> bytes:
    transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: _Answer(question), remote_addr=server
    )
    try:
        transport.sendto(question)
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(protocol.received), _REPEAT_SECONDS)
        transport.sendto(question)
        return await protocol.received
    finally:
        protocol.received.cancel()
        transport.close()


async def _ask_tcp(server: Server, question: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*server)
    try:
        writer.write(len(question).to_bytes(2, "big") + question)
        answer = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
        if not _is_answer(answer, question):
            raise ConnectionError("not an answer")
        return answer
    finally:
        writer.close()


def _name_servers(resolv_conf: Path) -> list[Server]:
    """Return the servers that a resolv.conf(5) names; [] when there is none to be read."""
    try:
        words = [line.split() for line in resolv_conf.read_text(errors="replace").splitlines()]
    except OSError:
        return []
    found = []
    for word in (each[1] for each in words if len(each) > 1 and each[0] == "nameserver"):
        with contextlib.suppress(OSError):  # as glibc: what is no address is passed over
            socket.getaddrinfo(word, 53, flags=socket.AI_NUMERICHOST)
            found.append((word, 53))
    return found


def split_server(text: str) -> Server:
    """Return address and port of "ADDRESS[:PORT]", an IPv6 address with a port in brackets.

    Raises:
        ValueError, OSError: it is none.
    """
    host, separator, port = text.rpartition(":")
    if not separator or (":" in host and not host.endswith("]")):  # no port, or a bare IPv6 address
        host, port = text, "53"
    host = host.removeprefix("[").removesuffix("]")
    socket.getaddrinfo(host, int(port), flags=socket.AI_NUMERICHOST)
    return host, int(port)
