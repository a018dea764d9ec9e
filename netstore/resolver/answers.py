"""Answers to questions of sandboxes (RFC 1035), from what the store holds; dnslib encodes.

Encoded answers are kept by the question's bytes until the store changes, so that most cost a look-up.
"""

from __future__ import annotations

import random
import socket

from dnslib import AAAA, EDNS0, PTR, QTYPE, RCODE, RR, A, DNSError, DNSRecord

from netstore.resolver.names import Names, View

__all__ = ["Answers", "Forward", "refusal"]

TTL_SECONDS = 1
"""Low: an address may be somebody else's soon (Docker's 600 s is a complaint)."""

_MAX_CACHED = 10_000
_ROTATIONS = 4
_UDP_BYTES = 512
_EDNS_BYTES = 1232  # fits every path (dnsflagday.net)
_HEADER_BYTES = 12


class Forward(Exception):
    """The question is not ours: ask upstream."""


class Answers:
    """Answers questions of any sandbox; raises `Forward` for what it does not know."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._version = -2
        self._cache: dict[tuple[str, bytes], list[bytes]] = {}
        self._views: dict[str, View] = {}

    def answer(self, sandbox_id: str, question: bytes, *, tcp: bool) -> bytes | None:
        """Return the answer's bytes; None for what deserves none.

        Raises:
            Forward: the question is for an upstream.
        """
        if len(question) < _HEADER_BYTES or question[2] & 0x80:  # too short, or an answer itself
            return None
        self._refresh()
        key = (sandbox_id, question[2:] + bytes([tcp]))
        ready = self._cache.get(key)
        if ready is None:
            ready = self._make(sandbox_id, question, tcp=tcp)
            if len(self._cache) >= _MAX_CACHED:
                self._cache.clear()
            self._cache[key] = ready
        return question[:2] + random.choice(ready)[2:]

    def may_forward(self, sandbox_id: str) -> bool:
        """Say whether a sandbox may ask outside: one that has only internal networks may not."""
        self._refresh()
        return self._view(sandbox_id).forwards

    def servers(self, sandbox_id: str, question: bytes) -> list[str]:
        """Return the name servers that a sandbox or its networks were given for a question; [] means the host's."""
        view = self._view(sandbox_id)
        if not view.servers:
            return []
        try:
            return view.servers_for(str(DNSRecord.parse(question).q.qname).rstrip(".").lower())
        except (DNSError, UnicodeDecodeError, ValueError, IndexError):
            return []

    def _refresh(self) -> None:
        version = self._names.version()
        if version != self._version:
            self._version = version
            self._cache.clear()
            self._views.clear()

    def _view(self, sandbox_id: str) -> View:
        if sandbox_id not in self._views:
            self._views[sandbox_id] = self._names.view(sandbox_id)
        return self._views[sandbox_id]

    def _make(self, sandbox_id: str, question: bytes, *, tcp: bool) -> list[bytes]:
        try:
            record = DNSRecord.parse(question)
            name = str(record.q.qname).rstrip(".").lower()
            kind = QTYPE.get(record.q.qtype)
        except (DNSError, UnicodeDecodeError, ValueError, IndexError):
            return [question[:2] + bytes([0x80, RCODE.FORMERR]) + bytes(8)]
        view = self._view(sandbox_id)
        if kind == "PTR":
            resources = [self._reverse(view, name)]
            return [_encode(record, resources, tcp=tcp)]
        addresses = self._names.addresses(view, name)
        if addresses is None:
            raise Forward
        wanted = [address for address in addresses if kind in ("ANY", "AAAA" if ":" in address else "A")]
        if not wanted:  # known, but nothing of that type: not for an upstream either
            return [_encode(record, [], tcp=tcp)]
        ready = []
        for _ in range(_ROTATIONS if len(wanted) > 1 else 1):
            resources = [_address(record, address) for address in random.sample(wanted, len(wanted))]
            ready.append(_encode(record, resources, tcp=tcp))
        return ready

    def _reverse(self, view: View, name: str) -> RR:
        packed = _reversed_address(name)
        owner = self._names.name_of(view, packed) if packed else ""
        if not owner:
            raise Forward
        return RR(f"{name}.", QTYPE.PTR, ttl=TTL_SECONDS, rdata=PTR(f"{owner}."))


def _address(record: DNSRecord, address: str) -> RR:
    if ":" in address:
        return RR(record.q.qname, QTYPE.AAAA, ttl=TTL_SECONDS, rdata=AAAA(address))
    return RR(record.q.qname, QTYPE.A, ttl=TTL_SECONDS, rdata=A(address))


def _reversed_address(name: str) -> bytes:
    """Return the packed address that a name under in-addr.arpa or ip6.arpa stands for, b"" for another name."""
    labels = name.split(".")[-3::-1]
    try:
        if name.endswith(".in-addr.arpa") and len(labels) == 4:
            return socket.inet_aton(".".join(labels))
        if name.endswith(".ip6.arpa") and len(labels) == 32:
            return bytes.fromhex("".join(labels))
    except (OSError, ValueError):
        pass
    return b""


def _encode(record: DNSRecord, resources: list[RR], *, tcp: bool) -> bytes:
    reply = record.reply(ra=1, aa=1)
    for resource in resources:
        reply.add_answer(resource)
    if any(each.rtype == QTYPE.OPT for each in record.ar):  # RFC 6891, section 6.1.1: an answer to EDNS has it too
        reply.add_ar(EDNS0(udp_len=_EDNS_BYTES))
    data = bytes(reply.pack())
    advertised = next((int(each.rclass) for each in record.ar if each.rtype == QTYPE.OPT), _UDP_BYTES)
    if not tcp and len(data) > max(advertised, _UDP_BYTES):
        data = bytes(reply.truncate().pack())
    return data


def refusal(question: bytes, code: int) -> bytes:
    """Return an answer that is only a response code, with the question's id and flags."""
    flags = bytes([question[2] & 0x79 | 0x80, 0x80 | code])
    return question[:2] + flags + question[4:6] + bytes(6) + _question_section(question)


def _question_section(question: bytes) -> bytes:
    end = _HEADER_BYTES
    while end < len(question) and question[end]:
        end += question[end] + 1
    return question[_HEADER_BYTES : end + 5]
