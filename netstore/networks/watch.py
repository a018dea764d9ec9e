"""Watches the kernel for drift: our interfaces deleted, or our firewall table flushed, by somebody else."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from types import TracebackType

import structlog

from netstore.errors import NetstoreError
from netstore.networks.manager import NetworkManager

__all__ = ["Drift"]

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
RTMGRP_LINK = 0x1
NFNLGRP_NFTABLES = 7
RTM_DELLINK = 17
NFNL_SUBSYS_NFTABLES = 10
NFT_MSG_DELTABLE, NFT_MSG_DELRULE, NFT_MSG_DELSET = 2, 8, 11

_SETTLE_SECONDS = 0.3

log = structlog.get_logger(__name__)


class Drift:
    """Repairs soon after something of ours went away; several changes at once are one repair."""

    def __init__(self, manager: NetworkManager) -> None:
        self._manager = manager
        self._task: asyncio.Task[None] | None = None
        self._sockets = [
            _listening(NETLINK_ROUTE, RTMGRP_LINK),
            _listening(NETLINK_NETFILTER, 1 << NFNLGRP_NFTABLES - 1),
        ]

    def __enter__(self) -> Drift:
        loop = asyncio.get_running_loop()
        for each, relevant in zip(self._sockets, (_link_went, _table_went), strict=True):
            loop.add_reader(each, self._read, each, relevant)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._sockets:
            asyncio.get_running_loop().remove_reader(each)
            each.close()
        if self._task:
            self._task.cancel()

    def _read(self, source: socket.socket, relevant: Callable[[int, bytes], bool]) -> None:
        try:
            data = source.recv(65536)
        except BlockingIOError:
            return
        except OSError:  # ENOBUFS: events were lost, so look
            self._schedule()
            return
        if any(relevant(kind, message) for kind, message in _messages(data)):
            self._schedule()

    def _schedule(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._repair(), name="repair drift")

    async def _repair(self) -> None:
        await asyncio.sleep(_SETTLE_SECONDS)  # a firewall restart is many messages
        try:
            await self._manager.check(repair=True)
        except NetstoreError as error:
            log.error("repair failed", error=str(error))


def _listening(protocol: int, groups: int) -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol)
    opened.bind((0, groups))
    return opened


def _messages(data: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at + 16 <= len(data):
        length, kind = struct.unpack_from("IH", data, at)
        found.append((kind, data[at : at + length]))
        at += max((length + 3) & ~3, 16)
    return found


def _link_went(kind: int, message: bytes) -> bool:
    """An interface with our mark was deleted. Our own deletions come here too; the repair then finds nothing to do."""
    return kind == RTM_DELLINK and b"netstore network " in message


def _table_went(kind: int, message: bytes) -> bool:
    return (
        kind >> 8 == NFNL_SUBSYS_NFTABLES
        and kind & 0xFF in (NFT_MSG_DELTABLE, NFT_MSG_DELRULE, NFT_MSG_DELSET)
        and b"netstore\0" in message
    )
