"""Policies as nftables: sets, chains and counters of a network, and the elements by which endpoints are in them.

A network is policed when it has a policy, or denies by default. Then it has chains in both tables, with rules for each
of its policies; an endpoint is one element that sends its frames there, and one for each selector of labels that it
matches (and each address). A network that is not policed costs nothing, nor do its endpoints.

- Table `bridge netstore` sees what endpoints of one network send each other, by their interfaces. Bridges have no
  connection tracking on every kernel, so who began is remembered in sets whose elements expire (`flows`, `talks`).
  TCP that is no more in them, after a flush, is taken as the middle of a flow: one way or the other must be allowed.
  Endpoints of other nodes are known by the tunnel and their addresses, which their own node lets nobody else use; their
  traffic is judged at both ends, by the same rules.
- Table `inet netstore` sees what is routed: to and from other machines and networks, through published ports, and to
  the node itself; by addresses, with connection tracking.

A reply is judged as what it replies to, packet by packet, so that what is no longer allowed ends at once. Denials come
first, then permissions, then the default.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import collapse_addresses, ip_network
from itertools import product
from typing import Any

from netstore.model import (
    TUNNEL_PREFIX,
    Endpoint,
    Network,
    Policy,
    PolicyAction,
    PolicyPort,
    RemoteEndpoint,
    Scope,
    Selector,
    kernel_name,
    stable_mac,
)

__all__ = [
    "BRIDGED",
    "LOGGED_BYTES",
    "LOG_GROUP",
    "LOG_PREFIX",
    "ROUTED",
    "Policing",
    "Skeleton",
    "counter_name",
    "selects",
    "table_of",
]

BRIDGED, ROUTED = "bridge netstore", "inet netstore"
LOG_GROUP = 28275
"""The nfnetlink_log group that dropped packets are sent to: "ns"."""
LOG_PREFIX = "netstore-"
LOGGED_BYTES = 128
"""How much of one goes there: its headers."""
_DIGITS = 16
_ALL_PORTS = (0, 65535)
_PORTED = "{ tcp, udp, sctp }"
_ICMP = "{ icmp, ipv6-icmp }"


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What one table has for one network: sets as (kind, body), chains of rules, counters."""

    sets: dict[str, tuple[str, str]]
    chains: dict[str, tuple[str, ...]]
    counters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Police:
    network: Network
    policies: tuple[Policy, ...]


@dataclass(frozen=True, slots=True)
class _Side:
    """One way to be a policy's source or destination: a match of the family ("" for both), SIDE and IF standing for
    saddr and iifname or daddr and oifname."""

    family: str
    match: str


class Policing:
    """What is policed on the node. Changed and read under `Firewall.steady`."""

    def __init__(self) -> None:
        self._policed: dict[str, _Police] = {}
        self.logs = True
        """Whether the kernel can log: a rule that logs is refused where it cannot."""

    def put(self, network: Network, policies: Iterable[Policy]) -> None:
        """Police a network by these policies, and by its default; stop when there is nothing to enforce."""
        kept = tuple(policies)
        if kept or PolicyAction.DENY in (network.spec.policy_ingress, network.spec.policy_egress):
            self._policed[network.id] = _Police(network, kept)
        else:
            self._policed.pop(network.id, None)

    def get(self, network_id: str) -> object:
        """Return how a network is policed, for `restore`."""
        return self._policed.get(network_id)

    def restore(self, network_id: str, police: Any = None) -> None:
        """Police a network as it was before, or, without `police`, no more."""
        if police is None:
            self._policed.pop(network_id, None)
        else:
            self._policed[network_id] = police

    def skeleton(self, network_id: str = "") -> dict[str, Skeleton]:
        """Return what every policed network, or one of them, has in each table."""
        wanted = [self._policed.get(network_id)] if network_id else list(self._policed.values())
        parts = [
            (table, _compile(each, table, logs=self.logs)) for table in (ROUTED, BRIDGED) for each in wanted if each
        ]
        return {
            table: Skeleton(
                {name: body for at, part in parts if at == table for name, body in part.sets.items()},
                {name: rules for at, part in parts if at == table for name, rules in part.chains.items()},
                tuple(name for at, part in parts if at == table for name in part.counters),
            )
            for table in (ROUTED, BRIDGED)
        }

    def network_elements(self, network: Network) -> list[tuple[str, str]]:
        """Return the element that sends what a network routes to its chains."""
        if network.id not in self._policed:
            return []
        return [("policed", f"{network.interface} : jump {_chain(network.id)}")]

    def endpoint_elements(self, network: Network, endpoint: Endpoint) -> list[tuple[str, str]]:
        """Return the elements by which an endpoint is policed: none on a network that is not."""
        police = self._policed.get(network.id)
        if police is None:
            return []
        found = [("members", f"{endpoint.host_interface} : jump {_chain(network.id)}")]
        for policy in police.policies:
            for side, selectors in (("from", policy.spec.sources), ("to", policy.spec.destinations)):
                if any(selects(selector, endpoint) for selector in selectors):
                    found.append((f"ends_{_short(policy.id)}_{side}", endpoint.host_interface))
                    found += _addressed(policy, side, [each.address for each in endpoint.every_address])
        return found

    def remote_elements(self, network: Network, endpoint: RemoteEndpoint) -> list[tuple[str, str]]:
        """Return the elements by which an endpoint of another node is known to the policies that select it."""
        police = self._policed.get(network.id)
        found: list[tuple[str, str]] = []
        tunnel = kernel_name(TUNNEL_PREFIX, network.id)
        for policy in police.policies if police else ():
            for side, selectors in (("from", policy.spec.sources), ("to", policy.spec.destinations)):
                if any(selects(selector, endpoint) for selector in selectors):
                    found += _addressed(policy, side, endpoint.addresses)
                    found += _addressed(policy, side, endpoint.addresses, tunnel)
        return found


def _addressed(policy: Policy, side: str, addresses: Iterable[str], tunnel: str = "") -> Iterator[tuple[str, str]]:
    kind, before = ("remote", f"{tunnel} . ") if tunnel else ("addrs", "")
    for address in addresses:
        yield f"{kind}_{_short(policy.id)}_{side}{'6' if ':' in address else ''}", f"{before}{address}"


def table_of(name: str) -> str | None:
    """Return the table of a set of ours, None for one that is not."""
    if name == "members" or name.startswith(("ends_", "remote_")):
        return BRIDGED
    return ROUTED if name == "policed" or name.startswith("addrs_") else None


def counter_name(resource_id: str) -> str:
    """Return the name of a policy's counter, or of what a network's default drops."""
    return f"c_{_short(resource_id)}"


def _short(resource_id: str) -> str:
    return resource_id[:_DIGITS]


def _chain(resource_id: str) -> str:
    return f"n_{_short(resource_id)}"


def selects(selector: Selector, endpoint: Endpoint | RemoteEndpoint) -> bool:
    """Say whether a selector means an endpoint by its labels."""
    for wanted in selector.labels:
        key, separator, value = wanted.partition("=")
        if key not in endpoint.labels or (separator and endpoint.labels[key] != value):
            return False
    return bool(selector.labels)


def _compile(police: _Police, table: str, *, logs: bool) -> Skeleton:
    network, policies = police.network, police.policies
    name = _chain(network.id)
    bridged = table == BRIDGED
    sets = {key: body for policy in policies for key, body in _sets(policy, network, bridged=bridged)}
    deniers = (network.id, *(policy.id for policy in policies if _denies(policy)))
    chains = {f"d_{_short(each)}": _dropping(each, logs=logs) for each in deniers}
    denied = [policy for policy in policies if _denies(policy)]
    allowed = [policy for policy in policies if not _denies(policy)]
    if bridged:
        chains |= _bridged_chains(name, network, denied, allowed)
    else:
        chains |= _routed_chains(name, network, denied, allowed)
    counters = tuple(counter_name(each) for each in (network.id, *(policy.id for policy in policies)))
    return Skeleton(sets, chains, counters)


def _denies(policy: Policy) -> bool:
    return policy.spec.action is PolicyAction.DENY


def _sets(policy: Policy, network: Network, *, bridged: bool) -> Iterator[tuple[str, tuple[str, str]]]:
    for side, selectors in (("from", policy.spec.sources), ("to", policy.spec.destinations)):
        if not any(selector.labels for selector in selectors):
            continue
        if bridged:
            yield f"ends_{_short(policy.id)}_{side}", ("set", "type ifname;")
            if network.scope is Scope.GLOBAL:
                yield f"remote_{_short(policy.id)}_{side}", ("set", "type ifname . ipv4_addr;")
                yield f"remote_{_short(policy.id)}_{side}6", ("set", "type ifname . ipv6_addr;")
        else:
            yield f"addrs_{_short(policy.id)}_{side}", ("set", "type ipv4_addr;")
            yield f"addrs_{_short(policy.id)}_{side}6", ("set", "type ipv6_addr;")


def _dropping(resource_id: str, *, logs: bool) -> tuple[str, ...]:
    """Drop, count, and tell netstored of some: a flood must not become a flood of messages."""
    drop = f"counter name {counter_name(resource_id)} drop"
    if not logs:
        return (drop,)
    logged = f'log prefix "{LOG_PREFIX}{_short(resource_id)}" group {LOG_GROUP} snaplen {LOGGED_BYTES}'
    return (f"limit rate 20/second burst 50 packets {logged}", drop)


def _routed_chains(
    name: str, network: Network, denied: list[Policy], allowed: list[Policy]
) -> dict[str, tuple[str, ...]]:
    bridge, drop = network.interface, f"goto d_{_short(network.id)}"

    def judge(*, reply: bool) -> tuple[str, ...]:
        rules: list[str] = []
        for policies, verdict in ((denied, ""), (allowed, "return")):
            for each in policies:
                rules += _rules(each, network, reply=reply, bridged=False, verdict=verdict)
        leaves, enters = ("oifname", "iifname") if reply else ("iifname", "oifname")
        if network.spec.policy_egress is PolicyAction.DENY:
            rules.append(f'{leaves} "{bridge}" {drop}')
        if network.spec.policy_ingress is PolicyAction.DENY:
            rules.append(f'{enters} "{bridge}" {drop}')
        return tuple(rules)

    first = (
        # Bridged all the same, and shown to us by br_netfilter: the other table judges it.
        f'iifname "{bridge}" oifname "{bridge}" ether daddr != {stable_mac(network.id)} return',
        "ct state related return",
        f"ct direction reply goto {name}_reply",
    )
    return {name: (*first, *judge(reply=False)), f"{name}_reply": judge(reply=True)}


def _bridged_chains(
    name: str, network: Network, denied: list[Policy], allowed: list[Policy]
) -> dict[str, tuple[str, ...]]:
    denies = PolicyAction.DENY in (network.spec.policy_egress, network.spec.policy_ingress)
    drop = f"goto d_{_short(network.id)}"

    def rules(policies: list[Policy], *, reply: bool, verdict: str = "", ports: bool = True) -> list[str]:
        return [
            rule
            for policy in policies
            for rule in _rules(policy, network, reply=reply, bridged=True, verdict=verdict, ports=ports)
        ]

    forward, backward = rules(denied, reply=False), rules(denied, reply=True)
    begun, replied = (
        rules(allowed, reply=False, verdict="goto remember"),
        rules(allowed, reply=True, verdict="goto refresh"),
    )
    pieces = rules(allowed, reply=False, verdict="accept", ports=False)
    pieces += rules(allowed, reply=True, verdict="accept", ports=False)
    flow, begun_flow = "PROTO daddr . PROTO saddr . meta l4proto", "PROTO saddr . PROTO daddr . meta l4proto"
    first = [f"tcp flags & (syn | ack) == syn goto {name}_new"]
    for proto, six in (("ip", ""), ("ip6", "6")):
        first.append(f"{flow} . th dport . th sport @flows{six} goto {name}_reply".replace("PROTO", proto))
    for proto, six in (("ip", ""), ("ip6", "6")):
        first.append(f"{begun_flow} . th sport . th dport @flows{six} goto {name}_new".replace("PROTO", proto))
    first += [
        # Errors about a flow, and the rest of a fragmented packet whose beginning was judged, have no ports.
        f"icmp type {{ destination-unreachable, time-exceeded, parameter-problem }} goto {name}_part",
        f"icmpv6 type {{ destination-unreachable, packet-too-big, time-exceeded, parameter-problem }} goto {name}_part",
        f"ip frag-off & 0x1fff != 0 goto {name}_part",
        f"frag frag-off != 0 goto {name}_part",
        f"icmp type echo-request goto {name}_new",
        f"icmpv6 type echo-request goto {name}_new",
        f"{flow} @talks goto {name}_reply".replace("PROTO", "ip"),
        f"{flow} @talks6 goto {name}_reply".replace("PROTO", "ip6"),
        f"meta l4proto tcp goto {name}_middle",
        f"goto {name}_new",
    ]
    return {
        name: tuple(first),
        f"{name}_new": (*forward, *begun, drop if denies else "goto remember"),
        f"{name}_reply": (*backward, *replied, drop if denies else "goto refresh"),
        f"{name}_middle": (*forward, *backward, *begun, *replied, drop if denies else "goto remember"),
        f"{name}_part": (*pieces, drop if denies else "accept"),
    }


def _rules(
    policy: Policy, network: Network, *, reply: bool, bridged: bool, verdict: str = "", ports: bool = True
) -> Iterator[str]:
    """Yield a rule for each pair of ways to be source and destination, and each sort of ports."""
    verdict = f"goto d_{_short(policy.id)}" if _denies(policy) else f"counter name {counter_name(policy.id)} {verdict}"
    ways = (("daddr", "oifname"), ("saddr", "iifname")) if reply else (("saddr", "iifname"), ("daddr", "oifname"))
    sides = [
        [_turned(way, *words) for way in _ways(policy, network, side, bridged=bridged)]
        for side, words in zip(("from", "to"), ways, strict=True)
    ]
    for source, destination in product(*sides):
        if source.family and destination.family and source.family != destination.family:
            continue
        for protocols in _ports(policy.spec.ports, reply=reply) if ports else [""]:
            yield " ".join(filter(None, (source.match, destination.match, protocols, verdict)))


def _turned(way: _Side, address: str, interface: str) -> _Side:
    return _Side(way.family, way.match.replace("SIDE", address).replace("IF", interface))


def _ways(policy: Policy, network: Network, side: str, *, bridged: bool) -> Iterator[_Side]:
    selectors = policy.spec.sources if side == "from" else policy.spec.destinations
    if not selectors:
        yield _Side("", "")
    if any(selector.labels for selector in selectors):
        name = f"{_short(policy.id)}_{side}"
        if bridged:
            yield _Side("", f"IF @ends_{name}")
            if network.scope is Scope.GLOBAL:
                yield _Side("ip", f"IF . ip SIDE @remote_{name}")
                yield _Side("ip6", f"IF . ip6 SIDE @remote_{name}6")
        else:
            yield _Side("ip", f"ip SIDE @addrs_{name}")
            yield _Side("ip6", f"ip6 SIDE @addrs_{name}6")
    networks = [ip_network(selector.cidr) for selector in selectors if selector.cidr]
    for version, family in ((4, "ip"), (6, "ip6")):
        ranges = collapse_addresses(each for each in networks if each.version == version)  # type: ignore[type-var]
        text = ", ".join(str(each) for each in ranges)
        if text:
            yield _Side(family, f"{family} SIDE {{ {text} }}")


def _ports(ports: Iterable[PolicyPort], *, reply: bool) -> Iterator[str]:
    ranges, icmp, anything = [], False, True
    for port in ports:
        anything = False
        if port.protocol == "icmp":
            icmp = True
            continue
        first, last = (port.first, port.last) if port.first else _ALL_PORTS
        ranges.append(f"{port.protocol} . {first}" + (f"-{last}" if last > first else ""))
    if anything:
        yield ""
    if ranges:
        yield f"meta l4proto . th {'sport' if reply else 'dport'} {{ {', '.join(ranges)} }}"
    if icmp:
        yield f"meta l4proto {_ICMP}"
