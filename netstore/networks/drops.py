"""What policies drop: read from the kernel's log, named, kept for a while, and told to whoever watches."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any

import structlog

from netstore.errors import KernelError, NetstoreError, Unsupported
from netstore.kernel import nflog
from netstore.kernel.nflog import LoggedPacket
from netstore.kernel.policing import LOG_GROUP, LOG_PREFIX, LOGGED_BYTES, Policing
from netstore.networks.context import Context
from netstore.store import Transaction

__all__ = ["Drop", "Drops", "Peer"]

_KEPT = 1000
_PER_SECOND, _AT_ONCE = 100, 200

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One end of a dropped packet; without an endpoint's name it is none of ours."""

    address: str
    port: int = 0
    name: str = ""
    endpoint_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """One dropped packet. `policy` "" means the network's default; `suppressed` before it were not looked at."""

    number: int
    time: float
    network: str
    policy: str
    protocol: str
    source: Peer
    destination: Peer
    suppressed: int = 0


class Drops:
    """The dropped packets of a node. The kernel tells of some of a flood, we look at some of those."""

    def __init__(self, context: Context, policing: Policing) -> None:
        self._context = context
        self._policing = policing
        self._socket: socket.socket | None = None
        self._why_not = ""
        self._kept: deque[Drop] = deque(maxlen=_KEPT)
        self._number = 0
        self._tokens, self._filled = float(_AT_ONCE), time.monotonic()
        self._suppressed = 0
        self._pending: deque[tuple[float, LoggedPacket, int]] = deque(maxlen=_KEPT)
        self._naming: asyncio.Task[None] | None = None
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        """Listen, where the kernel can; else policies drop without a word."""
        try:
            self._socket = await self._context.apply(nflog.listen, LOG_GROUP, LOGGED_BYTES)
        except KernelError as error:
            self._why_not = str(error)
            log.warning("drops are counted, not logged", error=str(error))
        self._policing.logs = self._socket is not None
        if self._socket:
            asyncio.get_running_loop().add_reader(self._socket, self._read)

    async def close(self) -> None:
        """Listen no more."""
        if self._socket:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
        if self._naming:
            self._naming.cancel()

    async def watch(self, *, tail: int, follow: bool, stop: asyncio.Event) -> AsyncIterator[Drop]:
        """Yield the last `tail` drops that are kept and, with `follow`, those that come; who is slow misses some.

        Raises:
            Unsupported: the kernel does not tell.
        """
        if self._socket is None:
            raise Unsupported(
                f"drops are not logged on this node: {self._why_not}",
                hint="they are counted: `netstore policy ls`; the log needs nfnetlink_log in the kernel",
            )
        seen = self._number - tail
        while True:
            changed = self._changed
            for drop in [drop for drop in self._kept if drop.number > seen]:
                seen = drop.number
                yield drop
            if not follow or stop.is_set():
                return
            if seen == self._number:
                await _either(changed, stop)

    def _read(self) -> None:
        assert self._socket
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:  # ENOBUFS: more than we can read
            self._suppressed += 1
            return
        for packet in nflog.parse(data):
            if packet.prefix.startswith(LOG_PREFIX):
                self._take(packet)
        if self._pending and (self._naming is None or self._naming.done()):
            self._naming = asyncio.create_task(self._name(), name="name drops")

    def _take(self, packet: LoggedPacket) -> None:
        """Take a packet, if a bucket that fills with time has a token left."""
        now = time.monotonic()
        self._tokens = min(_AT_ONCE, self._tokens + (now - self._filled) * _PER_SECOND)
        self._filled = now
        if self._tokens < 1:
            self._suppressed += 1
            return
        self._tokens -= 1
        self._pending.append((time.time(), packet, self._suppressed))
        self._suppressed = 0

    async def _name(self) -> None:
        while self._pending:
            batch, moment = list(self._pending), len(self._pending)
            try:
                named = await self._context.store.read(lambda tx, batch=batch: [_named(tx, each) for each in batch])  # type: ignore[misc]
            except NetstoreError as error:
                log.error("drops were not named", error=str(error))
                named = []
            for _ in range(moment):
                self._pending.popleft()
            for drop in named:
                self._number += 1
                self._kept.append(replace(drop, number=self._number))
            changed, self._changed = self._changed, asyncio.get_running_loop().create_future()
            changed.set_result(None)


async def _either(changed: asyncio.Future[None], stop: asyncio.Event) -> None:
    stopping: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
    waiting: list[asyncio.Future[Any]] = [changed, stopping]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()


def _named(tx: Transaction, taken: tuple[float, LoggedPacket, int]) -> Drop:
    moment, packet, suppressed = taken
    digits = packet.prefix.removeprefix(LOG_PREFIX)
    policy = next(iter(tx.policies.all("id >= ? AND id < ?", digits, f"{digits}g")), None)
    condition = ("id = ?", policy.spec.network_id) if policy else ("id >= ? AND id < ?", digits, f"{digits}g")
    network = next(iter(tx.networks.all(*condition)), None)
    return Drop(
        number=0,
        time=moment,
        network=network.name if network else "",
        policy=policy.name if policy else "",
        protocol=packet.protocol,
        source=_peer(tx, packet.source, packet.source_port),
        destination=_peer(tx, packet.destination, packet.destination_port),
        suppressed=suppressed,
    )


def _peer(tx: Transaction, address: str, port: int) -> Peer:
    row = tx.row(
        "SELECT e.id, e.name FROM addresses a JOIN endpoints e ON e.id = a.endpoint_id"
        " WHERE a.network_id IN (SELECT id FROM networks) AND a.address = ?",
        ip_address(address).packed,
    )
    return Peer(address=address, port=port, name=row[1] if row else "", endpoint_id=row[0] if row else "")
