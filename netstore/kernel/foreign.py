"""Forward chains of others that drop by default (Docker's, ufw's), and whether they let our networks through.

A packet that any base chain drops is dropped, so theirs cut our networks from the outside and, with br_netfilter on,
even from themselves. Their tables are theirs: we look, and change only DOCKER-USER, which Docker leaves to the
administrator, and only when the administrator says so (`[firewall] docker-user`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from netstore.kernel.nftables import Nftables
from netstore.model import BRIDGE_PREFIX

__all__ = ["DOCKER_USER", "Blocked", "Foreign"]

DOCKER_USER = "DOCKER-USER"
_DIRECTIONS = ("iifname", "oifname")


@dataclass(frozen=True, slots=True)
class Blocked:
    """A base chain that drops by default; `place` is the chain where rules for us belong, and `missing` those rules."""

    chain: str
    place: str
    missing: tuple[str, ...]

    @property
    def commands(self) -> list[str]:
        """What nft would be told to let our networks through."""
        return [f"insert rule {self.place} {rule}" for rule in self.missing]


class Foreign:
    """The forward hook's chains of others. Blocking."""

    def __init__(self) -> None:
        self._nft = Nftables()

    def blocked(self, interfaces: Collection[str], *, ipv6: bool) -> list[Blocked]:
        """Return the chains that would drop what bridges of ours forward; those named as ours are one pattern."""
        patterns = sorted({f"{BRIDGE_PREFIX}*", *(name for name in interfaces if not name.startswith(BRIDGE_PREFIX))})
        chains = [each["chain"] for each in self._nft.json("list chains") or () if "chain" in each]
        there = {f"{each['family']} {each['table']} {each['name']}" for each in chains}
        found = []
        for each in chains:
            table = f"{each['family']} {each['table']}"
            if each.get("hook") != "forward" or each.get("policy") != "drop" or each["table"] == "netstore":
                continue
            if each["family"] not in ("ip", "inet", *(["ip6"] if ipv6 else [])):
                continue
            chain, user = f"{table} {each['name']}", f"{table} {DOCKER_USER}"
            place = user if user in there else chain
            accepted = self._accepted(place)
            wanted = [f'{way} "{name}"' for name in patterns for way in _DIRECTIONS]
            missing = tuple(f'{match} accept comment "netstore"' for match in wanted if match not in accepted)
            if missing:
                found.append(Blocked(chain, place, missing))
        return found

    def admit(self, blocked: Blocked) -> None:
        """Insert the rules that are missing.

        Raises:
            KernelError: the kernel refused; none is there.
        """
        self._nft.run(blocked.commands, doing=f"admitting our networks in {blocked.place}")

    def _accepted(self, chain: str) -> set[str]:
        """Return the interfaces that a chain accepts whatever else a packet is: {'iifname "nsbr-*"', …}."""
        found = set()
        for each in self._nft.json(f"list chain {chain}") or ():
            terms: list[dict[str, Any]] = [
                term for term in each.get("rule", {}).get("expr", ()) if "counter" not in term
            ]
            if len(terms) == 2 and "match" in terms[0] and "accept" in terms[1]:
                match = terms[0]["match"]
                if match["op"] == "==" and isinstance(match["left"], dict):
                    found.add(f'{match["left"].get("meta", {}).get("key")} "{match["right"]}"')
        return found
