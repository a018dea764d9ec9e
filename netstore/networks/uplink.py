"""What the node's routes say: which destinations are taken, and the way out with its MTU."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_network
from pathlib import Path

from netstore.kernel.links import host_socket
from netstore.model import Network, Pool, Scope
from netstore.networks import ipam
from netstore.networks.ipam import HostRoute

__all__ = ["DEFAULT_MTU", "Uplink", "overlaps", "read_uplink", "warnings"]

DEFAULT_MTU = 1500
"""Bytes; of a node without an uplink."""

RTF_REJECT, RTF_LOCAL = 0x200, 0x80000000


@dataclass(frozen=True, slots=True)
class Uplink:
    """Every route of the node; index and MTU of the interface of its default route, 0 where there is none."""

    routes: tuple[HostRoute, ...]
    index: int = 0
    mtu: int = 0


def read_uplink() -> Uplink:
    """Read routes, and the default route's interface, of the daemon's own namespace. Blocking.

    From /proc/net/route and ipv6_route: one route a line, IPv4 in host byte order, metrics in decimal and hexadecimal.
    """
    routes, uplinks = [], []
    place = Path("/proc/thread-self/net")
    for line in (place / "route").read_text().splitlines()[1:]:
        interface, destination, _, _, _, _, metric, mask = line.split()[:8]
        network: IPv4Network | IPv6Network = IPv4Network((_address(destination), IPv4Address(_address(mask)).exploded))
        routes.append(HostRoute(network, interface))
        if network.prefixlen == 0:
            uplinks.append((int(metric), interface))
    for line in (place / "ipv6_route").read_text().splitlines() if (place / "ipv6_route").exists() else ():
        destination, length, *_, metric, _, _, flags, interface = line.split()
        network = IPv6Network((bytes.fromhex(destination), int(length, 16)))
        if network.is_multicast or network.is_link_local or int(flags, 16) & (RTF_LOCAL | RTF_REJECT):
            continue
        routes.append(HostRoute(network, interface))
        if network.prefixlen == 0:
            uplinks.append((int(metric, 16), interface))
    link = host_socket().link(min(uplinks)[1]) if uplinks else None
    return Uplink(tuple(routes), link.index, link.mtu) if link else Uplink(tuple(routes))


def _address(text: str) -> bytes:
    return bytes.fromhex(text)[::-1] if sys.byteorder == "little" else bytes.fromhex(text)


def _leads_to_one(route: HostRoute, subnets: Sequence[IPv4Network | IPv6Network]) -> bool:
    only = route.destination
    return only.prefixlen == only.max_prefixlen and any(only.network_address in subnet for subnet in subnets)


def warnings(pools: Iterable[Pool], routes: Sequence[HostRoute]) -> list[str]:
    """Return a warning for each pool that overlaps a route of the host."""
    found = []
    for pool in pools:
        route = ipam.overlapping_route(ip_network(pool.subnet), routes) if ipam.is_chosen(pool) else None
        if route:
            found.append(
                f"subnet {pool.subnet} overlaps the host's route {route.destination} on {route.interface}: "
                "what is behind it may become unreachable"
            )
    return found


def overlaps(networks: Sequence[Network], routes: Sequence[HostRoute]) -> list[tuple[Network, str]]:
    """Return networks whose subnets overlap a route that came later than they did, with what to say of each.

    Routes of our networks' own interfaces are none, nor are those to single endpoints of other nodes; and what was
    warned of at create is known.
    """
    ours = {network.interface for network in networks}
    spanning = [ip_network(pool.subnet) for each in networks if each.scope is Scope.GLOBAL for pool in each.pools]
    foreign = [route for route in routes if route.interface not in ours and not _leads_to_one(route, spanning)]
    return [
        (network, text)
        for network in networks
        if not network.spec.config_only
        for text in warnings(network.pools, foreign)
        if text not in network.overlaps
    ]
