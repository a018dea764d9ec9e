"""Connection tracking (linux/netfilter/nfnetlink_conntrack.h): forgetting the flows of a published port.

A UDP flow that began before its port was published, or outlives it, is never looked up in the NAT maps again: without
this a client that keeps its source port is not served, or keeps talking to nobody. The kernel filters (Linux 5.8), so
that only the flows of that port are read, however many there are. Kernel constants keep their C names.
"""

from __future__ import annotations

import errno
import socket
import struct

from netstore.errors import KernelError
from netstore.kernel.attributes import NETLINK_NETFILTER, attribute, attributes, message, messages, nested

__all__ = ["forget_flows"]

NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE = 1, 1, 2
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
CTA_TUPLE_ORIG, CTA_ID, CTA_FILTER, CTA_FILTER_ORIG_FLAGS = 1, 12, 25, 1
CTA_TUPLE_PROTO, CTA_PROTO_NUM, CTA_PROTO_DST_PORT = 2, 1, 3
CTA_FILTER_F_CTA_PROTO_NUM, CTA_FILTER_F_CTA_PROTO_DST_PORT = 1 << 3, 1 << 5


def forget_flows(protocol: int, port: int) -> int:
    """Forget the flows to a port of this host, of both families; returns how many there were.

    `protocol` is the IP protocol number.

    Raises:
        KernelError: the kernel refused.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER) as connection:
        return sum(_forget(connection, family, protocol, port) for family in (socket.AF_INET, socket.AF_INET6))


def _forget(connection: socket.socket, family: int, protocol: int, port: int) -> int:
    flags = CTA_FILTER_F_CTA_PROTO_NUM | CTA_FILTER_F_CTA_PROTO_DST_PORT
    wanted = attribute(CTA_PROTO_NUM, bytes([protocol])) + attribute(CTA_PROTO_DST_PORT, struct.pack("!H", port))
    body = nested(CTA_TUPLE_ORIG, nested(CTA_TUPLE_PROTO, wanted))
    body += nested(CTA_FILTER, attribute(CTA_FILTER_ORIG_FLAGS, struct.pack("=I", flags)))
    found = _ask(connection, IPCTNL_MSG_CT_GET, NLM_F_DUMP, body, family)
    for flow in found:
        parts = attributes(flow, 20)
        _ask(connection, IPCTNL_MSG_CT_DELETE, NLM_F_ACK, parts[CTA_TUPLE_ORIG] + parts.get(CTA_ID, b""), family)
    return len(found)


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
