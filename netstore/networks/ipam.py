"""Address management: pools of networks and addresses of endpoints, both families, inside the store's transactions.

Dynamic addresses are given in turn, after the last one given, so that an address is reused as late as possible.
The table's keys and triggers decide what is taken; this module chooses, and names the holder when the answer is no.
Addresses are stored as packed bytes (4 or 16), which order as numbers within a family.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import ipaddress
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from netstore.errors import AddressTaken, Exhausted, FailedPrecondition, InvalidArgument
from netstore.model import Address, EndpointSpec, Network, NetworkSpec, Pool, host_id
from netstore.store import Transaction

__all__ = [
    "DEFAULT_POOLS",
    "GLOBAL_POOLS",
    "AddressPool",
    "HostRoute",
    "allocate",
    "choose_subnet",
    "hold",
    "hold_link_local",
    "is_chosen",
    "next_free",
    "overlapping_route",
    "release_pool",
    "reserve_pool",
    "resolve_pools",
    "unique_local_pool",
    "validate_pool",
]

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network
AddressPool = tuple[IPNetwork, int]
"""A base, and the prefix length of what is cut from it (Docker's default-address-pools)."""

_MOST_SPECIFIC = {4: 30, 6: 126}
_LEAST_SPECIFIC = {4: 4, 6: 16}


@dataclass(frozen=True, slots=True)
class HostRoute:
    """A route of the node: destination and the interface that it leaves by."""

    destination: IPNetwork
    interface: str


DEFAULT_POOLS: tuple[AddressPool, ...] = (
    *((IPv4Network(f"172.{second}.0.0/16"), 16) for second in range(17, 32)),
    (IPv4Network("192.168.0.0/16"), 20),
)
"""Docker's, IPv4."""


GLOBAL_POOLS: tuple[AddressPool, ...] = ((IPv4Network("10.0.0.0/8"), 24),)
"""Docker's for networks that span nodes, IPv4."""


def unique_local_pool(node_id: str) -> AddressPool:
    """Return the node's own IPv6 pool: a /48 derived from its id, the same for ever (RFC 4193, section 3.2.2)."""
    digest = hashlib.sha256(node_id.encode()).digest()
    return IPv6Network((b"\xfd" + digest[:5] + bytes(10), 48)), 64


def validate_pool(pool: Pool, index: int, *, gateway: bool = True) -> Pool:
    """Check one pool and, with `gateway`, fill in its gateway; one without a subnet is returned as it is. Pure.

    Raises:
        InvalidArgument: naming the field.
    """
    field = f"spec.ipam[{index}]"
    if not pool.subnet:
        for name, value in (("gateway", pool.gateway), ("ip_range", pool.ip_range)):
            if value:
                raise InvalidArgument(f"{field}.{name}", value, "nothing, as long as no subnet is given")
        return pool
    subnet = _network(f"{field}.subnet", pool.subnet)
    if subnet.network_address.is_unspecified and (pool.gateway or pool.ip_range or pool.aux_addresses):
        raise InvalidArgument(f"{field}.subnet", pool.subnet, "a subnet, where addresses in it are named")
    low, high = _LEAST_SPECIFIC[subnet.version], _MOST_SPECIFIC[subnet.version]
    if not low <= subnet.prefixlen <= high or subnet.is_multicast or subnet.is_loopback or subnet.is_link_local:
        raise InvalidArgument(f"{field}.subnet", pool.subnet, f"a unicast IPv{subnet.version} subnet /{low} to /{high}")
    if subnet.network_address.is_unspecified:
        return replace(pool, subnet=str(subnet))
    router = _member(f"{field}.gateway", pool.gateway, subnet) if pool.gateway else subnet[1] if gateway else ""
    if pool.ip_range:
        within = _network(f"{field}.ip_range", pool.ip_range)
        if not _contains(subnet, within):
            raise InvalidArgument(f"{field}.ip_range", pool.ip_range, f"a range inside {subnet}")
    aux = {
        name: str(_member(f"{field}.aux_addresses[{name}]", address, subnet))
        for name, address in pool.aux_addresses.items()
    }
    return replace(pool, subnet=str(subnet), gateway=str(router), aux_addresses=aux)


def _network(field: str, text: str) -> IPNetwork:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        try:
            meant = f"; did you mean {ipaddress.ip_network(text, strict=False)}?"
        except ValueError:
            meant = ""
        raise InvalidArgument(field, text, f"a network such as 10.1.0.0/24 or fd00:1::/64{meant}") from error


def _contains(outer: IPNetwork, inner: IPNetwork) -> bool:
    return outer.version == inner.version and _first(outer) <= _first(inner) and _last(inner) <= _last(outer)


def _first(network: IPNetwork) -> int:
    return int(network.network_address)


def _last(network: IPNetwork) -> int:
    return int(network.broadcast_address)


def _usable(subnet: IPNetwork) -> tuple[int, int]:
    """Return the first and last address for a host: without the subnet's own (IPv6: anycast), and IPv4's broadcast."""
    return _first(subnet) + 1, _last(subnet) - (subnet.version == 4)


def _member(field: str, text: str, subnet: IPNetwork) -> IPAddress:
    excluded = "not its first or last" if subnet.version == 4 else "not its first"
    accepted = f"an address inside {subnet}, {excluded}"
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise InvalidArgument(field, text, accepted) from error
    first, last = _usable(subnet)
    if address.version != subnet.version or not first <= int(address) <= last:
        raise InvalidArgument(field, text, accepted)
    return address


def resolve_pools(
    tx: Transaction, spec: NetworkSpec, asked: Sequence[Pool], routes: Sequence[HostRoute],
    pools: Sequence[AddressPool], *, gateway: bool = True,
) -> tuple[Pool, ...]:  # fmt: skip
    """Return what a network gets: the pools asked for, and one from the defaults for each family that has none.

    One of which only the size was asked for (0.0.0.0/24) comes from the defaults too.

    Raises:
        Exhausted: no default pool is free.
    """
    given = [pool for pool in asked if is_chosen(pool)]
    sized = [ipaddress.ip_network(pool.subnet) for pool in asked if pool.subnet and pool not in given]
    families = [version for version, wanted in ((4, spec.enable_ipv4), (6, spec.enable_ipv6)) if wanted]
    wanted: list[tuple[int, int]] = [(network.version, network.prefixlen) for network in sized]
    named = {ipaddress.ip_network(pool.subnet).version for pool in asked if pool.subnet}
    wanted += [(version, 0) for version in families if version not in named]
    found = list(given)
    for version, prefix in wanted:
        mine = [HostRoute(ipaddress.ip_network(pool.subnet), "") for pool in found]
        subnet = choose_subnet(tx, [*routes, *mine], pools, version=version, prefix=prefix)
        found.append(validate_pool(Pool(subnet=subnet), 0, gateway=gateway))
    return tuple(sorted(found, key=lambda pool: ":" in pool.subnet))


def is_chosen(pool: Pool) -> bool:
    """Say whether a pool names its subnet: not none, and not only a size (0.0.0.0/24, as Docker's)."""
    return bool(pool.subnet) and not ipaddress.ip_network(pool.subnet).network_address.is_unspecified


def choose_subnet(
    tx: Transaction, routes: Sequence[HostRoute], pools: Sequence[AddressPool] = DEFAULT_POOLS, *, version: int = 4,
    prefix: int = 0,
) -> str:  # fmt: skip
    """Return the first default subnet of a family that no network and no route of the host overlaps.

    `prefix` is the length that it is to have, 0 that of its pool.

    Raises:
        Exhausted: none is left.
    """
    width = 4 if version == 4 else 16
    rows = tx.rows("SELECT first, last FROM subnets WHERE length(first) = ?", width)
    taken = [(int.from_bytes(first, "big"), int.from_bytes(last, "big")) for first, last in rows]
    counted = [route for route in routes if _matters(route) and route.destination.version == version]
    taken += [(_first(route.destination), _last(route.destination)) for route in counted]
    merged = _merged(taken)
    for base, size in pools:
        length = prefix or size
        if base.version != version or base.prefixlen > length:
            continue
        if (found := _first_free(base, length, merged)) is not None:
            packed = found.to_bytes(width, "big")
            return str(IPv4Network((packed, length)) if version == 4 else IPv6Network((packed, length)))
    raise Exhausted(
        f"no default IPv{version} address pool is free{f' for a /{prefix}' if prefix else ''}: every one overlaps a"
        " network or a route of the host",
        hint="give --subnet, remove unused networks (`netstore network prune`), or configure [[address-pool]]",
        reason="POOLS_EXHAUSTED",
        routes=", ".join(f"{route.destination} ({route.interface})" for route in counted),
    )


def _merged(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return disjoint intervals in order that cover the same numbers."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(intervals):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def _first_free(base: IPNetwork, prefix: int, taken: Sequence[tuple[int, int]]) -> int | None:
    """Return the first aligned subnet of the base that no taken interval meets; one step for each interval."""
    size = 1 << (base.max_prefixlen - prefix)
    at = _first(base)
    while at + size - 1 <= _last(base):
        index = bisect.bisect_right(taken, (at + size - 1, 1 << 128)) - 1
        if index < 0 or taken[index][1] < at:
            return at
        at = (taken[index][1] // size + 1) * size
    return None


def overlapping_route(subnet: IPNetwork, routes: Sequence[HostRoute]) -> HostRoute | None:
    """Return a route of the host that the subnet overlaps. Default routes, and their halves, do not count."""
    return next((route for route in routes if _matters(route) and _overlap(route.destination, subnet)), None)


def _overlap(one: IPNetwork, other: IPNetwork) -> bool:
    return one.version == other.version and _first(one) <= _last(other) and _first(other) <= _last(one)


def _matters(route: HostRoute) -> bool:
    return route.destination.prefixlen > 1


def reserve_pool(tx: Transaction, network: Network, pool: Pool) -> None:
    """Take a pool for a network, with its gateway and auxiliary addresses.

    Raises:
        FailedPrecondition: it overlaps another network's.
    """
    subnet = ipaddress.ip_network(pool.subnet)
    first, last = subnet.network_address.packed, subnet.broadcast_address.packed
    try:
        tx.execute("INSERT INTO subnets VALUES (?, ?, ?, ?, ?)", network.id, pool.subnet, first, last, first)
    except sqlite3.IntegrityError as error:
        row = tx.row(
            "SELECT networks.name, subnet FROM subnets JOIN networks ON networks.id = network_id"
            " WHERE length(first) = ? AND first <= ? AND last >= ?", len(first), last, first,
        )  # fmt: skip
        name, other = row or ("?", "?")
        raise FailedPrecondition(
            f"subnet {pool.subnet} overlaps {other} of network {name}",
            hint="choose another subnet, or none to take a free one",
            reason="SUBNET_OVERLAP", network=name, subnet=other,
        ) from error  # fmt: skip
    for address in dict.fromkeys(filter(None, (pool.gateway, *pool.aux_addresses.values()))):
        tx.execute("INSERT INTO addresses VALUES (?, ?, NULL)", network.id, ipaddress.ip_address(address).packed)


def release_pool(tx: Transaction, network: Network, pool: Pool) -> None:
    """Give back a pool that nothing was taken from."""
    subnet = ipaddress.ip_network(pool.subnet)
    tx.execute("DELETE FROM subnets WHERE network_id = ? AND subnet = ?", network.id, pool.subnet)
    tx.execute(
        "DELETE FROM addresses WHERE network_id = ? AND address BETWEEN ? AND ? AND length(address) = ?",
        network.id, subnet.network_address.packed, subnet.broadcast_address.packed, subnet.max_prefixlen // 8,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _subnet(text: str) -> IPNetwork:
    return ipaddress.ip_network(text)


def allocate(tx: Transaction, network: Network, endpoint_id: str | None, spec: EndpointSpec) -> tuple[Address, ...]:
    """Take an address of each family of a network for an endpoint: the static one, or the next free one.

    Raises:
        InvalidArgument: a static address is in none of the network's subnets.
        AddressTaken: it has a holder.
        Exhausted: no address is free.
    """
    static = {4: spec.ipv4_address, 6: spec.ipv6_address}
    if network.spec.ipam_driver == "dhcp":  # the server is asked for it when the endpoint is attached
        static[4] = ""
    found = []
    for version in (4, 6):
        pools = [pool for pool in network.pools if (":" in pool.subnet) == (version == 6)]
        if static[version]:
            field = f"spec.ipv{version}_address"
            found.append(_allocate_static(tx, network, pools, endpoint_id, static[version], field))
        elif pools:
            found.append(_allocate_next(tx, network, pools, endpoint_id))
    return tuple(found)


def hold_link_local(tx: Transaction, network: Network, endpoint_id: str, spec: EndpointSpec) -> tuple[Address, ...]:
    """Take the link-local addresses that an endpoint asks for.

    Raises:
        InvalidArgument: one is of IPv6, and the network has none.
        AddressTaken: one has a holder on the network.
    """
    found = []
    for index, text in enumerate(spec.link_local_addresses):
        field = f"spec.link_local_addresses[{index}]"
        address = ipaddress.ip_address(text)
        if address.version == 6 and not any(":" in pool.subnet for pool in network.pools):
            raise InvalidArgument(field, text, f"nothing: network {network.name} has no IPv6")
        hold(tx, network, address, endpoint_id, field)
        found.append(Address(address=text, prefix=16 if address.version == 4 else 64))
    return tuple(found)


def _allocate_next(tx: Transaction, network: Network, pools: Sequence[Pool], endpoint_id: str | None) -> Address:
    for pool in pools:
        row = tx.row("SELECT cursor FROM subnets WHERE network_id = ? AND subnet = ?", network.id, pool.subnet)
        number = _next_free(tx, network, pool, int.from_bytes(row[0], "big") if row else 0)
        if number is not None:
            packed = number.to_bytes(16 if ":" in pool.subnet else 4, "big")
            tx.execute("INSERT INTO addresses VALUES (?, ?, ?)", network.id, packed, endpoint_id)
            tx.execute(
                "UPDATE subnets SET cursor = ? WHERE network_id = ? AND subnet = ?", packed, network.id, pool.subnet
            )
            return _address(pool, ipaddress.ip_address(packed))
    raise _exhausted(network, pools)


def next_free(tx: Transaction, network: Network, pool: Pool, cursor: int) -> IPAddress:
    """Return the address of a pool that is free and comes after the one given last, as a number. Takes nothing.

    Raises:
        Exhausted: none is free.
    """
    number = _next_free(tx, network, pool, cursor)
    if number is None:
        raise _exhausted(network, [pool])
    return _subnet(pool.subnet)[number - _first(_subnet(pool.subnet))]


def _exhausted(network: Network, pools: Sequence[Pool]) -> Exhausted:
    return Exhausted(
        f"network {network.name} has no free address in {', '.join(p.ip_range or p.subnet for p in pools)}",
        hint="remove unused endpoints, or add a subnet (`netstore network update --subnet-add`)",
        reason="ADDRESSES_EXHAUSTED",
        network=network.name,
    )


def _allocate_static(
    tx: Transaction, network: Network, pools: Sequence[Pool], endpoint_id: str | None, text: str, field: str
) -> Address:
    subnets = ", ".join(pool.subnet for pool in pools)
    if not pools:
        raise InvalidArgument(field, text, f"nothing: network {network.name} has no subnet of that family")
    address = ipaddress.ip_address(text)
    pool = next((pool for pool in pools if address in _subnet(pool.subnet)), None)
    if pool is None:
        raise InvalidArgument(field, text, f"an address inside {subnets} (network {network.name})")
    _member(field, text, _subnet(pool.subnet))
    hold(tx, network, address, endpoint_id, field)
    return _address(pool, address)


def hold(tx: Transaction, network: Network, address: IPAddress, endpoint_id: str | None, field: str) -> None:
    """Take one address for an endpoint.

    Raises:
        AddressTaken: naming the holder.
    """
    try:
        tx.execute("INSERT INTO addresses VALUES (?, ?, ?)", network.id, address.packed, endpoint_id)
    except sqlite3.IntegrityError as error:
        holder = _holder(tx, network, address)
        raise AddressTaken(
            f"{field}: {address} of network {network.name} is taken by {holder}",
            hint="choose another address, or none to take a free one", network=network.name, holder=holder,
        ) from error  # fmt: skip


def _holder(tx: Transaction, network: Network, address: IPAddress) -> str:
    row = tx.row(
        "SELECT endpoints.name, endpoints.id FROM addresses JOIN endpoints ON endpoints.id = endpoint_id"
        " WHERE addresses.network_id = ? AND address = ?", network.id, address.packed,
    )  # fmt: skip
    if row:
        return f"endpoint {row[0] or row[1][:12]}"
    row = tx.row(
        "SELECT json_extract(remote_endpoints.body, '$.name'), nodes.name, endpoint_id, node_id FROM remote_addresses"
        " JOIN remote_endpoints ON remote_endpoints.id = endpoint_id JOIN nodes ON nodes.id = node_id"
        " WHERE remote_addresses.network_id = ? AND address = ?", network.id, address.packed,
    )  # fmt: skip
    if row:
        name, node, endpoint_id, node_id = row
        if endpoint_id == host_id(network.id, node_id):
            return f"node {node} itself"
        return f"endpoint {name or endpoint_id[:12]} on node {node}"
    return "the network itself (gateway or auxiliary address)"


def _next_free(tx: Transaction, network: Network, pool: Pool, cursor: int) -> int | None:
    subnet, within = _subnet(pool.subnet), _subnet(pool.ip_range or pool.subnet)
    first, last = _usable(subnet)
    low, high = max(_first(within), first), min(_last(within), last)
    after = cursor + 1 if low <= cursor < high else low
    for start, end in ((after, high), (low, after - 1)):
        free = _first_gap(_taken(tx, network.id, start, end, subnet.max_prefixlen // 8), start, end)
        if free is not None:
            return free
    return None


def _taken(tx: Transaction, network_id: str, start: int, end: int, width: int) -> Iterator[int]:
    """Yield taken addresses in order; read only as far as the caller looks."""
    if start > end:
        return
    rows = tx.execute(
        "SELECT address FROM addresses WHERE network_id = ? AND address BETWEEN ? AND ? AND length(address) = ?"
        " ORDER BY address", network_id, start.to_bytes(width, "big"), end.to_bytes(width, "big"), width,
    )  # fmt: skip
    for row in rows:
        yield int.from_bytes(row[0], "big")


def _first_gap(taken: Iterator[int], start: int, end: int) -> int | None:
    candidate = start
    for address in taken:
        if address != candidate:
            break
        candidate += 1
    return candidate if candidate <= end else None


def _address(pool: Pool, address: IPAddress) -> Address:
    prefix = _subnet(pool.subnet).prefixlen
    gateway = pool.aux_addresses.get(f"DefaultGatewayIPv{address.version}", pool.gateway)
    return Address(address=str(address), prefix=prefix, gateway=gateway)
