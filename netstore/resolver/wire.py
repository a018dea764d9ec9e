"""Questions and answers on the wire (RFC 1035, RFC 6891): questions by a strict parser of ours, answers by dnslib.

Containers are hostile, and share one resolver: only what a question needs is read (the header, one question, an OPT
record right behind it), so that no packet costs more than its own length; compression in a question is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from dnslib import CLASS, EDNS0, QTYPE, RR, SOA, DNSHeader, DNSLabel, DNSQuestion, DNSRecord

__all__ = ["FORMERR", "NXDOMAIN", "REFUSED", "SERVFAIL", "TTL_SECONDS", "Question", "Unanswerable", "encode", "parse",
           "refusal", "start_of_authority"]  # fmt: skip

TTL_SECONDS = 1
"""Low: an address may be somebody else's soon (Docker's 600 s is a complaint)."""

FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 1, 2, 3, 4, 5
_BADVERS = 16
_UDP_BYTES = 512
_MAX_UDP_BYTES = 4096
_EDNS_BYTES = 1232  # what we take ourselves: fits every path (dnsflagday.net)
_HEADER = struct.Struct("!6H")
_OPT = struct.Struct("!BHHBBHH")  # root name, type, size, high bits of the code, version, flags, length
_QR, _OPCODE, _RD = 0x8000, 0x7800, 0x0100
_MAX_NAME_BYTES = 255


class Unanswerable(Exception):
    """The question gets only a response code, or nothing at all (code -1)."""

    def __init__(self, code: int) -> None:
        self.code = code


@dataclass(frozen=True, slots=True)
class Question:
    """One question. `name` is in lower case without the last dot, `labels` as asked (0x20 casing is kept).

    `size` is how many bytes of UDP the asker takes; `edns` says whether it sent an OPT record.
    """

    labels: tuple[bytes, ...]
    name: str
    kind: str
    number: int
    class_: int
    recursion: bool
    edns: bool
    size: int


def parse(data: bytes) -> Question:
    """Read a question.

    Raises:
        Unanswerable: it is none that we answer; `code` says what to reply.
    """
    if len(data) < _HEADER.size:
        raise Unanswerable(-1)
    _, flags, questions, answers, authorities, _ = _HEADER.unpack_from(data)
    if flags & _QR:
        raise Unanswerable(-1)
    if flags & _OPCODE:
        raise Unanswerable(NOTIMP)
    if questions != 1 or answers or authorities:  # RFC 9619: a query has one question
        raise Unanswerable(FORMERR)
    labels, at = _name(data)
    if len(data) < at + 4:
        raise Unanswerable(FORMERR)
    number, class_ = struct.unpack_from("!2H", data, at)
    if class_ not in (CLASS.IN, 255):
        raise Unanswerable(REFUSED)
    edns, size = _edns(data, at + 4)
    name = b".".join(labels).decode("latin-1").lower()
    return Question(labels, name, str(QTYPE.get(number)), number, class_, bool(flags & _RD), edns, size)


def _name(data: bytes) -> tuple[tuple[bytes, ...], int]:
    """Return the labels of the question's name and where it ends."""
    labels, at = list[bytes](), _HEADER.size
    while True:
        length = data[at] if at < len(data) else 64
        end = at + 1 + length
        if length > 63 or end > len(data) or end - _HEADER.size > _MAX_NAME_BYTES:
            raise Unanswerable(FORMERR)
        if not length:
            return tuple(labels), end
        labels.append(data[at + 1 : end])
        at = end


def _edns(data: bytes, at: int) -> tuple[bool, int]:
    if len(data) < at + _OPT.size:
        return False, _UDP_BYTES
    root, kind, size, _, version, _, _ = _OPT.unpack_from(data, at)
    if root or kind != QTYPE.OPT:
        return False, _UDP_BYTES
    if version:
        raise Unanswerable(_BADVERS)
    return True, min(max(size, _UDP_BYTES), _MAX_UDP_BYTES)


def start_of_authority() -> RR:
    """Return the SOA record that makes a negative answer one to be cached, and for how long (RFC 2308)."""
    record = SOA(mname="netstore.", rname="root.netstore.", times=(1, 60, 60, 60, TTL_SECONDS))
    return RR(".", QTYPE.SOA, ttl=TTL_SECONDS, rdata=record)


def encode(
    data: bytes, question: Question, answers: Sequence[RR] = (), *,
    code: int = 0, authority: Sequence[RR] = (), additional: Sequence[RR] = (), tcp: bool = False, ours: bool = True,
) -> bytes:  # fmt: skip
    """Return an answer to `question`, whose bytes were `data`; truncated (TC) where it does not fit the asker's UDP."""
    header = DNSHeader(id=int.from_bytes(data[:2], "big"), qr=1, aa=ours, ra=1, rd=question.recursion, rcode=code & 0xF)
    asked = DNSQuestion(DNSLabel(list(question.labels)), question.number, question.class_)
    optional = [EDNS0(udp_len=_EDNS_BYTES, ext_rcode=code >> 4)] if question.edns else []
    whole = DNSRecord(header, questions=[asked], rr=list(answers), auth=list(authority), ar=[*additional, *optional])
    packed = bytes(whole.pack())
    if tcp or len(packed) <= question.size:
        return packed
    if additional:
        return encode(data, question, answers, code=code, authority=authority, ours=ours)
    header.tc = 1
    return bytes(DNSRecord(header, questions=[asked], ar=optional).pack())


def refusal(data: bytes, code: int) -> bytes | None:
    """Return an answer that is only a response code; None for what deserves none."""
    try:
        question = parse(data)
    except Unanswerable as error:
        if error.code < 0:
            return None
        if error.code == _BADVERS:
            return data[:2] + bytes([0x80, 0, *bytes(7), 1]) + _OPT.pack(0, QTYPE.OPT, _EDNS_BYTES, 1, 0, 0, 0)
        return data[:2] + bytes([data[2] & 0x79 | 0x80, error.code]) + bytes(8)
    return encode(data, question, code=code, ours=False)
