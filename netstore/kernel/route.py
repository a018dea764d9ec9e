"""Route netlink (rtnetlink(7)): a batch transport.

Sending is one `send` for a whole batch, and one acknowledgement read for each message. Kernel constants keep their C
names. This is the one place where netlink errors become `KernelError`.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, TypeAlias

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from netstore.errors import KernelError
from netstore.kernel.attributes import attribute, attributes

__all__ = [
    "AF_BRIDGE",
    "NTF_MASTER",
    "NTF_SELF",
    "Attributes",
    "Link",
    "Request",
    "RouteSocket",
    "encode",
    "encode_neighbour",
]

RTM_GETLINK, RTM_GETADDR, RTM_GETROUTE, RTM_GETNEIGH = 18, 22, 26, 30
AF_BRIDGE = 7
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x100, 0x200
NLMSGERR_ATTR_MSG = 1
SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_EXT_ACK = 270, 10, 11
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_IFALIAS = 1, 3, 4, 10, 20
IFA_ADDRESS, IFA_LOCAL = 1, 2
RTA_DST, RTA_GATEWAY, RTA_VIA = 1, 5, 18
NDA_DST, NDA_LLADDR, NDA_IFINDEX = 1, 2, 8
NUD_PERMANENT = 0x80
NTF_SELF, NTF_MASTER = 0x02, 0x04
SIOCGIFINDEX = 0x8933

_IFREQ = 40  # bytes of struct ifreq: the name in 16 of them, then the index
_HEADER = struct.Struct("IHHII")
_BATCH = 64  # messages in one send: their acknowledgements fit the default receive buffer
IFLA_LINKINFO, IFLA_INFO_DATA, IFLA_VXLAN_LOCAL, IFLA_VXLAN_LOCAL6 = 18, 2, 4, 17
_SKIP_STATISTICS = ("IFLA_EXT_MASK", 1 << 3)  # RTEXT_FILTER_SKIP_STATS
Attributes: TypeAlias = "list[tuple[str, Any]]"
"""Attributes as pyroute2 takes them, by name."""


@dataclass(frozen=True, slots=True)
class Request:
    """One encoded message. Errors whose errno is in `tolerate` count as success."""

    data: bytes
    doing: str
    to: str
    tolerate: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Link:
    """An interface. `mtu` in bytes; `master` is the index of the bridge that it is a port of, 0 for none."""

    index: int
    name: str
    alias: str
    mac: str
    mtu: int
    master: int


class RouteSocket:
    """A route netlink socket, of the namespace in which it was opened. Not for two threads at once."""

    def __init__(self, opened: socket.socket | None = None) -> None:
        self._socket = opened or socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        self._sequence = 0

    def __enter__(self) -> RouteSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def run(self, requests: Sequence[Request]) -> None:
        """Send requests in order, in one batch; all are tried.

        Raises:
            KernelError: the first that failed.
        """
        failure: KernelError | None = None
        for start in range(0, len(requests), _BATCH):
            failure = self._send(requests[start : start + _BATCH]) or failure
        if failure:
            raise failure

    def _send(self, requests: Sequence[Request]) -> KernelError | None:
        first = self._sequence + 1
        batch = bytearray()
        for request in requests:
            self._sequence += 1
            at = len(batch)
            batch += request.data
            struct.pack_into("I", batch, at + 8, self._sequence)
            batch += b"\0" * (-len(batch) % 4)
        self._socket.send(batch)
        waiting, failure = len(requests), None
        while waiting:
            for kind, flags, sequence, message in _messages(self._socket.recv(65536)):
                if kind != NLMSG_ERROR or sequence < first:
                    continue
                waiting -= 1
                request = requests[sequence - first]
                code = -struct.unpack_from("i", message, 16)[0]
                if code and code not in request.tolerate and failure is None:
                    failure = KernelError(code, request.doing, request.to, hint=_reason(flags, message))
        return failure

    def index_of(self, name: str) -> int | None:
        """Return an interface's index (netdevice(7)), None when there is none of that name."""
        try:
            answer = fcntl.ioctl(self._socket, SIOCGIFINDEX, name.encode().ljust(_IFREQ, b"\0"))
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise KernelError(error.errno or errno.EIO, "reading interface", name) from error
        return int(struct.unpack_from("i", answer, 16)[0])

    def link(self, name: str) -> Link | None:
        """Return one interface, None when there is none of that name."""
        try:
            (answer,) = self._answers(_link_query(name), "reading interface", name)
        except KernelError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        return _link(answer)

    def links(self, *, master: int = 0) -> list[Link]:
        """Return every interface, or the ports of the bridge of index `master`."""
        attrs: Attributes = [_SKIP_STATISTICS, *([("IFLA_MASTER", master)] if master else [])]
        message = encode(ifinfmsg, RTM_GETLINK, NLM_F_DUMP, {}, attrs)
        return [_link(answer) for answer in self._answers(message, "listing", "interfaces")]

    def tunnel_source(self, name: str) -> str:
        """Return the address that a VXLAN interface sends from, "" when there is none of that name."""
        try:
            (answer,) = self._answers(_link_query(name), "reading interface", name)
        except KernelError as error:
            if error.errno == errno.ENODEV:
                return ""
            raise
        info = attributes(attributes(answer, 32).get(IFLA_LINKINFO, b""), 4)
        data = attributes(info.get(IFLA_INFO_DATA, b""), 4)
        found = data.get(IFLA_VXLAN_LOCAL) or data.get(IFLA_VXLAN_LOCAL6)
        return str(ip_address(found[4:])) if found else ""

    def permanent_neighbours(self, index: int) -> dict[str, str]:
        """Return the neighbours of an interface that were given to it and never expire: address and MAC."""
        message = encode_neighbour(
            RTM_GETNEIGH, NLM_F_DUMP, socket.AF_UNSPEC, 0, attribute(NDA_IFINDEX, struct.pack("I", index))
        )
        found = {}
        for answer in self._answers(message, "listing", "neighbours"):
            family, at, state = struct.unpack_from("=BxxxiH", answer, 16)
            if at == index and state & NUD_PERMANENT and NDA_DST in (known := attributes(answer, 28)):
                mac = known.get(NDA_LLADDR, b"")[4:10].hex(":")
                found[socket.inet_ntop(family, known[NDA_DST][4:])] = mac
        return found

    def addresses(self, index: int) -> set[str]:
        """Return the addresses that an interface has alone: those whose prefix is one address long."""
        found = self.every_address()
        return {each for at, each, length in found if at == index and length == (128 if ":" in each else 32)}

    def every_address(self) -> list[tuple[int, str, int]]:
        """Return the index of an interface, an address and its prefix length, for each."""
        message = encode(ifaddrmsg, RTM_GETADDR, NLM_F_DUMP, {}, [])
        found = []
        for answer in self._answers(message, "listing", "addresses"):
            family, length, _, _, at = struct.unpack_from("=BBBBi", answer, 16)
            known = attributes(answer, 24)
            packed = (known.get(IFA_LOCAL) or known[IFA_ADDRESS])[4:]
            found.append((at, socket.inet_ntop(family, packed), length))
        return found

    def routes(self, protocol: int) -> dict[str, str]:
        """Return the gateways of routes that one protocol (RTPROT_) made, by destination."""
        message = _HEADER.pack(28, RTM_GETROUTE, NLM_F_REQUEST | NLM_F_DUMP, 0, 0) + bytes(12)
        found = {}
        for answer in self._answers(message, "listing", "routes"):
            family, owner = answer[16], answer[21]
            known = attributes(answer, 28)
            if owner != protocol or RTA_DST not in known:
                continue
            gateway = known[RTA_VIA][6:22] if RTA_VIA in known else known.get(RTA_GATEWAY, b"")[4:]
            shown = socket.inet_ntop(socket.AF_INET if len(gateway) == 4 else socket.AF_INET6, gateway)
            found[socket.inet_ntop(family, known[RTA_DST][4:])] = shown
        return found

    def forwarding(self, index: int) -> tuple[dict[str, str], set[str]]:
        """Return what a VXLAN interface and its bridge know of where MACs are: VTEP by MAC, and the bridge's MACs."""
        message = encode(ifinfmsg, RTM_GETNEIGH, NLM_F_DUMP, {"family": AF_BRIDGE, "index": index}, [])
        tunnels, bridged = {}, set()
        for answer in self._answers(message, "listing", "forwarding entries"):
            _, at, _, flags = struct.unpack_from("=BxxxiHB", answer, 16)
            known = attributes(answer, 28)
            if at != index or NDA_LLADDR not in known:
                continue
            mac = known[NDA_LLADDR][4:10].hex(":")
            if flags & NTF_SELF and NDA_DST in known:
                packed = known[NDA_DST][4:]
                tunnels[mac] = socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)
            elif not flags & NTF_SELF:
                bridged.add(mac)
        return tunnels, bridged

    def _answers(self, data: bytes, doing: str, to: str) -> list[bytes]:
        self._sequence += 1
        message = bytearray(data)
        struct.pack_into("I", message, 8, self._sequence)
        self._socket.send(message)
        found: list[bytes] = []
        while True:
            for kind, flags, sequence, answer in _messages(self._socket.recv(1 << 18)):
                if sequence != self._sequence:
                    continue
                if kind == NLMSG_DONE:
                    return found
                if kind == NLMSG_ERROR:
                    code = -struct.unpack_from("i", answer, 16)[0]
                    if code:
                        raise KernelError(code, doing, to, hint=_reason(flags, answer))
                    return found
                found.append(answer)


def _messages(data: bytes) -> Iterable[tuple[int, int, int, bytes]]:
    at = 0
    while at < len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
        yield kind, flags, sequence, data[at : at + length]
        at += (length + 3) & ~3


def _reason(flags: int, message: bytes) -> str:
    """Return the kernel's own words (extended acknowledgement), "" when it gave none."""
    if not flags & NLM_F_ACK_TLVS:
        return ""
    at = 20 + 16  # the header, errno, and the request's header (NETLINK_CAP_ACK)
    while at + 4 <= len(message):
        length, kind = struct.unpack_from("HH", message, at)
        if kind == NLMSGERR_ATTR_MSG:
            return "the kernel says: " + message[at + 4 : at + length].rstrip(b"\0").decode(errors="replace")
        at += max((length + 3) & ~3, 4)
    return ""


def _link(message: bytes) -> Link:
    """Read what we need of an RTM_NEWLINK; pyroute2's full decoding costs 0.2 ms for each interface."""
    (index,) = struct.unpack_from("i", message, 20)
    found: dict[int, bytes] = {}
    at = 32
    while at + 4 <= len(message):
        length, kind = struct.unpack_from("HH", message, at)
        found[kind] = message[at + 4 : at + length]
        at += max((length + 3) & ~3, 4)
    return Link(
        index=index,
        name=found.get(IFLA_IFNAME, b"").rstrip(b"\0").decode(),
        alias=found.get(IFLA_IFALIAS, b"").rstrip(b"\0").decode(errors="replace"),
        mac=found.get(IFLA_ADDRESS, b"").hex(":"),
        mtu=int.from_bytes(found.get(IFLA_MTU, b""), "little"),
        master=int.from_bytes(found.get(IFLA_MASTER, b""), "little"),
    )


@functools.lru_cache(maxsize=256)
def _link_query(name: str) -> bytes:
    return encode(ifinfmsg, RTM_GETLINK, 0, {}, [("IFLA_IFNAME", name), _SKIP_STATISTICS])


def encode(type_: type, kind: int, flags: int, fields: dict[str, Any], attrs: Attributes) -> bytes:
    message = type_()
    message.update(fields)
    message["attrs"] = attrs
    message["header"] = {"type": kind, "flags": NLM_F_REQUEST | NLM_F_ACK | flags, "sequence_number": 0, "pid": 0}
    message.encode()
    return bytes(message.data)


def encode_neighbour(
    kind: int, flags: int, family: int, index: int, attributes_: bytes, *, state: int = NUD_PERMANENT, marks: int = 0
) -> bytes:
    """Return a message about a neighbour, or a forwarding entry; `marks` are NTF_ flags."""
    body = struct.pack("=BxxxiHBB", family, index, state, marks, 0) + attributes_
    return _HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | NLM_F_ACK | flags, 0, 0) + body
