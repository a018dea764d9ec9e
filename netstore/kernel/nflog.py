"""What nftables logs to a group, as it comes (linux/netfilter/nfnetlink_log.h). Kernel constants keep their C names."""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass
from ipaddress import ip_address

from netstore.errors import KernelError
from netstore.kernel.attributes import NETLINK_NETFILTER, attribute, attributes, be32, message, messages

__all__ = ["LoggedPacket", "listen", "parse"]

NFNL_SUBSYS_ULOG, NFULNL_MSG_PACKET, NFULNL_MSG_CONFIG = 4, 0, 1
NFULA_CFG_CMD, NFULA_CFG_MODE, NFULA_CFG_TIMEOUT, NFULA_CFG_QTHRESH = 1, 2, 4, 5
NFULNL_CFG_CMD_BIND, NFULNL_COPY_PACKET = 1, 2
NFULA_PAYLOAD, NFULA_PREFIX = 9, 10
NLM_F_REQUEST, NLM_F_ACK = 0x1, 0x4
NLMSG_ERROR = 2
IPV6_EXTENSIONS = {0, 43, 60}  # hop-by-hop, routing, destination options (RFC 8200, section 4)
IPV6_FRAGMENT = 44

_NAMES = {
    socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp", socket.IPPROTO_SCTP: "sctp", socket.IPPROTO_ICMP: "icmp",
    socket.IPPROTO_ICMPV6: "icmp",
}  # fmt: skip
_PORTED = (socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_SCTP)
_BUFFER = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedPacket:
    """One packet: the prefix of the rule that logged it, who sent it to whom; ports are 0 where it has none."""

    prefix: str
    source: str
    destination: str
    protocol: str
    source_port: int = 0
    destination_port: int = 0


def listen(group: int, copied_bytes: int) -> socket.socket:
    """Listen to a group of the namespace that the thread is in; the socket does not block.

    Raises:
        KernelError: this kernel has no nfnetlink_log (EOPNOTSUPP, EINVAL), or somebody else listens (EBUSY).
    """
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        opened.settimeout(1)
        _configure(opened, group, attribute(NFULA_CFG_CMD, bytes([NFULNL_CFG_CMD_BIND])))
        _configure(opened, group, attribute(NFULA_CFG_MODE, struct.pack("!IBx", copied_bytes, NFULNL_COPY_PACKET)))
        # Every packet at once: they are few, and somebody waits for them.
        _configure(opened, group, be32(NFULA_CFG_TIMEOUT, 1) + be32(NFULA_CFG_QTHRESH, 1))
        opened.setblocking(False)
    except BaseException:
        opened.close()
        raise
    return opened


def _configure(opened: socket.socket, group: int, body: bytes) -> None:
    kind = NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_CONFIG
    opened.send(message(kind, NLM_F_REQUEST | NLM_F_ACK, body, family=socket.AF_UNSPEC, resource=group))
    try:
        answer = opened.recv(4096)
    except OSError as error:
        raise KernelError(error.errno or errno.ETIMEDOUT, "listening to nfnetlink_log group", str(group)) from error
    for received, data in messages(answer):
        code = -struct.unpack_from("=i", data, 16)[0] if received == NLMSG_ERROR else 0
        if code:
            raise KernelError(code, "listening to nfnetlink_log group", str(group))


def parse(data: bytes) -> list[LoggedPacket]:
    """Return the packets of IP among what was received."""
    found = []
    for kind, body in messages(data):
        if kind != NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_PACKET:
            continue
        parts = attributes(body, 20)
        prefix = os.fsdecode(_payload(parts.get(NFULA_PREFIX, b"")).rstrip(b"\0"))
        packet = _packet(prefix, _payload(parts.get(NFULA_PAYLOAD, b"")))
        if packet:
            found.append(packet)
    return found


def _payload(part: bytes) -> bytes:
    return part[4 : struct.unpack_from("=H", part)[0]] if part else b""


def _packet(prefix: str, data: bytes) -> LoggedPacket | None:
    version = data[0] >> 4 if data else 0
    if version == 4 and len(data) >= 20:
        source, destination, number = data[12:16], data[16:20], data[9]
        at = (data[0] & 0xF) * 4 if not int.from_bytes(data[6:8], "big") & 0x1FFF else len(data)  # a further fragment
    elif version == 6 and len(data) >= 40:
        source, destination = data[8:24], data[24:40]
        number, at = _upper(data)
    else:
        return None
    ports = struct.unpack_from("!HH", data, at) if number in _PORTED and at + 4 <= len(data) else (0, 0)
    return LoggedPacket(
        prefix=prefix, source=str(ip_address(source)), destination=str(ip_address(destination)),
        protocol=_NAMES.get(number, str(number)), source_port=ports[0], destination_port=ports[1],
    )  # fmt: skip


def _upper(data: bytes) -> tuple[int, int]:
    """Return the protocol above IPv6's extension headers, and where it begins."""
    number, at = data[6], 40
    while at + 8 <= len(data):
        if number in IPV6_EXTENSIONS:
            number, at = data[at], at + (data[at + 1] + 1) * 8
        elif number == IPV6_FRAGMENT:
            further = int.from_bytes(data[at + 2 : at + 4], "big") & 0xFFF8
            number, at = data[at], len(data) if further else at + 8
        else:
            break
    return number, at
