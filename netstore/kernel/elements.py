"""Elements of plain nftables sets and maps, written as nfnetlink messages (linux/netfilter/nf_tables.h).

Every attach and every published port changes some. libnftables reads the ruleset's sets anew, parses and serialises for
each command [0.25 ms]; the messages alone are [0.04 ms]. What is not plain (intervals) is left to it. Kernel constants
keep their C names.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence

from netstore.kernel.attributes import NETLINK_NETFILTER, attribute, be32, message, nested, text, transact

__all__ = ["NFT_MSG_DELSETELEM", "NFT_MSG_NEWSETELEM", "PlainElements"]

NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM = 10, 12, 14
NLM_F_REQUEST, NLM_F_ACK, NLM_F_CREATE = 0x1, 0x4, 0x400
NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_ELEMENTS = 1, 2, 3
NFTA_LIST_ELEM, NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_DATA, NFTA_DATA_VALUE, NFTA_DATA_VERDICT = 1, 1, 2, 1, 2
NFTA_VERDICT_CODE, NFTA_VERDICT_CHAIN, NFT_JUMP = 1, 2, -3
_FAMILIES = {"inet": 1, "bridge": 7}  # NFPROTO_*
_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": socket.IPPROTO_SCTP}
_MOST = 128  # elements at once: their acknowledgements fit the default receive buffer
_PLAIN = re.compile(r"type ([^;:]+?)(?: : ([^;:]+))?;")

_ENCODERS: dict[str, Callable[[str], bytes]] = {
    "ifname": lambda value: value.encode().ljust(16, b"\0"),
    "ether_addr": lambda value: bytes.fromhex(value.replace(":", "")),
    "ipv4_addr": lambda value: socket.inet_pton(socket.AF_INET, value),
    "ipv6_addr": lambda value: socket.inet_pton(socket.AF_INET6, value),
    "inet_proto": lambda value: bytes([_PROTOCOLS[value]]),
    "inet_service": lambda value: struct.pack("!H", int(value)),
    "mark": lambda value: struct.pack("=I", int(value)),
}
_VERDICT = ("verdict",)  # "jump CHAIN"
_Types = tuple[Sequence[str], Sequence[str]]


class PlainElements:
    """The plain sets and maps of some tables of the namespace in which it was made. Safe for several threads."""

    def __init__(self, tables: Mapping[str, Mapping[str, str]]) -> None:
        """Take, by table ("inet netstore"), the body of each set or map as nft writes it ("type ifname;")."""
        self._sets: dict[str, tuple[str, _Types]] = {
            name: (table, types)
            for table, sets in tables.items()
            for name, body in sets.items()
            if (types := _types(body)) is not None
        }
        self._policed: dict[str, tuple[str, _Types]] = {}
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._lock = threading.Lock()

    def also(self, sets: Mapping[str, tuple[str, str]]) -> None:
        """Take sets that come and go, by name: table and body. Those that were given before are no more."""
        self._policed = {name: (table, types) for name, (table, body) in sets.items() if (types := _types(body))}

    def change(self, *changes: tuple[int, Sequence[tuple[str, str]]]) -> bool:
        """Add or remove elements, in order and in one transaction; False, and nothing changed, when that is for
        libnftables to do.
        """
        policed = self._policed
        elements = [(kind, name, element) for kind, those in changes for name, element in those]
        if len(elements) > _MOST or any(name not in self._sets and name not in policed for _, name, _ in elements):
            return False
        messages = [_message(kind, name, text, self._sets.get(name) or policed[name]) for kind, name, text in elements]
        with self._lock:
            return not messages or transact(self._socket, messages) == 0


def _message(kind: int, name: str, element: str, found: tuple[str, _Types]) -> bytes:
    table, (key_types, data_types) = found
    family, _, table_name = table.partition(" ")
    key, _, data = element.partition(" : ")
    body = nested(NFTA_SET_ELEM_KEY, attribute(NFTA_DATA_VALUE, _encode(key_types, key)))
    if data_types and kind == NFT_MSG_NEWSETELEM:
        body += nested(NFTA_SET_ELEM_DATA, _data(data_types, data))
    body = (
        text(NFTA_SET_ELEM_LIST_TABLE, table_name.encode())
        + text(NFTA_SET_ELEM_LIST_SET, name.encode())
        + nested(NFTA_SET_ELEM_LIST_ELEMENTS, nested(NFTA_LIST_ELEM, body))
    )
    flags = NLM_F_REQUEST | NLM_F_ACK | (NLM_F_CREATE if kind == NFT_MSG_NEWSETELEM else 0)
    return message(NFNL_SUBSYS_NFTABLES << 8 | kind, flags, body, family=_FAMILIES[family])


def _data(types: Sequence[str], value: str) -> bytes:
    if types != _VERDICT:
        return attribute(NFTA_DATA_VALUE, _encode(types, value))
    chain = value.removeprefix("jump ").encode()
    return nested(NFTA_DATA_VERDICT, be32(NFTA_VERDICT_CODE, NFT_JUMP) + text(NFTA_VERDICT_CHAIN, chain))


def _types(body: str) -> _Types | None:
    """Return the types of key and value, None when a set is not plain or holds what is not encoded here."""
    found = _PLAIN.fullmatch(body.strip())
    if found is None:
        return None
    key, data = (tuple(part.split(" . ")) if part else () for part in found.groups())
    known = set(key + (() if data == _VERDICT else data)) <= _ENCODERS.keys()
    return (key, data) if known else None


def _encode(types: Sequence[str], value: str) -> bytes:
    """Return a value as the kernel keeps it: the parts of a concatenation each fill 32-bit registers."""
    if len(types) == 1:
        return _ENCODERS[types[0]](value)
    return b"".join(_padded(_ENCODERS[type_](part)) for type_, part in zip(types, value.split(" . "), strict=True))


def _padded(value: bytes) -> bytes:
    return value + b"\0" * (-len(value) % 4)
