"""Answers to questions of sandboxes, from what the store holds.

Encoded answers are kept by the question's bytes until the store changes, so that most cost a look-up.
"""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv6Address

from dnslib import AAAA, PTR, QTYPE, RR, SRV, A, DNSLabel

from netstore.resolver.names import PODMAN_DOMAIN, Names, Service, View
from netstore.resolver.wire import (
    NXDOMAIN,
    TTL_SECONDS,
    Question,
    Unanswerable,
    encode,
    parse,
    refusal,
    start_of_authority,
)

__all__ = ["Answers", "Forward"]

_MAX_CACHED_BYTES = 8 << 20
_MAX_ROTATIONS = 16
_ENTRY_BYTES = 400  # what an entry costs besides its bytes


class Forward(Exception):
    """The question is not ours: ask `servers`; [] means the host's."""

    def __init__(self, servers: list[str]) -> None:
        self.servers = servers


class Answers:
    """Answers questions of any sandbox; raises `Forward` for what it does not know."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._version = -2
        self._cache: dict[tuple[str, bytes], list[bytes]] = {}
        self._cached_bytes = 0
        self._views: dict[str, View] = {}

    def answer(self, sandbox_id: str, data: bytes, *, tcp: bool) -> bytes | None:
        """Return the bytes that answer a question; None for what deserves no answer.

        Raises:
            Forward: the question is for an upstream.
        """
        self._refresh()
        key = (sandbox_id, data[2:] + bytes([tcp]))
        ready = self._cache.get(key)
        if ready is None:
            try:
                ready = self._make(sandbox_id, data, parse(data), tcp=tcp)
            except Unanswerable as error:
                return refusal(data, error.code)
            self._keep(key, ready)
        return data[:2] + random.choice(ready)[2:]

    def forget(self) -> None:
        """Forget everything, and open the database anew."""
        self._names.close()
        self._version = -2

    def _keep(self, key: tuple[str, bytes], ready: list[bytes]) -> None:
        self._cached_bytes += len(key[1]) + sum(map(len, ready)) + _ENTRY_BYTES
        if self._cached_bytes > _MAX_CACHED_BYTES:
            self._cache.clear()
            self._cached_bytes = 0
        self._cache[key] = ready

    def _refresh(self) -> None:
        version = self._names.version()
        if version != self._version:
            self._version = version
            self._cache.clear()
            self._cached_bytes = 0
            self._views.clear()

    def _view(self, sandbox_id: str) -> View:
        if sandbox_id not in self._views:
            self._views[sandbox_id] = self._names.view(sandbox_id)
        return self._views[sandbox_id]

    def _make(self, sandbox_id: str, data: bytes, question: Question, *, tcp: bool) -> list[bytes]:
        """Return encodings of the answer, in several orders where it has several records (round robin)."""
        view = self._view(sandbox_id)
        found = self._resources(view, question)
        if found is None:
            _forward(view, question)
        if not found:
            code = NXDOMAIN if found is None else 0
            return [encode(data, question, code=code, authority=[start_of_authority()], tcp=tcp)]
        ready = []
        shuffled = random.sample(found, len(found))
        for first in range(min(len(found), _MAX_ROTATIONS)):  # each leads as often as the others
            chosen = shuffled[first:] + shuffled[:first]
            answers = [answer for answer, _ in chosen]
            ready.append(encode(data, question, answers, additional=_distinct(chosen), tcp=tcp))
        return ready

    def _resources(self, view: View, question: Question) -> list[tuple[RR, list[RR]]] | None:
        """Return the records that answer, each with what helps to use it; None when the name is not ours."""
        name = DNSLabel(list(question.labels))
        reverse = _reversed_address(question.name)
        if reverse:
            owner = self._names.name_of(view, reverse.packed)
            if question.kind not in ("PTR", "ANY"):
                return [] if owner else None
            return [(RR(name, QTYPE.PTR, ttl=TTL_SECONDS, rdata=PTR(owner)), [])] if owner else None
        labels = question.name.split(".", 2)
        if len(labels) == 3 and labels[0][:1] == labels[1][:1] == "_":
            services = self._names.services(view, labels[0][1:], labels[1][1:], labels[2])
            if services is not None and question.kind not in ("SRV", "ANY"):
                services = []
            return None if services is None else [_service(name, each) for each in services]
        addresses = self._names.addresses(view, question.name)
        if addresses is None:
            return None
        wanted = [each for each in addresses if question.kind in ("ANY", "AAAA" if ":" in each else "A")]
        return [(_address(name, each), []) for each in wanted]


def _forward(view: View, question: Question) -> None:
    """Raise `Forward` where there is somebody else to ask.

    There is not behind internal networks alone, nor about podman's domain and addresses of the sandbox's own networks.
    """
    if question.name.endswith(PODMAN_DOMAIN):
        return
    servers = view.servers_for(question.name)
    reverse = _reversed_address(question.name)
    if (servers or view.forwards) and not (reverse and view.holds(reverse)):
        raise Forward(servers)


def _service(name: DNSLabel, service: Service) -> tuple[RR, list[RR]]:
    record = SRV(priority=0, weight=0, port=service.port, target=service.target)
    answer = RR(name, QTYPE.SRV, ttl=TTL_SECONDS, rdata=record)
    return answer, [_address(service.target, each) for each in service.addresses]


def _address(name: str | DNSLabel, address: str) -> RR:
    if ":" in address:
        return RR(name, QTYPE.AAAA, ttl=TTL_SECONDS, rdata=AAAA(address))
    return RR(name, QTYPE.A, ttl=TTL_SECONDS, rdata=A(address))


def _distinct(chosen: list[tuple[RR, list[RR]]]) -> list[RR]:
    """Return what helps to use the answers, each once."""
    return list({(str(each.rname), str(each.rdata)): each for _, helpful in chosen for each in helpful}.values())


def _reversed_address(name: str) -> IPv4Address | IPv6Address | None:
    """Return the address that a name under in-addr.arpa or ip6.arpa stands for, None for another name."""
    labels = name.split(".")[-3::-1]
    try:
        if name.endswith(".in-addr.arpa"):
            return IPv4Address(".".join(labels))
        if name.endswith(".ip6.arpa") and len(labels) == 32:
            return IPv6Address(bytes.fromhex("".join(labels)))
    except ValueError:
        pass
    return None
