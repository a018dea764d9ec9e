"""Netfilter's netlink messages by hand: attributes (struct nlattr), messages (nfgenmsg), transactions."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence

__all__ = ["NETLINK_NETFILTER", "attribute", "attributes", "be32", "message", "messages", "nested", "text", "transact"]

NETLINK_NETFILTER = 12
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END, NFNL_SUBSYS_NFTABLES, NLM_F_REQUEST = 0x10, 0x11, 10, 0x1
NLA_F_NESTED, NLA_TYPE_MASK = 0x8000, 0x3FFF


def attribute(kind: int, payload: bytes) -> bytes:
    """Return one attribute, padded."""
    return struct.pack("=HH", 4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def nested(kind: int, payload: bytes) -> bytes:
    """Return an attribute of attributes."""
    return attribute(kind | NLA_F_NESTED, payload)


def text(kind: int, value: bytes) -> bytes:
    """Return an attribute of a C string."""
    return attribute(kind, value + b"\0")


def be32(kind: int, value: int) -> bytes:
    """Return an attribute of a number in network order."""
    return attribute(kind, struct.pack("!i", value))


def message(kind: int, flags: int, body: bytes, *, family: int, resource: int = 0) -> bytes:
    """Return a message; `resource` is nfgenmsg's res_id. Its sequence number, at byte 8, is the sender's."""
    return struct.pack("=IHHIIBB", 20 + len(body), kind, flags, 0, 0, family, 0) + struct.pack("!H", resource) + body


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield kind and bytes of every message that was received."""
    at = 0
    while at + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        yield kind, data[at : at + length]
        at += max((length + 3) & ~3, 16)


def attributes(data: bytes, at: int) -> dict[int, bytes]:
    """Return the attributes from a position on: whole, with their headers, by kind."""
    found = {}
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        step = max((length + 3) & ~3, 4)
        found[kind & NLA_TYPE_MASK] = data[at : at + step]
        at += step
    return found


def transact(connection: socket.socket, batch: Sequence[bytes]) -> int:
    """Send nf_tables messages, each of which asks for an acknowledgement, as one transaction.

    Returns 0 when all was done, else the first errno; nothing was done then. The connection is one caller's at a time.
    """
    data = bytearray(message(NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, b"", family=0, resource=NFNL_SUBSYS_NFTABLES))
    for sequence, each in enumerate(batch, start=1):
        at = len(data)
        data += each
        struct.pack_into("I", data, at + 8, sequence)
    data += message(NFNL_MSG_BATCH_END, NLM_F_REQUEST, b"", family=0, resource=NFNL_SUBSYS_NFTABLES)
    connection.send(data)
    codes: list[int] = []
    while len(codes) < len(batch):  # the kernel queued every acknowledgement before send returned
        received = connection.recv(65536, socket.MSG_DONTWAIT)
        codes += [-struct.unpack_from("i", answer, 16)[0] for _, answer in messages(received)]
    return next((code for code in codes if code), 0)
