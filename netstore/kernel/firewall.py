"""All firewall state of a node: one static skeleton in table `inet netstore`, and elements of its maps and sets.

Networks, endpoints and ports are elements [0.07 ms each, the same at 50,000]; no rule is ever added for one of them.
Base chains have policy accept and drop only what enters or leaves our own interfaces, so the host's own firewall, and
everybody else's, keeps its say: a packet dropped by any of them is dropped.

How a published port works without a process: destination NAT in prerouting and output for addresses that are the
node's own, `route_localnet` on our bridges for 127.0.0.1, and source NAT only where a reply would otherwise not come
back: from loopback, and between endpoints of one subnet (hairpin). The container sees everybody else's source address.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any

from netstore.kernel.nftables import Nftables
from netstore.model import PortMapping

__all__ = ["Element", "Firewall", "port_element"]

# A set's or map's name, and one element of it as nft writes it: ("ports", "tcp . 8080 : 172.18.0.2 . 80").
Element = tuple[str, str]

TABLE = "inet netstore"

_SETS = {
    "bridges": ("set", "type ifname;"),
    "internal": ("set", "type ifname;"),
    "masqueraded": ("set", "type ifname;"),
    "same": ("set", "type ifname . ifname;"),
    "subnets": ("set", "type ifname . ipv4_addr; flags interval;"),
    "ports": ("map", "type inet_proto . inet_service : ipv4_addr . inet_service;"),
    "ports_at": ("map", "type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service;"),
}

_CHAINS = {
    "forward": (
        "type filter hook forward priority filter; policy accept;",
        (
            "iifname != @bridges oifname != @bridges accept",
            "ct state established,related accept",
            "iifname . oifname @same accept",
            "iifname @internal drop",
            "oifname @internal drop",
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
        (
            "dnat ip to ip daddr . meta l4proto . th dport map @ports_at",
            "dnat ip to meta l4proto . th dport map @ports",
        ),
    ),
    # 127/8 from outside is not served: what is bound to loopback stays there, whoever is on the link.
    "prerouting": (
        "type nat hook prerouting priority dstnat; policy accept;",
        ("ip daddr != 127.0.0.0/8 fib daddr type local jump publish",),
    ),
    "output": (
        "type nat hook output priority -100; policy accept;",
        ("fib daddr type local jump publish",),
    ),
    "postrouting": (
        "type nat hook postrouting priority srcnat; policy accept;",
        (
            "oifname @bridges ip saddr 127.0.0.0/8 masquerade",
            "ct status dnat oifname . ip saddr @subnets masquerade",
            "iifname @masqueraded oifname != @bridges masquerade",
        ),
    ),
}


class Firewall:
    """The table `inet netstore` of the daemon's own namespace. Blocking; safe for several threads."""

    def __init__(self) -> None:
        self._nft = Nftables()

    def ensure(self) -> None:
        """Make table, sets, chains and rules as they should be; elements stay as they are."""
        commands = [f"add table {TABLE}"]
        commands += [f"add {kind} {TABLE} {name} {{ {body} }}" for name, (kind, body) in _SETS.items()]
        for name, (hook, _) in _CHAINS.items():
            commands.append(f"add chain {TABLE} {name}" + (f" {{ {hook} }}" if hook else ""))
            commands.append(f"flush chain {TABLE} {name}")
        for name, (_, rules) in _CHAINS.items():
            commands += [f"add rule {TABLE} {name} {rule}" for rule in rules]
        self._nft.run(commands, doing="making the firewall's skeleton")

    def add(self, elements: Iterable[Element]) -> None:
        """Add elements in one transaction; those that are there already are a success.

        Raises:
            KernelError: EEXIST when a map holds another value for a key.
        """
        self._nft.run([f"add element {TABLE} {name} {{ {text} }}" for name, text in elements])

    def remove(self, elements: Iterable[Element]) -> None:
        """Remove elements; those that are gone are a success."""
        commands = [f"delete element {TABLE} {name} {{ {text.split(' : ')[0]} }}" for name, text in elements]
        self._nft.run_each(commands, tolerate=[errno.ENOENT], doing="removing firewall elements")

    def elements(self) -> set[Element] | None:
        """Return every element, None when the table or a part of its skeleton is missing."""
        objects = self._nft.json(f"list table {TABLE}")
        if objects is None:
            return None
        found: set[Element] = set()
        sets, rules = 0, dict.fromkeys(_CHAINS, 0)
        for entry in objects:
            for kind, value in entry.items():
                if kind in ("set", "map"):
                    sets += 1
                    found |= {(value["name"], _text(element)) for element in value.get("elem", [])}
                elif kind == "rule" and value["chain"] in rules:
                    rules[value["chain"]] += 1
        if sets < len(_SETS) or any(rules[name] != len(_CHAINS[name][1]) for name in rules):
            return None
        return found

    def delete(self) -> None:
        """Remove the table and everything in it."""
        self._nft.run_each([f"delete table {TABLE}"], tolerate=[errno.ENOENT], doing="removing the firewall")


def port_element(port: PortMapping, address: str) -> Element:
    """Return the element that publishes a port of the endpoint with that address."""
    target = f"{port.protocol} . {port.host_port} : {address} . {port.container_port}"
    return ("ports_at", f"{port.host_ip} . {target}") if port.host_ip else ("ports", target)


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
        if "prefix" in element:
            return f"{element['prefix']['addr']}/{element['prefix']['len']}"
    return str(element)
