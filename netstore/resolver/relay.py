"""The relay of [::1]: carries TCP from the host's IPv6 loopback to published ports, one for the node.

IPv6 has no `route_localnet`: what comes from ::1 cannot leave `lo`, so destination NAT alone cannot serve it. The
firewall redirects TCP to [::1]:PORT, for every published port, to one listening socket; here the port asked for
is read back from the connection's NAT entry, its endpoint looked up in the store, and the bytes carried to and fro.

It has a thread and an event loop of its own, so that a long transfer does not keep questions waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sqlite3
import struct
import threading
from concurrent.futures import Future
from pathlib import Path

import structlog

__all__ = ["Relay"]

IP6T_SO_ORIGINAL_DST = 80  # linux/netfilter_ipv6/ip6_tables.h
_SOCKADDR_IN6 = struct.Struct("=H2s4s16sI")
_CHUNK = 1 << 18
_MOST = 2048
_CONNECT_SECONDS = 10.0
_IDLE_SECONDS = 60  # then the kernel asks whether the other side is there still

# Who has a published port: it alone, or a range that it lies in (that has an index of its own).
_HOLDER = """
    SELECT endpoints.body, container_port + ?1 - host_port FROM ports JOIN endpoints ON endpoints.id = endpoint_id
    WHERE protocol = 'tcp' AND host_port = ?1 AND host_ip IN ('', '::1')
    UNION ALL
    SELECT endpoints.body, container_port + ?1 - host_port
    FROM ports INDEXED BY ports_of_ranges JOIN endpoints ON endpoints.id = endpoint_id
    WHERE protocol = 'tcp' AND last_port > host_port AND host_port < ?1 AND last_port >= ?1 AND host_ip IN ('', '::1')
"""

log = structlog.get_logger(__name__)


class Relay:
    """Serves one listening socket, handed over by netstored."""

    def __init__(self, database: Path) -> None:
        self._path = database
        self._database: sqlite3.Connection | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._accepting: Future[None] | None = None

    def serve(self, listener: socket.socket) -> None:
        """Serve a listening socket, from now on and instead of the one before."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="relay", daemon=True).start()
        if self._accepting:
            self._accepting.cancel()
        listener.setblocking(False)
        self._accepting = asyncio.run_coroutine_threadsafe(self._accept(listener), self._loop)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("the relay cannot accept", reason=str(error))
                await asyncio.sleep(0.1)
                continue
            if len(self._connections) >= _MOST:
                _reset(client)
                continue
            task = loop.create_task(self._carry(client))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _carry(self, client: socket.socket) -> None:
        """Connect to the endpoint and carry both ways until both sides have ended, or one was reset."""
        client.setblocking(False)
        server = None
        try:
            server = await self._connect(_asked_port(client))
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                each.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_SECONDS)
            async with asyncio.TaskGroup() as ways:
                ways.create_task(_pump(client, server))
                ways.create_task(_pump(server, client))
        except* (OSError, sqlite3.Error, TimeoutError):
            _reset(client)
            if server:
                _reset(server)
        finally:
            client.close()
            if server:
                server.close()

    async def _connect(self, port: int) -> socket.socket:
        """Connect to the endpoint that has a published port, by IPv6 where it listens there.

        Raises:
            OSError: nobody has it, or it refuses.
        """
        refusal: OSError = ConnectionRefusedError(f"nobody has port {port}")
        for address, number in self._targets(port):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            server = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            server.setblocking(False)
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    await asyncio.get_running_loop().sock_connect(server, (address, number))
            except OSError as error:
                server.close()
                refusal = error
                continue
            return server
        raise refusal

    def _targets(self, port: int) -> list[tuple[str, int]]:
        if self._database is None:
            self._database = sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, isolation_level=None)
            self._database.execute("PRAGMA busy_timeout = 200")
        for body, number in self._database.execute(_HOLDER, (port,)):
            addresses = [each["address"] for each in json.loads(body).get("addresses", ())]
            return [(each, number) for each in sorted(addresses, key=lambda text: ":" not in text)]
        return []


def _asked_port(client: socket.socket) -> int:
    """Return the port that a redirected connection asked for."""
    data = client.getsockopt(socket.IPPROTO_IPV6, IP6T_SO_ORIGINAL_DST, _SOCKADDR_IN6.size)
    return int.from_bytes(_SOCKADDR_IN6.unpack(data)[1], "big")


async def _pump(source: socket.socket, target: socket.socket) -> None:
    """Carry one way until its end, which is passed on."""
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, _CHUNK):
        await loop.sock_sendall(target, data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _reset(connection: socket.socket) -> None:
    """Close a connection so that the other side is told of a failure."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
