"""All firewall state of a node: one static skeleton in table `inet netstore`, and elements of its maps and sets.

Networks, endpoints and ports are elements [0.07 ms each, the same at 50,000]; no rule is ever added for one of them.
Base chains have policy accept and drop only what enters or leaves our own interfaces, so the host's own firewall, and
everybody else's, keeps its say: a packet dropped by any of them is dropped.

How a published port works without a process: destination NAT in prerouting and output for addresses that are the
node's own, `route_localnet` on our bridges for 127.0.0.1, and source NAT only where a reply would otherwise not come
back: from loopback, and between endpoints of one subnet (hairpin). The container sees everybody else's source address.
Only ::1 needs a process, one for the node: what is published there is redirected to the relay (resolver/relay.py).

Names of maps and sets that hold addresses end in 6 where the addresses are IPv6.

A second table, `bridge netstore`, sees frames where they leave an endpoint, and drops those with another's MAC or
source address; an endpoint is an element of its sets too.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeAlias

from netstore.kernel.elements import NFT_MSG_DELSETELEM, NFT_MSG_NEWSETELEM, PlainElements
from netstore.kernel.nftables import Nftables
from netstore.model import PAIR_PREFIX, Address, PortMapping, Protocol

__all__ = [
    "Element",
    "Firewall",
    "direct_elements",
    "guard_elements",
    "port_elements",
    "relay_elements",
    "source_elements",
]

# A set's or map's name, and one element of it as nft writes it: ("ports", "tcp . 8080 : 172.18.0.2 . 80").
Element = tuple[str, str]
_Sets: TypeAlias = dict[str, tuple[str, str]]
_Chains: TypeAlias = dict[str, tuple[str, tuple[str, ...]]]

TABLE, GUARD_TABLE = "inet netstore", "bridge netstore"
WELL_KNOWN = "inet_proto . inet_service"

_SETS: _Sets = {
    "bridges": ("set", "type ifname;"),
    "internal": ("set", "type ifname;"),
    "same": ("set", "type ifname . ifname;"),
    # May be reached from outside without having published anything (gateway mode nat-unprotected).
    "open": ("set", "type ifname;"),
    "open6": ("set", "type ifname;"),
    # Published ports may be reached at the container's own address: from everywhere, or from one interface.
    "routed": ("set", "type ifname;"),
    "routed6": ("set", "type ifname;"),
    "trusted": ("set", "type ifname . ifname;"),
    # Ports served on ::1, and where the relay listens that serves them.
    "relayed": ("set", "type inet_service;"),
    "relayed_ranges": ("set", "type inet_service; flags interval;"),
    "relay": ("map", "type inet_proto : inet_service;"),
}
for _six, _addr in (("", "ipv4_addr"), ("6", "ipv6_addr")):
    _SETS |= {
        f"masqueraded{_six}": ("set", "type ifname;"),
        f"sources{_six}": ("map", f"type ifname : {_addr};"),
        f"subnets{_six}": ("set", f"type ifname . {_addr}; flags interval;"),
        f"ports{_six}": ("map", f"type {WELL_KNOWN} : {_addr} . inet_service;"),
        f"ports_at{_six}": ("map", f"type {_addr} . {WELL_KNOWN} : {_addr} . inet_service;"),
        f"ranges{_six}": ("map", f"type {WELL_KNOWN} : {_addr}; flags interval;"),
        f"ranges_at{_six}": ("map", f"type {_addr} . {WELL_KNOWN} : {_addr}; flags interval;"),
        f"direct{_six}": ("set", f"type {_addr} . {WELL_KNOWN};"),
        # Who may reach a published port, where that was limited: the port, and the port with its sources.
        f"limited{_six}": ("set", f"type {_addr} . {WELL_KNOWN};"),
        f"allowed{_six}": ("set", f"type {_addr} . {_addr} . {WELL_KNOWN}; flags interval;"),
    }


def _both(*rules: str) -> tuple[str, ...]:
    """Return rules for both families: IP and SIX stand for what differs."""
    return tuple(
        rule.replace("IP", ip).replace("SIX", six).replace("NFPROTO", nfproto)
        for rule in rules
        for ip, six, nfproto in (("ip", "", "ipv4"), ("ip6", "6", "ipv6"))
    )


_PORT = "meta l4proto . th dport"
_CHAINS: _Chains = {
    "forward": (
        "type filter hook forward priority filter; policy accept;",
        (
            "iifname != @bridges oifname != @bridges accept",
            "tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu",
            "ct state established,related accept",
            "iifname . oifname @same accept",
            "iifname @internal drop",
            "oifname @internal drop",
            *_both(
                f"IP daddr . {_PORT} @limitedSIX IP saddr . IP daddr . {_PORT} != @allowedSIX drop",
                "meta nfproto NFPROTO oifname @openSIX accept",
                f"oifname @routedSIX IP daddr . {_PORT} @directSIX accept",
                f"iifname . oifname @trusted IP daddr . {_PORT} @directSIX accept",
            ),
            "oifname @routed meta l4proto icmp accept",
            "oifname @routed6 meta l4proto icmpv6 accept",
            "oifname @bridges ct status dnat accept",
            "oifname @bridges drop",
        ),
    ),
    # Containers must not reach what listens on the host's loopback, which route_localnet would let them.
    "raw": (
        "type filter hook prerouting priority raw; policy accept;",
        ("iifname @bridges ip daddr 127.0.0.0/8 drop",),
    ),
    "publish": (
        "",
        _both(
            f"dnat IP to IP daddr . {_PORT} map @ports_atSIX",
            f"dnat IP to {_PORT} map @portsSIX",
            f"dnat IP to IP daddr . {_PORT} map @ranges_atSIX",
            f"dnat IP to {_PORT} map @rangesSIX",
        ),
    ),
    # 127/8 from outside is not served: what is bound to loopback stays there, whoever is on the link.
    "prerouting": (
        "type nat hook prerouting priority dstnat; policy accept;",
        ("ip daddr 127.0.0.0/8 accept", "fib daddr type local jump publish"),
    ),
    "output": (
        "type nat hook output priority -100; policy accept;",
        (
            "ip6 daddr ::1 tcp dport @relayed redirect to :meta l4proto map @relay",
            "ip6 daddr ::1 tcp dport @relayed_ranges redirect to :meta l4proto map @relay",
            "ip6 daddr ::1 accept",
            "fib daddr type local jump publish",
        ),
    ),
    "postrouting": (
        "type nat hook postrouting priority srcnat; policy accept;",
        (
            "oifname @bridges ip saddr 127.0.0.0/8 masquerade",
            *_both(
                "ct status dnat oifname . IP saddr @subnetsSIX masquerade",
                "oifname != @bridges snat IP to iifname map @sourcesSIX",
                "meta nfproto NFPROTO iifname @masqueradedSIX oifname != @bridges masquerade",
            ),
        ),
    ),
}


# Whatever leaves one of our pairs is looked at, unless the pair is in `unguarded`; so an endpoint costs one element for
# each of its addresses.
_GUARD_SETS: _Sets = {
    "unguarded": ("set", "type ifname;"),
    "senders": ("set", "type ifname . ether_addr . ipv4_addr;"),
    "senders6": ("set", "type ifname . ether_addr . ipv6_addr;"),
}
_GUARD_CHAINS: _Chains = {
    "guard": (
        "type filter hook prerouting priority -300; policy accept;",
        (
            f'iifname != "{PAIR_PREFIX}*" accept',
            "iifname @unguarded accept",
            "icmpv6 type nd-router-advert drop",
            "iifname . ether saddr . ip saddr @senders accept",
            "iifname . ether saddr . arp saddr ip @senders accept",
            "iifname . ether saddr . ip6 saddr @senders6 accept",
            "ether type ip ip saddr 0.0.0.0 udp dport 67 accept",
            "arp saddr ip 0.0.0.0 accept",
            "ip6 saddr :: accept",
            "drop",
        ),
    ),
}
_TABLES: dict[str, tuple[_Sets, _Chains]] = {TABLE: (_SETS, _CHAINS), GUARD_TABLE: (_GUARD_SETS, _GUARD_CHAINS)}


def _table_of(name: str) -> str:
    return GUARD_TABLE if name in _GUARD_SETS else TABLE


class Firewall:
    """The tables of the daemon's own namespace. Blocking; safe for several threads."""

    def __init__(self) -> None:
        self._nft = Nftables()
        self._plain = PlainElements(
            {table: {name: body for name, (_, body) in sets.items()} for table, (sets, _) in _TABLES.items()}
        )

    def ensure(self) -> None:
        """Make table, sets, chains and rules as they should be; elements stay as they are."""
        for table, (sets, chains) in _TABLES.items():
            commands = [f"add table {table}"]
            commands += [f"add {kind} {table} {name} {{ {body} }}" for name, (kind, body) in sets.items()]
            for name, (hook, _) in chains.items():
                commands.append(f"add chain {table} {name}" + (f" {{ {hook} }}" if hook else ""))
                commands.append(f"flush chain {table} {name}")
            for name, (_, rules) in chains.items():
                commands += [f"add rule {table} {name} {rule}" for rule in rules]
            self._nft.run(commands, doing="making the firewall's skeleton")

    def add(self, elements: Iterable[Element]) -> None:
        """Add elements in one transaction; those that are there already are a success.

        Raises:
            KernelError: EEXIST when a map holds another value for a key.
        """
        elements = list(elements)
        if not self._plain.change(NFT_MSG_NEWSETELEM, elements):
            self._nft.run([f"add element {_table_of(name)} {name} {{ {text} }}" for name, text in elements])

    def remove(self, elements: Iterable[Element]) -> None:
        """Remove elements; those that are gone are a success."""
        elements = list(elements)
        if self._plain.change(NFT_MSG_DELSETELEM, elements):
            return
        commands = [f"delete element {_table_of(name)} {name} {{ {text.split(' : ')[0]} }}" for name, text in elements]
        self._nft.run_each(commands, tolerate=[errno.ENOENT], doing="removing firewall elements")

    def elements(self) -> set[Element] | None:
        """Return every element, None when a table or a part of its skeleton is missing."""
        found: set[Element] = set()
        for table, (sets, chains) in _TABLES.items():
            objects = self._nft.json(f"list table {table}")
            if objects is None:
                return None
            there, rules = 0, dict.fromkeys(chains, 0)
            for kind, value in (pair for entry in objects for pair in entry.items()):
                if kind in ("set", "map"):
                    there += 1
                    found |= {(value["name"], _text(element)) for element in value.get("elem", [])}
                elif kind == "rule" and value["chain"] in rules:
                    rules[value["chain"]] += 1
            if there < len(sets) or any(rules[name] != len(chains[name][1]) for name in rules):
                return None
        return found

    def delete(self) -> None:
        """Remove the tables and everything in them."""
        self._nft.run_each(
            [f"delete table {table}" for table in _TABLES], tolerate=[errno.ENOENT], doing="removing the firewall"
        )


def port_elements(port: PortMapping, addresses: Collection[Address]) -> Iterator[Element]:
    """Yield the elements that publish a port of the endpoint with those addresses.

    A range onto the same numbers is one element; one onto others is an element for each port.
    """
    if port.protocol is Protocol.TCP and port.host_ip in ("", "::1") and addresses:
        last = port.host_port + port.count - 1
        yield ("relayed_ranges", f"{port.host_port}-{last}") if port.count > 1 else ("relayed", f"{port.host_port}")
    for address, six in _served(port, addresses):
        place = f"{port.host_ip} . {port.protocol}" if port.host_ip else f"{port.protocol}"
        at = f"_at{six}" if port.host_ip else six
        if port.count > 1 and port.host_port == port.container_port:
            last = port.host_port + port.count - 1
            yield f"ranges{at}", f"{place} . {port.host_port}-{last} : {address}"
        else:
            for number in range(port.count):
                target = f"{address} . {port.container_port + number}"
                yield f"ports{at}", f"{place} . {port.host_port + number} : {target}"


def source_elements(port: PortMapping, addresses: Collection[Address]) -> Iterator[Element]:
    """Yield the elements that let certain sources alone reach a published port, by whichever way they come."""
    for address, six in _served(port, addresses) if port.sources else ():
        hosts = "/128" if six else "/32"
        sources = [source.removesuffix(hosts) for source in port.sources if (":" in source) == bool(six)]
        for number in range(port.container_port, port.container_port + port.count):
            yield f"limited{six}", f"{address} . {port.protocol} . {number}"
            yield from ((f"allowed{six}", f"{source} . {address} . {port.protocol} . {number}") for source in sources)


def relay_elements(port: int) -> Iterator[Element]:
    """Yield the element that says where the relay of ::1 listens; none for port 0."""
    if port:
        yield "relay", f"tcp : {port}"


def guard_elements(interface: str, mac: str, senders: Collection[str]) -> Iterator[Element]:
    """Yield the elements that let an endpoint send as itself; `interface` is the host's end of its pair.

    Without senders it may send as anybody.
    """
    if not senders:
        yield "unguarded", interface
    for address in senders:
        yield "senders6" if ":" in address else "senders", f"{interface} . {mac} . {address}"


def direct_elements(port: PortMapping, addresses: Collection[Address]) -> Iterator[Element]:
    """Yield the elements that let a published port be reached at the endpoint's own addresses."""
    for address, six in _served(port, addresses):
        for number in range(port.container_port, port.container_port + port.count):
            yield f"direct{six}", f"{address} . {port.protocol} . {number}"


def _served(port: PortMapping, addresses: Collection[Address]) -> Iterator[tuple[str, str]]:
    """Yield an endpoint's first address of each family that the host address of a port takes in; none for ::1."""
    for six in ("", "6") if port.host_ip != "::1" else ():
        if port.host_ip and (":" in port.host_ip) != bool(six):
            continue
        found = next((each.address for each in addresses if (":" in each.address) == bool(six)), None)
        if found:
            yield found, six


def _text(element: Any) -> str:
    """Return an element of nft's JSON as nft's text, keys quoted as we write them."""
    if isinstance(element, list):
        key, value = element
        return f"{_text(key)} : {_text(value)}"
    if isinstance(element, dict):
        if "elem" in element:
            return _text(element["elem"]["val"])
        if "concat" in element:
            return " . ".join(_text(part) for part in element["concat"])
        if "range" in element:
            return "-".join(_text(end) for end in element["range"])
        if "prefix" in element:
            return f"{element['prefix']['addr']}/{element['prefix']['len']}"
    return str(element)
