"""All firewall state of a node: one static skeleton in table `inet netstore`, and elements of its maps and sets.

Networks, endpoints and ports are elements [0.07 ms each, the same at 50,000]; no rule is ever added for one of them.
Base chains have policy accept and drop only what enters or leaves our own interfaces, so the host's own firewall, and
everybody else's, keeps its say: a packet dropped by any of them is dropped.

How a published port works without a process: destination NAT in prerouting and output for addresses that are the
node's own, `route_localnet` on our bridges for 127.0.0.1, and source NAT only where a reply would otherwise not come
back: from loopback, between endpoints of one subnet (hairpin), and to endpoints of other nodes or with another way out
(set `masked`). The container sees everybody else's source address.
Only ::1 needs a process, one for the node: what is published there is redirected to the relay (resolver/relay.py).

Names of maps and sets that hold addresses end in 6 where the addresses are IPv6.

A second table, `bridge netstore`, sees frames where they leave an endpoint, and drops those with another's MAC or
source address; an endpoint is an element of its sets too. Policies add chains of their networks to both (`policing`).
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from netstore.kernel import policing
from netstore.kernel.elements import NFT_MSG_DELSETELEM, NFT_MSG_NEWSETELEM, PlainElements
from netstore.kernel.nftables import Nftables
from netstore.kernel.policing import BRIDGED, ROUTED, Policing, Skeleton
from netstore.kernel.skeleton import EXPIRING, GUARD_SETS, TABLES
from netstore.model import Address, PortMapping, Protocol

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


def _table_of(name: str) -> str:
    return policing.table_of(name) or (BRIDGED if name in GUARD_SETS else ROUTED)


class Firewall:
    """The tables of the daemon's own namespace. Blocking; safe for several threads.

    Who works out elements and adds them holds `steady`, so that policies do not change in between.
    """

    def __init__(self) -> None:
        self._nft = Nftables()
        self._plain = PlainElements(
            {table: {name: body for name, (_, body) in sets.items()} for table, (sets, _) in TABLES.items()}
        )
        self.policing = Policing()
        self.steady = threading.RLock()

    def ensure(self) -> None:
        """Make tables, sets, chains and rules as they should be, those of policies too; elements stay as they are."""
        with self.steady:
            dynamic = self.policing.skeleton()
            self._plain.also(_bodies(dynamic))
            for table, (sets, chains) in TABLES.items():
                commands = [f"add table {table}"]
                commands += [f"add {kind} {table} {name} {{ {body} }}" for name, (kind, body) in sets.items()]
                for name, (hook, _) in chains.items():
                    commands.append(f"add chain {table} {name}" + (f" {{ {hook} }}" if hook else ""))
                    commands.append(f"flush chain {table} {name}")
                for name, (_, rules) in chains.items():
                    commands += [f"add rule {table} {name} {rule}" for rule in rules]
                commands += _add_skeleton(table, dynamic[table])
                self._nft.run(commands, doing="making the firewall's skeleton")

    def add(self, elements: Iterable[Element]) -> None:
        """Add elements in one transaction; those that are there already are a success.

        Raises:
            KernelError: EEXIST when a map holds another value for a key.
        """
        elements = list(elements)
        if not self._plain.change((NFT_MSG_NEWSETELEM, elements)):
            self._nft.run(_add_elements(elements))

    def remove(self, elements: Iterable[Element]) -> None:
        """Remove elements; those that are gone are a success."""
        elements = list(elements)
        if not self._plain.change((NFT_MSG_DELSETELEM, elements)):
            self._nft.run_each(_delete_elements(elements), tolerate=[errno.ENOENT], doing="removing firewall elements")

    def exchange(self, old: Collection[Element], new: Collection[Element]) -> None:
        """Put new elements in place of old ones, in one transaction: a key that is in both is never missing.

        Raises:
            KernelError: EEXIST when a map holds another value for a key that is in none of the old ones.
        """
        if not self._plain.change((NFT_MSG_DELSETELEM, list(old)), (NFT_MSG_NEWSETELEM, list(new))):
            # What somebody removed meanwhile would fail the transaction: added first, it is there.
            self._nft.run([*_add_elements(old), *_delete_elements(old), *_add_elements(new)])

    def police(self, network_id: str, change: Callable[[], None], elements: Callable[[], set[Element]]) -> None:
        """Change what a network is policed by, in one transaction: rules, and the elements that `elements` works out.

        Raises:
            KernelError: the kernel refused; all is as it was.
        """
        with self.steady:
            before, old = self.policing.skeleton(network_id), elements()
            policed = self.policing.get(network_id)
            change()
            after, new = self.policing.skeleton(network_id), elements()
            old |= self._jumps_to(before[BRIDGED].chains.keys() - after[BRIDGED].chains.keys())
            commands: list[str] = []
            for table in TABLES:
                commands += _add_skeleton(table, before[table], whole=False) + _add_skeleton(table, after[table])
            # What somebody removed meanwhile would fail the transaction: added first, it is there.
            commands += [*_add_elements(new | old), *_delete_elements(old - new)]
            for table in TABLES:
                commands += _delete_skeleton(table, before[table], after[table])
            try:
                self._nft.run(commands, doing="changing what is policed")
            except BaseException:
                self.policing.restore(network_id, policed)
                raise
            self._plain.also(_bodies(self.policing.skeleton()))

    def _jumps_to(self, chains: Collection[str]) -> set[Element]:
        """Return elements of endpoints that lead to chains which go: of some that came meanwhile we have not heard."""
        listed = self._nft.json(f"list map {BRIDGED} members") if chains else None
        found = {_text(each) for entry in listed or [] for each in entry.get("map", {}).get("elem", [])}
        return {("members", text) for text in found if text.partition(" : jump ")[2] in chains}

    def elements(self) -> set[Element] | None:
        """Return every element that does not expire, None when a table or a part of its skeleton is missing."""
        found: set[Element] = set()
        with self.steady:
            dynamic = self.policing.skeleton()
            for table in TABLES:
                objects = self._nft.json(f"list table {table}")
                if objects is None or not _is_whole(table, dynamic[table], objects):
                    return None
                for value in (value for entry in objects for kind, value in entry.items() if kind in ("set", "map")):
                    if value["name"] not in EXPIRING:
                        found |= {(value["name"], _text(element)) for element in value.get("elem", [])}
        return found

    def sweep(self, *, dry_run: bool) -> list[str]:
        """Remove chains, sets and counters of policies that are no more; returns their names."""
        swept: list[str] = []
        with self.steady:
            dynamic = self.policing.skeleton()
            for table, (sets, chains) in TABLES.items():
                known = {*sets, *chains, *dynamic[table].sets, *dynamic[table].chains, *dynamic[table].counters}
                strays = [
                    (kind, value["name"])
                    for entry in self._nft.json(f"list table {table}") or []
                    for kind, value in entry.items()
                    if kind in ("set", "map", "chain", "counter") and value["name"] not in known
                ]
                flushes = [f"flush chain {table} {name}" for kind, name in strays if kind == "chain"]
                order = ("chain", "set", "map", "counter")
                strays.sort(key=lambda stray: order.index(stray[0]))
                commands = flushes + [f"delete {kind} {table} {name}" for kind, name in strays]
                if not dry_run:
                    self._nft.run(commands, doing="removing what no policy uses")
                swept += [name for _, name in strays]
        return swept

    def counters(self) -> dict[str, tuple[int, int]]:
        """Return packets and bytes of every counter, of both tables together, by name."""
        found: dict[str, tuple[int, int]] = {}
        for table in TABLES:
            for entry in self._nft.json(f"list counters table {table}") or []:
                if "counter" in entry and f"{entry['counter']['family']} {entry['counter']['table']}" == table:
                    name, packets, size = (entry["counter"][key] for key in ("name", "packets", "bytes"))
                    before = found.get(name, (0, 0))
                    found[name] = (before[0] + packets, before[1] + size)
        return found

    def delete(self) -> None:
        """Remove the tables and everything in them."""
        self._nft.run_each(
            [f"delete table {table}" for table in TABLES], tolerate=[errno.ENOENT], doing="removing the firewall"
        )


def _add_elements(elements: Iterable[Element]) -> list[str]:
    return [f"add element {_table_of(name)} {name} {{ {text} }}" for name, text in elements]


def _delete_elements(elements: Iterable[Element]) -> list[str]:
    return [f"delete element {_table_of(name)} {name} {{ {text.split(' : ')[0]} }}" for name, text in elements]


def _bodies(dynamic: dict[str, Skeleton]) -> dict[str, tuple[str, str]]:
    return {name: (table, body) for table, each in dynamic.items() for name, (_, body) in each.sets.items()}


def _add_skeleton(table: str, skeleton: Skeleton, *, whole: bool = True) -> list[str]:
    """Return commands that make what policies need; without `whole` the rules stay as they are."""
    commands = [f"add {kind} {table} {name} {{ {body} }}" for name, (kind, body) in skeleton.sets.items()]
    commands += [f"add counter {table} {name}" for name in skeleton.counters]
    commands += [f"add chain {table} {name}" for name in skeleton.chains]
    if whole:
        commands += [f"flush chain {table} {name}" for name in skeleton.chains]
        commands += [f"add rule {table} {name} {rule}" for name, rules in skeleton.chains.items() for rule in rules]
    return commands


def _delete_skeleton(table: str, before: Skeleton, after: Skeleton) -> list[str]:
    chains = [name for name in before.chains if name not in after.chains]
    commands = [f"flush chain {table} {name}" for name in chains] + [f"delete chain {table} {name}" for name in chains]
    commands += [f"delete set {table} {name}" for name in before.sets if name not in after.sets]
    return commands + [f"delete counter {table} {name}" for name in before.counters if name not in after.counters]


def _is_whole(table: str, dynamic: Skeleton, objects: Iterable[dict[str, Any]]) -> bool:
    """Say whether a table has its sets, counters and chains, and these as many rules as they should."""
    sets, chains = TABLES[table]
    wanted = {name: len(rules) for name, (_, rules) in chains.items()}
    wanted |= {name: len(rules) for name, rules in dynamic.chains.items()}
    rules, names = dict.fromkeys(wanted, 0), set()
    for kind, value in (pair for entry in objects for pair in entry.items()):
        if kind == "rule" and value["chain"] in rules:
            rules[value["chain"]] += 1
        elif kind != "metainfo" and kind != "table":
            names.add(value.get("name", ""))
    return rules == wanted and names >= {*sets, *dynamic.sets, *dynamic.counters, *wanted}


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
    yield ("macs", f"{interface} . {mac}") if senders else ("unguarded", interface)
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
        if "jump" in element:
            return f"jump {element['jump']['target']}"
    return str(element)
