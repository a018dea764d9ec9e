"""Connection tracking (linux/netfilter/nfnetlink_conntrack.h): forgetting flows when a port changes hands.

A flow is looked up in the NAT maps when it begins, never again: without this a UDP client that keeps its source port is
not served by a port published meanwhile, and whoever is connected to a port stays so when it is taken back. What is
forgotten begins anew: it finds its new place, or is told by a reset that there is none.

The kernel selects (CTA_FILTER), in one pass over its table [1 ms empty, 5 ms with 20,000 flows]. Before Linux 6.8 it
selects for reading only, which takes a lock a bucket [10 ms]: that is also the way for many ports at once. Kernel
constants keep their C names.

IPv6 addresses are compared here: the kernel's filter takes every one but the one asked for (Linux 5.8 to 6.18 at least,
`ctnetlink_filter_match_tuple` reads the result of `ipv6_addr_cmp` the wrong way round).
"""

from __future__ import annotations

import errno
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from netstore.errors import KernelError
from netstore.kernel.attributes import NETLINK_NETFILTER, attribute, attributes, be32, message, messages, nested
from netstore.model import Address, PortMapping, Protocol

__all__ = ["forget_address", "forget_published", "forget_strays", "forget_translated"]

NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE = 1, 1, 2
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_STATUS, CTA_ID, CTA_FILTER, CTA_STATUS_MASK = 1, 2, 3, 12, 25, 26
CTA_FILTER_ORIG_FLAGS, CTA_FILTER_REPLY_FLAGS = 1, 2
CTA_TUPLE_IP, CTA_TUPLE_PROTO, CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT = 1, 2, 1, 2, 3
CTA_IP_SRC = {socket.AF_INET: 1, socket.AF_INET6: 3}
CTA_FILTER_F_CTA_IP_SRC, CTA_FILTER_F_CTA_PROTO_NUM = 1, 1 << 3
CTA_FILTER_F_CTA_PROTO_SRC_PORT, CTA_FILTER_F_CTA_PROTO_DST_PORT = 1 << 4, 1 << 5
CTA_IP_SRC_V6 = struct.pack("=HH", 20, 3)  # as it is before an address
IPS_SRC_NAT, IPS_DST_NAT = 1 << 4, 1 << 5

_NUMBERS = {
    Protocol.TCP: socket.IPPROTO_TCP, Protocol.UDP: socket.IPPROTO_UDP, Protocol.SCTP: socket.IPPROTO_SCTP,
}  # fmt: skip
_PORT_FLAGS = {
    CTA_PROTO_SRC_PORT: CTA_FILTER_F_CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT: CTA_FILTER_F_CTA_PROTO_DST_PORT,
}  # fmt: skip
_HEADER = 20  # nlmsghdr and nfgenmsg
_FEW = 4  # ports for which a pass each costs less than reading what there is


_waiting: set[str] = set()
_reading = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flows:
    """Which flows: all conditions hold. `source` is who began them, `target` who answers, and from which port;
    `destination` whom they were sent to.
    """

    family: socket.AddressFamily
    source: str = ""
    target: str = ""
    destination: str = ""
    target_port: int = 0
    protocol: int = 0
    port: int = 0
    untranslated: bool = False

    @property
    def exact(self) -> bool:
        """Whether the kernel's filter alone selects them."""
        return not self.destination and (self.family == socket.AF_INET or not (self.source or self.target))

    def encoded(self) -> bytes:
        """Return the attributes of a request that filters."""
        told = self.family == socket.AF_INET
        orig = _tuple(self._source(self.source) if self.source and told else b"", self.protocol, self.port)
        reply = _tuple(self._source(self.target) if self.target and told else b"")
        if self.target_port:
            reply = _tuple(b"", self.protocol, self.target_port, key=CTA_PROTO_SRC_PORT)
        tuples = ((CTA_TUPLE_ORIG, CTA_FILTER_ORIG_FLAGS, orig), (CTA_TUPLE_REPLY, CTA_FILTER_REPLY_FLAGS, reply))
        body = b"".join(nested(kind, each) for kind, _, (each, _) in tuples if each)
        if self.untranslated:
            body += be32(CTA_STATUS, 0) + be32(CTA_STATUS_MASK, IPS_SRC_NAT | IPS_DST_NAT)
        flags = b"".join(attribute(kind, struct.pack("=I", each)) for _, kind, (_, each) in tuples if each)
        return body + (nested(CTA_FILTER, flags) if flags else b"")

    def _source(self, address: str) -> bytes:
        return attribute(CTA_IP_SRC[self.family], socket.inet_pton(self.family, address))

    def _destination(self) -> bytes:
        return attribute(CTA_IP_SRC[self.family] + 1, socket.inet_pton(self.family, self.destination))

    def has(self, parts: dict[int, bytes], ports: Collection[int]) -> bool:
        """Say whether a flow that the kernel selected is one, to one of the ports."""
        return (
            (not self.protocol or _port(parts[CTA_TUPLE_ORIG]) in ports)
            and (not self.source or self._source(self.source) in parts[CTA_TUPLE_ORIG])
            and (not self.target or self._source(self.target) in parts[CTA_TUPLE_REPLY])
            and (not self.destination or self._destination() in parts[CTA_TUPLE_ORIG])
        )


def forget_strays(ports: Iterable[PortMapping]) -> None:
    """Forget UDP flows to ports that are published now, which began before and so were not translated.

    Those of whose addresses any is translated are others'.

    Raises:
        KernelError: the kernel refused; as for the others here.
    """
    wanted = {n for port in ports if port.protocol is Protocol.UDP for n in _numbers(port.host_port, port)}
    for family in (socket.AF_INET, socket.AF_INET6) if wanted else ():
        _forget(_Flows(family=family, protocol=socket.IPPROTO_UDP, untranslated=True), wanted)


def forget_published(
    ports: Iterable[PortMapping], addresses: Collection[Address], *, direct: bool = False, relay_port: int = 0
) -> None:
    """Forget flows to ports that were published until now for these addresses; `direct` also those to the addresses.

    `relay_port` is where the relay of ::1 listens, 0 when there is none.
    """
    wanted: dict[tuple[Protocol, str], set[int]] = defaultdict(set)
    relayed: set[int] = set()
    for port in ports:
        for each in addresses:
            wanted[port.protocol, each.address].update(_numbers(port.host_port, port))
            wanted[port.protocol, each.address].update(_numbers(port.container_port, port) if direct else ())
        if port.protocol is Protocol.TCP and port.host_ip in ("", "::1"):
            relayed.update(_numbers(port.host_port, port))
    for (protocol, target), numbers in wanted.items():
        _forget(_Flows(family=_family(target), protocol=_NUMBERS[protocol], target=target), numbers)
    if relay_port and relayed:
        _forget(_Flows(family=socket.AF_INET6, protocol=socket.IPPROTO_TCP, target_port=relay_port), relayed)


def forget_translated(destination: str, target: str) -> None:
    """Forget flows that were sent to one address, and that another answers."""
    _forget(_Flows(family=_family(target), target=target, destination=destination))


def forget_address(address: str) -> None:
    """Forget every flow that an address began or answers. Calls at the same time share the reading that IPv6 needs."""
    if _family(address) == socket.AF_INET:
        _forget(_Flows(family=socket.AF_INET, target=address))
        _forget(_Flows(family=socket.AF_INET, source=address))
        return
    _waiting.add(address)
    with _reading:
        if address in _waiting:  # else the call that read before us took it along
            addresses = [_waiting.pop() for _ in range(len(_waiting))]
            _forget_ipv6({CTA_IP_SRC_V6 + socket.inet_pton(socket.AF_INET6, each) for each in addresses})


def _forget_ipv6(sources: Collection[bytes]) -> None:
    """Forget flows in which one of the encoded source addresses is; one pass for all."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER) as connection:
        for flow in _ask(connection, IPCTNL_MSG_CT_GET, NLM_F_DUMP, b"", socket.AF_INET6):
            if any(source in flow for source in sources):
                parts = attributes(flow, _HEADER)
                one = parts[CTA_TUPLE_ORIG] + parts.get(CTA_ID, b"")
                _ask(connection, IPCTNL_MSG_CT_DELETE, NLM_F_ACK, one, socket.AF_INET6)


def _numbers(first: int, port: PortMapping) -> range:
    return range(first, first + port.count)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _forget(flows: _Flows, ports: Collection[int] = (0,)) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER) as connection:
        if flows.exact and len(ports) <= _FEW:
            try:
                for port in ports:
                    wanted = replace(flows, port=port)
                    _ask(connection, IPCTNL_MSG_CT_DELETE, NLM_F_ACK, wanted.encoded(), flows.family)
                return
            except KernelError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a kernel that cannot select here
                    raise
        if len(ports) == 1:
            flows = replace(flows, port=next(iter(ports)))
        address = flows.source or flows.target
        packed = socket.inet_pton(flows.family, address) if address else b""
        for flow in _ask(connection, IPCTNL_MSG_CT_GET, NLM_F_DUMP, flows.encoded(), flows.family):
            if packed not in flow:  # most are not: no need to look closer
                continue
            parts = attributes(flow, _HEADER)
            if flows.has(parts, ports):
                one = parts[CTA_TUPLE_ORIG] + parts.get(CTA_ID, b"")
                _ask(connection, IPCTNL_MSG_CT_DELETE, NLM_F_ACK, one, flows.family)


def _tuple(source: bytes, protocol: int = 0, port: int = 0, *, key: int = CTA_PROTO_DST_PORT) -> tuple[bytes, int]:
    """Return a flow's tuple as far as it is given, and the flags that say how far that is."""
    body, flags = b"", 0
    if source:
        body, flags = nested(CTA_TUPLE_IP, source), CTA_FILTER_F_CTA_IP_SRC
    if protocol:
        proto, flags = attribute(CTA_PROTO_NUM, bytes([protocol])), flags | CTA_FILTER_F_CTA_PROTO_NUM
        if port:
            proto, flags = proto + attribute(key, struct.pack("!H", port)), flags | _PORT_FLAGS[key]
        body += nested(CTA_TUPLE_PROTO, proto)
    return body, flags


def _port(tuple_: bytes) -> int:
    """Return the destination port of a flow's encoded tuple."""
    proto = attributes(attributes(tuple_, 4)[CTA_TUPLE_PROTO], 4)
    return int.from_bytes(proto[CTA_PROTO_DST_PORT][4:6], "big")


def _ask(connection: socket.socket, kind: int, flags: int, body: bytes, family: int) -> list[bytes]:
    """Send one request and return its answers, up to the acknowledgement or the end of the dump."""
    connection.send(message(NFNL_SUBSYS_CTNETLINK << 8 | kind, NLM_F_REQUEST | flags, body, family=family))
    found: list[bytes] = []
    while True:
        for received, answer in messages(connection.recv(1 << 16)):
            if received == NLMSG_DONE:
                return found
            if received == NLMSG_ERROR:
                code = -struct.unpack_from("=i", answer, 16)[0]
                if code not in (0, errno.ENOENT):  # it ended by itself meanwhile
                    raise KernelError(code, "forgetting flows", "of a published port")
                return found
            found.append(answer)
