"""Watches the kernel for drift: our interfaces deleted, or our firewall table flushed, by somebody else."""

from __future__ import annotations

import asyncio
import ctypes
import socket
import struct
from collections.abc import Callable
from types import TracebackType

import structlog

from netstore.errors import NetstoreError
from netstore.kernel.attributes import NETLINK_NETFILTER, messages
from netstore.networks.manager import NetworkManager

__all__ = ["Drift"]

NETLINK_ROUTE = 0
RTMGRP_LINK = 0x1
NFNLGRP_NFTABLES = 7
RTM_DELLINK = 17
NFNL_SUBSYS_NFTABLES = 10
NFT_MSG_DELTABLE, NFT_MSG_DELCHAIN, NFT_MSG_DELRULE, NFT_MSG_DELSET = 2, 5, 8, 11
SO_ATTACH_FILTER = 26
BPF_LD_H_ABS, BPF_JMP_JEQ_K, BPF_RET_K = 0x28, 0x15, 0x06

_NFT_GONE = (NFT_MSG_DELTABLE, NFT_MSG_DELCHAIN, NFT_MSG_DELRULE, NFT_MSG_DELSET)

_SETTLE_SECONDS = 0.3

log = structlog.get_logger(__name__)


class Drift:
    """Repairs soon after something of ours went away; several changes at once are one repair."""

    def __init__(self, manager: NetworkManager) -> None:
        self._manager = manager
        self._task: asyncio.Task[None] | None = None
        self._again = False
        self._sockets = [
            _listening(NETLINK_ROUTE, RTMGRP_LINK, [RTM_DELLINK]),
            _listening(
                NETLINK_NETFILTER, 1 << NFNLGRP_NFTABLES - 1, [NFNL_SUBSYS_NFTABLES << 8 | k for k in _NFT_GONE]
            ),
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
        if any(relevant(kind, message) for kind, message in messages(data)):
            self._schedule()

    def _schedule(self) -> None:
        self._again = True
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._repair(), name="repair drift")

    async def _repair(self) -> None:
        while self._again:  # also for what went away while the last repair ran
            await asyncio.sleep(_SETTLE_SECONDS)  # a firewall restart is many messages
            self._again = False
            try:
                await self._manager.check(repair=True)
            except NetstoreError as error:
                log.error("repair failed", error=str(error))


def _listening(protocol: int, groups: int, kinds: list[int]) -> socket.socket:
    """Listen for messages that begin with one of the kinds; the kernel drops the others (classic BPF).

    An attach makes some twenty messages that say nothing to us, and each would wake the loop.
    """
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol)
    program = [(BPF_LD_H_ABS, 0, 0, 4)]  # nlmsg_type, which is in host order, as BPF reads it
    for index, kind in enumerate(kinds):
        program.append((BPF_JMP_JEQ_K, len(kinds) - index, 0, socket.htons(kind)))
    program += [(BPF_RET_K, 0, 0, 0), (BPF_RET_K, 0, 0, 0xFFFFFFFF)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    filter_ = struct.pack("HP", len(program), ctypes.addressof(code))
    opened.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filter_)
    opened.bind((0, groups))
    return opened


def _link_went(kind: int, message: bytes) -> bool:
    """An interface with our mark was deleted. Our own deletions come here too; the repair then finds nothing to do."""
    return kind == RTM_DELLINK and b"netstore network " in message


def _table_went(kind: int, message: bytes) -> bool:
    return kind >> 8 == NFNL_SUBSYS_NFTABLES and kind & 0xFF in _NFT_GONE and b"netstore\0" in message
