"""Questions that are not ours to answer: asked of the host's name servers, from the host's network namespace."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from netstore.resolver.wire import REFUSED, SERVFAIL

__all__ = ["Upstreams", "split_server"]

_ATTEMPT_SECONDS = 2.0
_AVOID_SECONDS = 30.0
_MAX_SERVERS = 3
_MAX_UNDERWAY = 1024


class _Answer(asyncio.DatagramProtocol):
    def __init__(self, question_id: bytes) -> None:
        self._id = question_id
        self.received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if data[:2] == self._id and not self.received.done():
            self.received.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.received.done():
            self.received.set_exception(exc)


class Upstreams:
    """Name servers in order: those given, else the host's resolv.conf, read again when it changes."""

    def __init__(self, given: list[str], resolv_conf: Path) -> None:
        self._given = [split_server(each) for each in given]
        self._resolv_conf = resolv_conf
        self._read: list[tuple[str, int]] = []
        self._stamp = 0
        self._looked = 0.0
        self._underway = 0
        self._silent: dict[tuple[str, int], float] = {}

    def servers(self) -> list[tuple[str, int]]:
        """Return up to three servers; looks at the file at most once a second."""
        if self._given:
            return self._given[:_MAX_SERVERS]
        if time.monotonic() - self._looked >= 1:
            self._looked = time.monotonic()
            with contextlib.suppress(OSError):
                stamp = self._resolv_conf.stat().st_mtime_ns
                if stamp != self._stamp:
                    words = [line.split() for line in self._resolv_conf.read_text().splitlines()]
                    self._read = [(each[1], 53) for each in words if len(each) > 1 and each[0] == "nameserver"]
                    self._stamp = stamp
        return self._read[:_MAX_SERVERS]

    async def ask(self, question: bytes, servers: Sequence[str] = (), *, tcp: bool) -> bytes | None:
        """Return the first useful answer of these servers, or else of the host's; None when no server gave one.

        SERVFAIL, REFUSED and silence lead to the next server; one that was silent is asked last for a while.
        """
        if self._underway >= _MAX_UNDERWAY:
            return None
        self._underway += 1
        last = None
        try:
            for server in self._healthy_first(
                [split_server(each) for each in servers[:_MAX_SERVERS]] or self.servers()
            ):
                with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                    async with asyncio.timeout(_ATTEMPT_SECONDS):
                        last = await (_ask_tcp(server, question) if tcp else _ask_udp(server, question))
                    self._silent.pop(server, None)
                    if last[3] & 0xF not in (SERVFAIL, REFUSED):
                        return last
                    continue
                self._silent[server] = time.monotonic() + _AVOID_SECONDS
        finally:
            self._underway -= 1
        return last

    def _healthy_first(self, servers: list[tuple[str, int]]) -> list[tuple[str, int]]:
        now = time.monotonic()
        return sorted(servers, key=lambda server: self._silent.get(server, 0.0) > now)


async def _ask_udp(server: tuple[str, int], question: bytes) -> bytes:
    transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: _Answer(question[:2]), remote_addr=server
    )
    try:
        transport.sendto(question)
        return await protocol.received
    finally:
        transport.close()


async def _ask_tcp(server: tuple[str, int], question: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*server)
    try:
        writer.write(len(question).to_bytes(2, "big") + question)
        return await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
    finally:
        writer.close()


def split_server(text: str) -> tuple[str, int]:
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
