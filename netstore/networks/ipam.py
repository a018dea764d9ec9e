"""Address management: pools of networks and addresses of endpoints, inside the store's transactions.

Dynamic addresses are given in turn, after the last one given, so that an address is reused as late as possible.
The table's keys and triggers decide what is taken; this module chooses, and names the holder when the answer is no.
"""

from __future__ import annotations

import ipaddress
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network

from netstore.errors import AddressTaken, Exhausted, FailedPrecondition, InvalidArgument
from netstore.model import Address, Network, Pool
from netstore.store import Transaction

__all__ = [
    "DEFAULT_POOLS",
    "HostRoute",
    "allocate",
    "choose_subnet",
    "overlapping_route",
    "release",
    "reserve_pool",
    "validate_pool",
]


@dataclass(frozen=True, slots=True)
class HostRoute:
    """A route of the node: destination and the interface that it leaves by."""

    destination: IPv4Network
    interface: str


DEFAULT_POOLS: tuple[tuple[IPv4Network, int], ...] = (
    *((IPv4Network(f"172.{second}.0.0/16"), 16) for second in range(17, 32)),
    (IPv4Network("192.168.0.0/16"), 20),
)
"""Docker's default-address-pools: base and prefix length of what is cut from it."""


def validate_pool(pool: Pool, index: int) -> Pool:
    """Check one pool and fill in its gateway; a pool without a subnet is returned as it is. Pure.

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
    if subnet.prefixlen > 30 or subnet.prefixlen < 4 or subnet.is_multicast or subnet.is_loopback:
        raise InvalidArgument(f"{field}.subnet", pool.subnet, "a unicast IPv4 subnet from /4 to /30")
    gateway = _member(f"{field}.gateway", pool.gateway, subnet) if pool.gateway else subnet[1]
    if pool.ip_range and not _network(f"{field}.ip_range", pool.ip_range).subnet_of(subnet):
        raise InvalidArgument(f"{field}.ip_range", pool.ip_range, f"a range inside {subnet}")
    aux = {
        name: str(_member(f"{field}.aux_addresses[{name}]", address, subnet))
        for name, address in pool.aux_addresses.items()
    }
    return replace(pool, subnet=str(subnet), gateway=str(gateway), aux_addresses=aux)


def _network(field: str, text: str) -> IPv4Network:
    try:
        return IPv4Network(text)
    except ValueError as error:
        try:
            meant = f"; did you mean {ipaddress.ip_network(text, strict=False)}?"
        except ValueError:
            meant = ""
        raise InvalidArgument(field, text, f"an IPv4 network such as 10.1.0.0/24{meant}") from error


def _member(field: str, text: str, subnet: IPv4Network) -> IPv4Address:
    accepted = f"an address inside {subnet}, not its first or last"
    try:
        address = IPv4Address(text)
    except ValueError as error:
        raise InvalidArgument(field, text, accepted) from error
    if address not in subnet or address in (subnet.network_address, subnet.broadcast_address):
        raise InvalidArgument(field, text, accepted)
    return address


def choose_subnet(
    tx: Transaction, routes: Sequence[HostRoute], pools: Sequence[tuple[IPv4Network, int]] = DEFAULT_POOLS
) -> str:
    """Return the first default subnet that no network and no route of the host overlaps.

    Raises:
        Exhausted: none is left.
    """
    taken = [IPv4Network(row[0]) for row in tx.rows("SELECT subnet FROM subnets WHERE length(first) = 4")]
    for base, prefix in pools:
        for candidate in base.subnets(new_prefix=prefix):
            if overlapping_route(candidate, routes) is None and not any(candidate.overlaps(used) for used in taken):
                return str(candidate)
    clashes = {str(route.destination): route.interface for route in routes if _matters(route)}
    raise Exhausted(
        "no default address pool is free: every one overlaps a network or a route of the host",
        hint="give --subnet, or remove unused networks (`netstore network prune`)",
        reason="POOLS_EXHAUSTED",
        routes=", ".join(f"{destination} ({interface})" for destination, interface in clashes.items()),
    )


def overlapping_route(subnet: IPv4Network, routes: Sequence[HostRoute]) -> HostRoute | None:
    """Return a route of the host that the subnet overlaps. Default routes, and their halves, do not count."""
    return next((route for route in routes if _matters(route) and route.destination.overlaps(subnet)), None)


def _matters(route: HostRoute) -> bool:
    return route.destination.prefixlen > 1


def reserve_pool(tx: Transaction, network: Network, pool: Pool) -> None:
    """Take a pool for a network, with its gateway and auxiliary addresses.

    Raises:
        FailedPrecondition: it overlaps another network's.
    """
    subnet = IPv4Network(pool.subnet)
    first, last = subnet.network_address.packed, subnet.broadcast_address.packed
    try:
        tx.execute("INSERT INTO subnets VALUES (?, ?, ?, ?, ?)", network.id, pool.subnet, first, last, first)
    except sqlite3.IntegrityError as error:
        row = tx.row(
            "SELECT networks.name, subnet FROM subnets JOIN networks ON networks.id = network_id"
            " WHERE length(first) = 4 AND first <= ? AND last >= ?", last, first,
        )  # fmt: skip
        name, other = row or ("?", "?")
        raise FailedPrecondition(
            f"subnet {pool.subnet} overlaps {other} of network {name}",
            hint="choose another subnet, or none to take a free one",
            reason="SUBNET_OVERLAP", network=name, subnet=other,
        ) from error  # fmt: skip
    for address in dict.fromkeys((pool.gateway, *pool.aux_addresses.values())):
        tx.execute("INSERT INTO addresses VALUES (?, ?, NULL)", network.id, IPv4Address(address).packed)


def allocate(tx: Transaction, network: Network, endpoint_id: str, static: str, *, field: str) -> Address:
    """Take an address of a network for an endpoint: the static one, or the next free one.

    Raises:
        InvalidArgument: the static address is in none of the network's subnets.
        AddressTaken: it has a holder.
        Exhausted: no address is free.
    """
    if static:
        return _allocate_static(tx, network, endpoint_id, static, field)
    for pool in network.pools:
        address = _next_free(tx, network, pool)
        if address is not None:
            tx.execute("INSERT INTO addresses VALUES (?, ?, ?)", network.id, address.packed, endpoint_id)
            tx.execute(
                "UPDATE subnets SET cursor = ? WHERE network_id = ? AND subnet = ?",
                address.packed, network.id, pool.subnet,
            )  # fmt: skip
            return _address(pool, address)
    raise Exhausted(
        f"network {network.name} has no free address in {', '.join(p.ip_range or p.subnet for p in network.pools)}",
        hint="remove unused endpoints, or make a network with a larger subnet",
        reason="ADDRESSES_EXHAUSTED",
        network=network.name,
    )


def _allocate_static(tx: Transaction, network: Network, endpoint_id: str, text: str, field: str) -> Address:
    subnets = ", ".join(pool.subnet for pool in network.pools)
    try:
        address = IPv4Address(text)
    except ValueError as error:
        raise InvalidArgument(field, text, f"an IPv4 address inside {subnets}") from error
    pool = next((pool for pool in network.pools if address in IPv4Network(pool.subnet)), None)
    if pool is None:
        raise InvalidArgument(field, text, f"an address inside {subnets} (network {network.name})")
    _member(field, text, IPv4Network(pool.subnet))
    try:
        tx.execute("INSERT INTO addresses VALUES (?, ?, ?)", network.id, address.packed, endpoint_id)
    except sqlite3.IntegrityError as error:
        holder = _holder(tx, network, address)
        raise AddressTaken(
            f"{field}: {text} of network {network.name} is taken by {holder}",
            hint="choose another address, or none to take a free one", network=network.name, holder=holder,
        ) from error  # fmt: skip
    return _address(pool, address)


def _holder(tx: Transaction, network: Network, address: IPv4Address) -> str:
    row = tx.row(
        "SELECT endpoints.name, endpoints.id FROM addresses JOIN endpoints ON endpoints.id = endpoint_id"
        " WHERE addresses.network_id = ? AND address = ?", network.id, address.packed,
    )  # fmt: skip
    return f"endpoint {row[0] or row[1][:12]}" if row else "the network itself (gateway or auxiliary address)"


def _next_free(tx: Transaction, network: Network, pool: Pool) -> IPv4Address | None:
    subnet, within = IPv4Network(pool.subnet), IPv4Network(pool.ip_range or pool.subnet)
    low, high = int(within.network_address), int(within.broadcast_address)
    low, high = max(low, int(subnet.network_address) + 1), min(high, int(subnet.broadcast_address) - 1)
    row = tx.row("SELECT cursor FROM subnets WHERE network_id = ? AND subnet = ?", network.id, pool.subnet)
    cursor = int.from_bytes(row[0], "big") if row else low
    after = cursor + 1 if low <= cursor < high else low
    for start, end in ((after, high), (low, after - 1)):
        free = _first_gap(_taken(tx, network.id, start, end), start, end)
        if free is not None:
            return IPv4Address(free)
    return None


def _taken(tx: Transaction, network_id: str, start: int, end: int) -> Iterator[int]:
    """Yield taken addresses in order; read only as far as the caller looks."""
    if start > end:
        return
    rows = tx.execute(
        "SELECT address FROM addresses WHERE network_id = ? AND address BETWEEN ? AND ? ORDER BY address",
        network_id, start.to_bytes(4, "big"), end.to_bytes(4, "big"),
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


def _address(pool: Pool, address: IPv4Address) -> Address:
    return Address(address=str(address), prefix=IPv4Network(pool.subnet).prefixlen, gateway=pool.gateway)


def release(tx: Transaction, endpoint_id: str) -> None:
    """Give back every address of an endpoint."""
    tx.execute("DELETE FROM addresses WHERE endpoint_id = ?", endpoint_id)
