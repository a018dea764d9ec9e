"""Netfilter's netlink messages by hand: attributes (struct nlattr), and messages with a netfilter header (nfgenmsg)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

__all__ = ["NETLINK_NETFILTER", "attribute", "attributes", "be32", "message", "messages", "nested", "text"]

NETLINK_NETFILTER = 12
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
