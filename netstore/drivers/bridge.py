"""The driver `bridge`: one Linux bridge a network, a veth pair an endpoint, NAT to the outside.

Cost of an endpoint: two netlink batches and one nftables transaction, whatever the number of endpoints.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from netstore.drivers.base import Driver, Observed
from netstore.drivers.options import Option, boolean, interface, ipv4, number, parse
from netstore.errors import Exhausted, FailedPrecondition, InvalidArgument, KernelError
from netstore.kernel import netlink
from netstore.kernel.firewall import Element, port_element
from netstore.kernel.links import host_socket
from netstore.kernel.namespaces import socket_inside
from netstore.kernel.netlink import RouteSocket
from netstore.model import Endpoint, Network, PortMapping, kernel_name, stable_mac

__all__ = ["BridgeDriver"]

BR_MAX_PORTS = 1023
LOOPBACK_INDEX = 1

NAME = "com.docker.network.bridge.name"
MASQUERADE = "com.docker.network.bridge.enable_ip_masquerade"
ICC = "com.docker.network.bridge.enable_icc"
HOST_BINDING = "com.docker.network.bridge.host_binding_ipv4"
MTU = "com.docker.network.driver.mtu"
PREFIX = "com.docker.network.container_iface_prefix"


class BridgeDriver(Driver):
    """See the module."""

    name = "bridge"
    options: Sequence[Option] = (
        Option(NAME, interface, "", "name of the Linux bridge; by default derived from the network's id"),
        Option(MASQUERADE, boolean, True, "source NAT for traffic that leaves the node"),
        Option(ICC, boolean, True, "endpoints of the network may talk to each other"),
        Option(HOST_BINDING, ipv4, "", "host address of published ports that name none; empty is every address"),
        Option(MTU, number(68, 65535), 0, "MTU of bridge and endpoints; 0 takes the uplink's"),
        Option(PREFIX, interface, "eth", "first part of interface names in containers"),
    )

    def validate(self, network: Network) -> Network:
        """Choose the bridge's name; check pools: one IPv4 subnet with a gateway inside."""
        values = parse(self.options, network.spec.options)
        if len(network.spec.pools) > 1:
            raise InvalidArgument(
                "spec.ipam", [pool.subnet for pool in network.spec.pools], "one IPv4 pool on a bridge network"
            )
        name = values[NAME] or kernel_name("nsbr-", network.id)
        return replace(network, interface=name, mtu=values[MTU] or network.mtu)

    def apply_network(self, network: Network) -> None:
        """Make bridge, gateway address, sysctls and firewall elements."""
        route = host_socket()
        found = route.link(network.interface)
        if found is None:
            route.run([netlink.bridge_add(network.interface, mac=stable_mac(network.id), mtu=network.mtu)])
        elif found.alias != _alias("network", network.id):
            raise FailedPrecondition(
                f"interface {network.interface} exists and is not ours", hint=f"choose another {NAME}, or remove it",
            )  # fmt: skip
        with self._undone(network, made=found is None):
            index = route.index_of(network.interface)
            assert index is not None
            route.run(
                [
                    netlink.link_set(index, alias=_alias("network", network.id), ipv6_addresses=False),
                    *(
                        netlink.address_add(index, gateway, prefix, tolerate={errno.EEXIST})
                        for gateway, prefix in _gateways(network)
                    ),
                    netlink.link_set(index, up=True),
                ]
            )
            _sysctl(f"net/ipv4/conf/{network.interface}/route_localnet", "1")
            _sysctl("net/ipv4/ip_forward", "1")
            self.host.firewall.add(self._network_elements(network))

    def remove_network(self, network: Network) -> None:
        """Remove firewall elements, then the bridge, if it is ours."""
        self.host.firewall.remove(self._network_elements(network))
        found = host_socket().link(network.interface)
        if found is not None and found.alias == _alias("network", network.id):
            self.host.deletions.delete(network.interface)

    def apply_endpoint(self, network: Network, endpoint: Endpoint, namespace: int | None) -> None:
        """Make the pair with its peer inside, then what is inside, then the published ports."""
        route = host_socket()
        made = self._make_pair(route, network, endpoint, namespace)
        try:
            if namespace is not None:
                self._configure(network, endpoint, namespace)
            self.host.firewall.add(_port_elements(endpoint, endpoint.ports))
        except BaseException:
            if made:
                self.remove_endpoint(network, endpoint)
            raise

    def remove_endpoint(self, network: Network, endpoint: Endpoint) -> None:
        """Unpublish its ports, then delete the pair."""
        self.host.firewall.remove(_port_elements(endpoint, endpoint.ports))
        self.host.deletions.delete(endpoint.host_interface)

    def observe(self, network: Network) -> Observed:
        """Look for the bridge and its ports."""
        route = host_socket()
        index = route.index_of(network.interface)
        ports = route.links(master=index) if index else []
        return Observed(interface=index is not None, endpoints=frozenset(port.name for port in ports))

    def default_route(self, network: Network, endpoint: Endpoint, namespace: int) -> None:
        """Replace the namespace's default route."""
        with _socket_in(namespace) as route:
            index = route.index_of(endpoint.interface_name)
            if index is not None:
                route.run([netlink.route_replace(address.gateway, index) for address in _routed(network, endpoint)])

    def apply_ports(
        self, network: Network, endpoint: Endpoint, *, add: Collection[PortMapping], remove: Collection[PortMapping]
    ) -> None:
        """Change map elements: one transaction, no process."""
        if remove:
            self.host.firewall.remove(_port_elements(endpoint, remove))
        if add:
            self.host.firewall.add(_port_elements(endpoint, add))

    def elements(self, network: Network, endpoints: Collection[Endpoint]) -> set[Element]:
        """Return those of the network and of its endpoints' ports."""
        ports = (_port_elements(endpoint, endpoint.ports) for endpoint in endpoints)
        return set(self._network_elements(network)).union(*ports)

    def _network_elements(self, network: Network) -> list[Element]:
        name = network.interface
        elements = [("bridges", name), ("same", f"{name} . {name}")]
        elements += [("subnets", f"{name} . {pool.subnet}") for pool in network.pools]
        if network.spec.internal:
            elements.append(("internal", name))
        elif parse(self.options, network.spec.options)[MASQUERADE]:
            elements.append(("masqueraded", name))
        return elements

    def _make_pair(self, route: RouteSocket, network: Network, endpoint: Endpoint, namespace: int | None) -> bool:
        """Make the veth pair; False when it is there already and as it should be."""
        master = route.index_of(network.interface)
        if master is None:
            raise KernelError(
                errno.ENODEV,
                "attaching to bridge",
                network.interface,
                hint="`netstore system check --repair` remakes it",
            )
        requests = [
            netlink.veth_add(
                endpoint.host_interface,
                master=master,
                mtu=network.mtu,
                peer=endpoint.interface_name if namespace is not None else kernel_name("nsp-", endpoint.id),
                peer_mac=endpoint.mac_address,
                peer_namespace=namespace,
            ),
            netlink.port_set(
                endpoint.host_interface,
                alias=_alias("endpoint", endpoint.id),
                # Where br_netfilter hands bridged frames to nftables, a hairpin needs the bridge's consent too.
                hairpin=True,
                isolated=not parse(self.options, network.spec.options)[ICC],
            ),
            netlink.link_set(endpoint.host_interface, up=True),
        ]
        try:
            route.run(requests[:1])
        except KernelError as error:
            return self._pair_exists(error, route, network, endpoint, namespace)
        try:
            route.run(requests[1:])
        except BaseException:
            self.host.deletions.delete(endpoint.host_interface)
            raise
        return True

    def _pair_exists(
        self, error: KernelError, route: RouteSocket, network: Network, endpoint: Endpoint, namespace: int | None
    ) -> bool:
        if error.errno == errno.EXFULL:
            raise Exhausted(
                f"bridge {network.interface} of network {network.name} has {BR_MAX_PORTS} ports, the kernel's limit",
                hint="attach to another network",
            ) from error
        if error.errno != errno.EEXIST or route.link(endpoint.host_interface) is None:
            raise error
        if namespace is not None:
            with _socket_in(namespace) as inside:
                peer = inside.link(endpoint.interface_name)
            if peer is not None and peer.mac == endpoint.mac_address:
                return False
        self.host.deletions.delete(endpoint.host_interface)
        return self._make_pair(route, network, endpoint, namespace)

    @staticmethod
    def _configure(network: Network, endpoint: Endpoint, namespace: int) -> None:
        with _socket_in(namespace) as route:
            index = route.index_of(endpoint.interface_name)
            if index is None:
                raise KernelError(errno.ENODEV, "configuring", endpoint.interface_name)
            requests = [netlink.link_set(LOOPBACK_INDEX, up=True), netlink.link_set(index, ipv6_addresses=False)]
            requests += [
                netlink.address_add(index, address.address, address.prefix, tolerate={errno.EEXIST})
                for address in endpoint.addresses
            ]
            requests.append(netlink.link_set(index, up=True))
            if endpoint.default_route:
                requests += [netlink.route_replace(address.gateway, index) for address in _routed(network, endpoint)]
            route.run(requests)

    @contextmanager
    def _undone(self, network: Network, *, made: bool) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if made:
                self.remove_network(network)
            raise


def _alias(kind: str, resource_id: str) -> str:
    return f"netstore {kind} {resource_id}"


def _socket_in(namespace: int) -> RouteSocket:
    return RouteSocket(socket_inside(namespace, socket.AF_NETLINK, socket.SOCK_RAW))


def _gateways(network: Network) -> list[tuple[str, int]]:
    return [(pool.gateway, ipaddress.ip_network(pool.subnet).prefixlen) for pool in network.pools if pool.gateway]


def _routed(network: Network, endpoint: Endpoint) -> list[Any]:
    if network.spec.internal:
        return []
    return [address for address in endpoint.addresses if address.gateway]


def _port_elements(endpoint: Endpoint, ports: Collection[PortMapping]) -> list[Element]:
    return [port_element(port, endpoint.addresses[0].address) for port in ports if endpoint.addresses]


def _sysctl(name: str, value: str) -> None:
    """Write one value below /proc/sys of this thread's network namespace, when it differs."""
    path = Path("/proc/sys", name)
    try:
        if path.read_text().strip() != value:
            path.write_text(value)
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "setting sysctl", name.replace("/", ".")) from error
