"""Watches the kernel: interfaces and firewall tables of ours that somebody else took away; routes and the uplink."""

from __future__ import annotations

import asyncio
import ctypes
import re
import socket
import struct
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType

import structlog

from netstore.errors import NetstoreError
from netstore.kernel.addressing import RTPROT_NETSTORE
from netstore.kernel.attributes import NETLINK_NETFILTER, attributes, messages
from netstore.kernel.nftables import is_ours
from netstore.networks.manager import NetworkManager

__all__ = ["Drift", "Soon"]

NETLINK_ROUTE = 0
RTMGRP_LINK, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_ROUTE = 0x1, 0x40, 0x400
NFNLGRP_NFTABLES = 7
RTM_NEWLINK, RTM_DELLINK, RTM_NEWROUTE, RTM_DELROUTE = 16, 17, 24, 25
IFLA_NEW_IFINDEX = 49
NFNL_SUBSYS_NFTABLES = 10
NFT_MSG_DELTABLE, NFT_MSG_DELCHAIN, NFT_MSG_DELRULE, NFT_MSG_DELSET = 2, 5, 8, 11
SO_ATTACH_FILTER = 26
BPF_LD_W_ABS, BPF_LD_H_ABS, BPF_JMP_JEQ_K, BPF_RET_K = 0x20, 0x28, 0x15, 0x06
_KIND_AT, _SENDER_AT, _INDEX_AT = 4, 12, 20  # nlmsg_type, nlmsg_pid, and ifi_index behind the header

_PROTOCOL_AT = 21  # rtm_protocol
NFT_MSG_NEWCHAIN = 3
_NFT_GONE = (NFT_MSG_DELTABLE, NFT_MSG_DELCHAIN, NFT_MSG_DELRULE, NFT_MSG_DELSET)

_ENDPOINT = re.compile(rb"netstore endpoint ([0-9a-f]{64})")
_ROUND_SECONDS = 60.0
_SETTLE_SECONDS = 0.3
_REPAIR_SECONDS = 0.05  # in the gap, published ports are not served: as short as one transaction's messages take

log = structlog.get_logger(__name__)


class Soon:
    """Runs some work soon after it was asked for; several requests at once are one run."""

    def __init__(self, name: str, work: Callable[[], Awaitable[object]], settle: float = _SETTLE_SECONDS) -> None:
        self._name = name
        self._work = work
        self._settle = settle
        self._task: asyncio.Task[None] | None = None
        self._again = False

    def ask(self) -> None:
        """Ask for a run."""
        self._again = True
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name=self._name)

    def cancel(self) -> None:
        """End what runs."""
        if self._task:
            self._task.cancel()

    async def _run(self) -> None:
        while self._again:  # also for what happened while the last run went
            await asyncio.sleep(self._settle)  # a firewall restart is many messages
            self._again = False
            try:
                await self._work()
            except NetstoreError as error:
                log.error(f"{self._name} failed", error=str(error))
            except Exception:  # what we did not think of must not end the watch
                log.exception(f"{self._name} failed")


class Drift:
    """Repairs soon after something of ours went away, and follows the uplink soon after it changed."""

    def __init__(self, manager: NetworkManager) -> None:
        self._manager = manager
        self._repair = Soon("repair drift", partial(manager.check, repair=True), _REPAIR_SECONDS)
        self._follow = Soon("follow uplink", self._follow_uplink)
        self._look = Soon("look for lost endpoints", self._look_for_lost)
        self._ended: set[str] = set()
        self._parents: frozenset[int] | None = None
        self._round: asyncio.Task[None] | None = None
        tables = [NFNL_SUBSYS_NFTABLES << 8 | kind for kind in (*_NFT_GONE, NFT_MSG_NEWCHAIN)]
        self._uplink = _listening(NETLINK_ROUTE, RTMGRP_LINK, {_KIND_AT: []})
        self._sockets = [
            (_listening(NETLINK_ROUTE, RTMGRP_LINK, {_KIND_AT: [RTM_DELLINK]}), self._link_went, self._repair),
            (_listening(NETLINK_NETFILTER, 1 << NFNLGRP_NFTABLES - 1, {_KIND_AT: tables}), _table_went, self._repair),
            (
                _listening(
                    NETLINK_ROUTE, RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_ROUTE, {_KIND_AT: [RTM_NEWROUTE, RTM_DELROUTE]}
                ),
                _others,
                self._follow,
            ),
            (self._uplink, _anything, self._follow),
        ]

    def __enter__(self) -> Drift:
        loop = asyncio.get_running_loop()
        for each, relevant, work in self._sockets:
            loop.add_reader(each, self._read, each, relevant, work)
        self._follow.ask()  # for what changed while nobody watched
        self._round = asyncio.create_task(self._go_round(), name="look for stale sandboxes")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, _, _ in self._sockets:
            asyncio.get_running_loop().remove_reader(each)
            each.close()
        for work in (self._repair, self._follow, self._look, self._round):
            if work:
                work.cancel()

    def _read(self, source: socket.socket, relevant: Callable[[int, bytes], bool], work: Soon) -> None:
        try:
            data = source.recv(65536)
        except BlockingIOError:
            return
        except OSError:  # ENOBUFS: events were lost, so look
            work.ask()
            return
        if any(relevant(kind, message) for kind, message in messages(data)):
            work.ask()

    def _link_went(self, kind: int, message: bytes) -> bool:
        """Say whether a network's interface was deleted; an endpoint's, as our own detachments too, is looked up."""
        if (match := _ENDPOINT.search(message)) and IFLA_NEW_IFINDEX not in attributes(message, 32):
            self._ended.add(match[1].decode())
            self._look.ask()
        return b"netstore network " in message

    async def _look_for_lost(self) -> None:
        ended, self._ended = self._ended, set()
        if await self._manager.lost(ended):
            self._repair.ask()

    async def _go_round(self) -> None:
        """Look now and then whether namespaces ended without a detachment: nothing tells, when an engine crashed."""
        while True:
            await asyncio.sleep(_ROUND_SECONDS)
            if await self._manager.stale():
                self._repair.ask()

    async def _follow_uplink(self) -> None:
        index = await self._manager.follow_uplink()
        parents = await self._manager.parents()
        if self._parents not in (None, parents):  # the kernel took what was on one away, or it is back
            self._repair.ask()
        self._parents = parents
        _filter(self._uplink, {_KIND_AT: [RTM_NEWLINK], _INDEX_AT: [index]})


def _listening(protocol: int, groups: int, wanted: dict[int, list[int]]) -> socket.socket:
    """Listen for the messages of some groups that `_filter` lets through."""
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol)
    _filter(opened, wanted)
    opened.bind((0, groups))
    return opened


def _filter(listening: socket.socket, wanted: dict[int, list[int]]) -> None:
    """Let messages through that have one of the values at each offset; the kernel drops the others (classic BPF).

    An attach makes some twenty messages that say nothing to us, and each would wake the loop.
    """
    program: list[tuple[int, int, int, int]] = []
    for offset, values in wanted.items():
        wide = offset == _INDEX_AT
        program.append((BPF_LD_W_ABS if wide else BPF_LD_H_ABS, 0, 0, offset))
        swap = socket.htonl if wide else socket.htons  # fields are in host order, and BPF reads network order
        program += [(BPF_JMP_JEQ_K, len(values) - at, 0, swap(value)) for at, value in enumerate(values)]
        program.append((BPF_RET_K, 0, 0, 0))
    program.append((BPF_RET_K, 0, 0, 0xFFFFFFFF))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    filter_ = struct.pack("HP", len(program), ctypes.addressof(code))
    listening.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filter_)


def _anything(kind: int, message: bytes) -> bool:
    return True


def _others(kind: int, message: bytes) -> bool:
    """Say whether a route is not one of ours to a single endpoint: each that comes would have the uplink looked at."""
    return message[_PROTOCOL_AT] != RTPROT_NETSTORE


def _table_went(kind: int, message: bytes) -> bool:
    """Say whether something of our tables was removed, or a chain of others changed that may drop what is ours.

    What we remove ourselves, when a policy changes, is no drift: looking for one then would find work half done.
    """
    if kind >> 8 != NFNL_SUBSYS_NFTABLES or is_ours(struct.unpack_from("=I", message, _SENDER_AT)[0]):
        return False
    if kind & 0xFF == NFT_MSG_NEWCHAIN:
        return b"DOCKER-USER\0" in message or b"FORWARD\0" in message
    return kind & 0xFF in _NFT_GONE and (b"netstore\0" in message or b"DOCKER-USER\0" in message)
