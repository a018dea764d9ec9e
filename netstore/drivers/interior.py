"""What drivers do inside a sandbox, the same whatever the interface is: addresses, state, routes, sysctls."""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection, Sequence

from netstore.drivers.options import BANDWIDTH_IN, BANDWIDTH_OUT, ENDPOINT_OPTIONS, SYSCTLS, parse
from netstore.errors import InvalidArgument, KernelError
from netstore.kernel import addressing, netlink
from netstore.kernel.namespaces import inside, socket_inside
from netstore.kernel.route import Request, RouteSocket
from netstore.kernel.sysctls import accept_ipv6, ipv6_present, link_local, sysctl
from netstore.model import Address, Endpoint, Network, stable_mac

__all__ = [
    "MIN_IPV6_MTU",
    "NO_IPV6",
    "alias",
    "changes_inside",
    "configure",
    "drop_addresses",
    "has_ipv6",
    "rates",
    "replace_default_route",
    "socket_in",
    "speaks_ipv6",
]

LOOPBACK_INDEX = 1
MIN_IPV6_MTU = 1280  # RFC 8200, section 5
NO_IPV6 = frozenset({errno.EAFNOSUPPORT})


def alias(kind: str, resource_id: str) -> str:
    """Return the mark by which an interface of ours is found: its owner ("network", "endpoint") and the owner's id."""
    return f"netstore {kind} {resource_id}"


def speaks_ipv6(network: Network) -> bool:
    """Say whether the kernel has IPv6 on interfaces of the network's MTU; where not, it refuses settings of it."""
    return not 0 < network.mtu < MIN_IPV6_MTU and ipv6_present()


def has_ipv6(network: Network) -> bool:
    """Say whether a network has IPv6 addresses."""
    return any(":" in pool.subnet for pool in network.pools)


def socket_in(namespace: int) -> RouteSocket:
    """Return a route socket of a namespace."""
    return RouteSocket(socket_inside(namespace, socket.AF_NETLINK, socket.SOCK_RAW))


def rates(network: Network, endpoint: Endpoint) -> tuple[int, int]:
    """Return what an endpoint may receive and send: its own limits, where it has none its network's."""
    own = endpoint.spec.options
    shared = {key: text for key, text in network.spec.options.items() if key in (BANDWIDTH_IN, BANDWIDTH_OUT)}
    values = parse(ENDPOINT_OPTIONS, {**shared, **own})
    return values[BANDWIDTH_IN], values[BANDWIDTH_OUT]


def configure(network: Network, endpoint: Endpoint, namespace: int, *, gateways: Collection[str] = ()) -> None:
    """Give an interface that is inside its addresses, state, routes and sysctls.

    `gateways` are those that the network's own interface on this host holds: their MAC is known.

    Raises:
        InvalidArgument: a sysctl that the kernel does not take.
        KernelError: the kernel refused.
    """
    with socket_in(namespace) as route:
        index = route.index_of(endpoint.interface_name)
        if index is None:
            raise KernelError(errno.ENODEV, "configuring", endpoint.interface_name)
        sysctls = parse(ENDPOINT_OPTIONS, endpoint.spec.options)[SYSCTLS]
        addresses = [(each.address, each.prefix) for each in endpoint.every_address]
        if has_ipv6(network):
            addresses.append((link_local(endpoint.mac_address), 64))
            with inside(namespace):
                accept_ipv6(endpoint.interface_name)
        requests = [netlink.link_set(LOOPBACK_INDEX, up=True)]
        requests.append(netlink.link_set(index, mtu=network.mtu, ipv6_addresses=not speaks_ipv6(network)))
        requests += [addressing.address_add(index, *address, tolerate={errno.EEXIST}) for address in addresses]
        requests.append(netlink.link_set(index, up=True))
        if endpoint.default_route:
            requests += [addressing.route_replace(address.gateway, index) for address in _routed(network, endpoint)]
        requests += [addressing.route_replace(each.gateway, index, each.destination) for each in network.spec.routes]
        requests += [addressing.neighbour_set(index, each, stable_mac(network.id)) for each in gateways]
        route.run(requests)
        if sysctls:
            _set_sysctls(namespace, endpoint.interface_name, sysctls)


def drop_addresses(endpoint: Endpoint, namespace: int) -> None:
    """Take an endpoint's addresses from its interface, with the routes that they carry."""
    with socket_in(namespace) as route:
        index = route.index_of(endpoint.interface_name)
        if index is not None:
            route.run([addressing.address_delete(index, each.address, each.prefix) for each in endpoint.addresses])


def changes_inside(network: Network, index: int, *, before: Network | None) -> list[Request]:
    """Return what makes an interface inside follow a change of its network: MTU and routes."""
    unwanted = set(before.spec.routes if before else ()) - set(network.spec.routes)
    return [
        netlink.link_set(index, mtu=network.mtu),
        netlink.link_set(index, ipv6_addresses=False, tolerate=NO_IPV6),
        *(addressing.route_delete(each.gateway, index, each.destination) for each in unwanted),
        *(addressing.route_replace(each.gateway, index, each.destination) for each in network.spec.routes),
    ]


def replace_default_route(network: Network, endpoint: Endpoint, namespace: int) -> None:
    """Make an endpoint's gateways the namespace's default routes."""
    with socket_in(namespace) as route:
        index = route.index_of(endpoint.interface_name)
        if index is not None:
            route.run([addressing.route_replace(address.gateway, index) for address in _routed(network, endpoint)])


def _routed(network: Network, endpoint: Endpoint) -> list[Address]:
    if network.spec.internal:
        return []
    return [address for address in endpoint.addresses if address.gateway]


def _set_sysctls(namespace: int, interface_name: str, settings: Sequence[tuple[str, str]]) -> None:
    for name, value in settings:
        try:
            with inside(namespace):
                sysctl(name.replace("IFNAME", interface_name), value)
        except KernelError as error:
            setting = f"{name.replace('/', '.')}={value}"
            accepted = f"a setting that the kernel has ({error.what})"
            raise InvalidArgument(f"spec.options[{SYSCTLS}]", setting, accepted) from error
