"""What the drivers bridge and overlay share: one Linux bridge a network, a veth pair an endpoint, NAT to the outside.

Cost of an endpoint: two netlink batches and one nftables transaction, whatever the number of endpoints.
"""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from netstore.drivers.base import Driver, Host, Observed
from netstore.drivers.interior import (
    MIN_IPV6_MTU,
    NO_IPV6,
    alias,
    changes_inside,
    configure,
    has_ipv6,
    rates,
    replace_default_route,
    socket_in,
    speaks_ipv6,
)
from netstore.drivers.options import (
    BANDWIDTHS,
    Option,
    boolean,
    choice,
    interface,
    interfaces,
    ipv4,
    ipv6,
    number,
    parse,
)
from netstore.errors import Exhausted, FailedPrecondition, InvalidArgument, KernelError
from netstore.kernel import addressing, netlink
from netstore.kernel.conntrack import forget_address, forget_published, forget_strays
from netstore.kernel.firewall import Element, direct_elements, guard_elements, port_elements, source_elements
from netstore.kernel.links import host_socket
from netstore.kernel.route import Request, RouteSocket
from netstore.kernel.sysctls import accept_ipv6, forward_ipv6, link_local, sysctl
from netstore.model import BRIDGE_PREFIX, Address, Endpoint, Network, PortMapping, kernel_name, stable_mac

__all__ = ["ICC", "INHIBIT", "ISOLATE", "MODES", "MTU", "NAME", "SHARED_OPTIONS", "TRUSTED", "BridgedDriver",
           "masked_elements"]  # fmt: skip

BR_MAX_PORTS = 1023

NAME = "com.docker.network.bridge.name"
MASQUERADE = "com.docker.network.bridge.enable_ip_masquerade"
ICC = "com.docker.network.bridge.enable_icc"
HOST_BINDING = "com.docker.network.bridge.host_binding_ipv4"
MTU = "com.docker.network.driver.mtu"
PREFIX = "com.docker.network.container_iface_prefix"
MODES = {4: "com.docker.network.bridge.gateway_mode_ipv4", 6: "com.docker.network.bridge.gateway_mode_ipv6"}
SOURCES = {4: "com.docker.network.host_ipv4", 6: "com.docker.network.host_ipv6"}
INHIBIT = "com.docker.network.bridge.inhibit_ipv4"
TRUSTED = "com.docker.network.bridge.trusted_host_interfaces"
_MODE = choice("nat", "nat-unprotected", "routed", "isolated")
GUARD = "netstore.bridge.spoof_guard"
ISOLATE = "isolate"


SHARED_OPTIONS: Sequence[Option] = (
    Option(MASQUERADE, boolean, True, "source NAT for traffic that leaves the node", live=True),
    Option(ICC, boolean, True, "endpoints of the network may talk to each other", live=True),
    Option(HOST_BINDING, ipv4, "", "host address of published ports that name none; empty is every address",
           live=True),
    Option(MTU, number(68, 65535), 0, "MTU of bridge and endpoints; 0 takes the uplink's", live=True),
    Option(PREFIX, interface, "eth", "first part of interface names in containers"),
    Option(MODES[4], _MODE, "nat", "how IPv4 reaches the endpoints: by NAT of published ports; with their other"
           " ports open too (nat-unprotected); published ports at their own addresses (routed); not at all, the"
           " host included (isolated, with --internal)", live=True),
    Option(MODES[6], _MODE, "nat", "the same for IPv6", live=True),
    Option(SOURCES[4], ipv4, "", "source address of IPv4 that leaves the node, instead of its interface's",
           live=True),
    Option(SOURCES[6], ipv6, "", "the same for IPv6", live=True),
    Option(TRUSTED, interfaces, (), "interfaces of the host, separated by ':', from which published ports may be"
           " reached at the endpoints' own addresses", live=True),
    Option(ISOLATE, choice("false", "true", "strict"), "false", "strict: nothing passes between this network and"
           " others of the node, by published ports neither; false and true (podman's): by published ports alone",
           live=True),
    Option(GUARD, boolean, True, "drop what endpoints send with a MAC or source address that is not theirs, and"
           " router advertisements; false for those that route for others", live=True),
    *(replace(each, doc=f"{each.doc}: each endpoint that has no limit of its own") for each in BANDWIDTHS),
)  # fmt: skip


class BridgedDriver(Driver):
    """See the module. A driver gives its name and options, those here among them."""

    publishes_ports = True
    has_policies = True
    has_services = True

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._virtual: dict[str, frozenset[str]] = {}  # services' addresses, by network id

    def validate(self, network: Network) -> Network:
        """Choose the bridge's name and MTU, and say which gateways it is itself."""
        values = parse(self.options, network.spec.options)
        for key in MODES.values():
            if values[key] == "isolated" and not network.spec.internal:
                raise InvalidArgument(f"spec.options[{key}]", "isolated", "isolated on an internal network only")
        mtu = values[MTU] or max(network.mtu, MIN_IPV6_MTU if network.spec.enable_ipv6 else 0)
        if network.spec.enable_ipv6 and mtu < MIN_IPV6_MTU:
            raise InvalidArgument(f"spec.options[{MTU}]", mtu, f"at least {MIN_IPV6_MTU} on a network with IPv6")
        held = tuple(gateway for gateway, _ in self.gateways(network))
        name = values.get(NAME) or kernel_name(BRIDGE_PREFIX, network.id)
        return replace(network, interface=name, mtu=mtu, host_seen_at=held)

    def apply_network(self, network: Network) -> None:
        """Make bridge, gateway address, sysctls and firewall elements."""
        route = host_socket()
        found = route.link(network.interface)
        if found is None:
            route.run([netlink.bridge_add(network.interface, mac=stable_mac(network.id))])
        elif found.alias != alias("network", network.id):
            raise FailedPrecondition(
                f"interface {network.interface} exists and is not ours", hint=f"choose another {NAME}, or remove it",
            )  # fmt: skip
        with self._undone(network, made=found is None):
            if has_ipv6(network):
                accept_ipv6(network.interface)
            index = route.index_of(network.interface)
            assert index is not None
            route.run(
                [
                    netlink.link_set(index, alias=alias("network", network.id), mtu=network.mtu),
                    netlink.link_set(index, ipv6_addresses=False, tolerate=NO_IPV6),
                    *(
                        addressing.address_add(index, gateway, prefix, tolerate={errno.EEXIST}, speaks=prefix != 128)
                        for gateway, prefix in self.bridge_addresses(network)
                    ),
                    netlink.link_set(index, up=True),
                ]
            )
            sysctl(f"net/ipv4/conf/{network.interface}/route_localnet", "1")
            sysctl("net/ipv4/ip_forward", "1")
            if has_ipv6(network):
                forward_ipv6()
            with self.host.firewall.steady:
                self.host.firewall.add(self.network_elements(network))

    def update_network(self, old: Network, new: Network, endpoints: Collection[Endpoint]) -> None:
        """Change the firewall's elements that differ, the ports' flags, and the MTU of bridge and pairs."""
        self.apply_network(new)
        with self.host.firewall.steady:
            present, wanted = self.elements(old, endpoints), self.elements(new, endpoints)
            self.host.firewall.remove(sorted(present - wanted))
            self.host.firewall.add(sorted(wanted - present))
        route = host_socket()
        isolated = not parse(self.options, new.spec.options)[ICC]
        requests = []
        for endpoint in endpoints:
            if old.mtu != new.mtu:
                requests.append(netlink.link_set(endpoint.host_interface, mtu=new.mtu))
            requests.append(_port(new, endpoint, isolated=isolated))
        gone = frozenset({errno.ENODEV})  # with its namespace: the reconciler's
        route.run([replace(request, tolerate=gone) for request in requests])

    def remove_network(self, network: Network) -> None:
        """Remove firewall elements, then the bridge, if it is ours."""
        self.host.firewall.remove(self.network_elements(network))
        self._virtual.pop(network.id, None)
        found = host_socket().link(network.interface)
        if found is not None and found.alias == alias("network", network.id):
            self.host.deletions.delete(network.interface)

    def apply_endpoint(self, network: Network, endpoint: Endpoint, namespace: int | None) -> None:
        """Make the pair with its peer inside, then what is inside, then the published ports."""
        route = host_socket()
        made = self._make_pair(route, network, endpoint, namespace)
        try:
            with self.host.firewall.steady:
                self.host.firewall.add(self._endpoint_elements(network, endpoint))
            if namespace is not None:
                configure(network, endpoint, namespace, gateways=self._gateways(network, endpoint))
                if any(rates(network, endpoint)):
                    self.update_endpoint(network, endpoint, namespace)
            forget_strays(endpoint.ports)
        except BaseException:
            if made:
                self.remove_endpoint(network, endpoint)
            raise

    def update_endpoint(
        self, network: Network, endpoint: Endpoint, namespace: int, *, before: Network | None = None
    ) -> None:
        """Limit both ends of the pair (what the host's end sends is what the endpoint receives); set MTU and routes."""
        incoming, outgoing = rates(network, endpoint)
        host = host_socket()
        with socket_in(namespace) as inside_:
            outer, inner = host.index_of(endpoint.host_interface), inside_.index_of(endpoint.interface_name)
            if outer is None or inner is None:
                raise KernelError(errno.ENODEV, "changing the interface of endpoint", endpoint.name or endpoint.id)
            host.run([netlink.rate_limit(outer, incoming)])
            inside_.run([netlink.rate_limit(inner, outgoing), *changes_inside(network, inner, before=before)])

    def remove_endpoint(self, network: Network, endpoint: Endpoint, namespace: int | None = None) -> None:
        """Unpublish its ports, then delete the pair."""
        self.host.firewall.remove(self._endpoint_elements(network, endpoint))
        self.forget_neighbours(network, [each.address for each in endpoint.every_address])
        self.host.deletions.delete(endpoint.host_interface)
        for each in endpoint.addresses:
            forget_address(each.address)
        forget_published(endpoint.ports, (), relay_port=self.host.relay_port())

    def forget_neighbours(self, network: Network, addresses: Collection[str]) -> None:
        """Take the MACs of endpoints' addresses from the bridge."""
        index = host_socket().index_of(network.interface)
        if index is not None:
            host_socket().run([addressing.neighbour_delete(index, address) for address in addresses])

    def observe(self, network: Network) -> Observed:
        """Look for the bridge and its ports."""
        route = host_socket()
        index = route.index_of(network.interface)
        ports = route.links(master=index) if index else []
        neighbours = route.permanent_neighbours(index) if index else {}
        return Observed(
            interface=index is not None,
            endpoints=frozenset(port.name for port in ports),
            neighbours=frozenset(neighbours),
            single=_single(route, index, network) if index else frozenset(),
        )

    def expect_services(self, network: Network, addresses: Collection[str]) -> None:
        """Keep them for `bridge_addresses`."""
        self._virtual[network.id] = frozenset(addresses)

    def single(self, network: Network) -> frozenset[str]:
        """Return the services' addresses, and what else the bridge has alone."""
        return frozenset(address for address, prefix in self.bridge_addresses(network) if prefix == _whole(address))

    def apply_services(self, network: Network) -> None:
        """Add what the bridge lacks, and remove what is nobody's any more."""
        route = host_socket()
        index = route.index_of(network.interface)
        if index is None:  # the reconciler remakes it, with them
            return
        wanted = self.single(network)
        there = _single(route, index, network)
        requests = [addressing.address_delete(index, each, _whole(each)) for each in there - wanted]
        requests += [
            addressing.address_add(index, each, _whole(each), tolerate={errno.EEXIST}, speaks=":" not in each)
            for each in wanted - there
        ]
        route.run(requests)

    def default_route(self, network: Network, endpoint: Endpoint, namespace: int) -> None:
        """Replace the namespace's default route; answers leave by it from now on."""
        replace_default_route(network, endpoint, namespace)
        self.host.firewall.remove(_masked(network, endpoint))

    def lose_default_route(self, network: Network, endpoint: Endpoint) -> None:
        """Let answers come back all the same."""
        self.host.firewall.add(_masked(network, endpoint))

    def apply_ports(
        self, network: Network, endpoint: Endpoint, *, add: Collection[PortMapping], remove: Collection[PortMapping]
    ) -> None:
        """Change map elements: one transaction, no process."""
        if remove:
            self.host.firewall.remove(self._port_elements(network, endpoint.addresses, remove))
            values = parse(self.options, network.spec.options)
            direct = bool(values[TRUSTED]) or "routed" in (values[MODES[4]], values[MODES[6]])
            forget_published(remove, endpoint.addresses, direct=direct, relay_port=self.host.relay_port())
        if add:
            self.host.firewall.add(self._port_elements(network, endpoint.addresses, add))
            forget_strays(add)

    def elements(self, network: Network, endpoints: Collection[Endpoint]) -> set[Element]:
        """Return those of the network, and of its endpoints."""
        of_endpoints = (self._endpoint_elements(network, endpoint) for endpoint in endpoints)
        return set(self.network_elements(network)).union(*of_endpoints)

    def network_elements(self, network: Network) -> list[Element]:
        """Return what the firewall is told of a network."""
        name, values = network.interface, parse(self.options, network.spec.options)
        elements = [
            ("bridges", name),
            ("own", f"{name} . {name}"),
            *self.host.firewall.policing.network_elements(network),
        ]
        if values[ISOLATE] == "strict":
            elements.append(("strict", name))
        if values[ICC]:  # between its subnets; within one, the bridge forwards by itself
            elements.append(("same", f"{name} . {name}"))
        elements += [(f"subnets{_six(pool.subnet)}", f"{name} . {pool.subnet}") for pool in network.pools]
        elements += [("trusted", f"{each} . {name}") for each in values[TRUSTED]]
        if network.spec.internal:
            return [*elements, ("internal", name)]
        for version, six in ((4, ""), (6, "6")):
            if values[MODES[version]] == "routed":
                elements.append((f"routed{six}", name))
            elif values[SOURCES[version]]:
                elements.append((f"sources{six}", f"{name} : {values[SOURCES[version]]}"))
            elif values[MASQUERADE]:
                elements.append((f"masqueraded{six}", name))
            if values[MODES[version]] == "nat-unprotected":
                elements.append((f"open{six}", name))
        return elements

    def _endpoint_elements(self, network: Network, endpoint: Endpoint) -> list[Element]:
        """Return what lets an endpoint send as itself alone, or as anybody where it is not guarded; and its ports."""
        senders: list[str] = []
        if parse(self.options, network.spec.options)[GUARD] and endpoint.every_address:
            senders = [each.address for each in endpoint.every_address]
            senders += [link_local(endpoint.mac_address)] if has_ipv6(network) else []
        guard = guard_elements(endpoint.host_interface, endpoint.mac_address, senders)
        policed = self.host.firewall.policing.endpoint_elements(network, endpoint)
        masked = () if endpoint.default_route else _masked(network, endpoint)
        return [*guard, *policed, *masked, *self._port_elements(network, endpoint.addresses, endpoint.ports)]

    def _port_elements(
        self, network: Network, addresses: Collection[Address], ports: Collection[PortMapping]
    ) -> list[Element]:
        if not ports:
            return []
        values = parse(self.options, network.spec.options)
        routed = {six for version, six in ((4, ""), (6, "6")) if values[MODES[version]] == "routed"}
        translated = [each for each in addresses if _six(each.address) not in routed]
        direct = [each for each in addresses if _six(each.address) in routed or values[TRUSTED]]
        elements = [element for port in ports for element in port_elements(port, translated)]
        elements += [element for port in ports for element in direct_elements(port, direct)]
        return elements + [element for port in ports for element in source_elements(port, addresses)]

    def bridge_addresses(self, network: Network) -> list[tuple[str, int]]:
        """Return what the bridge has: gateways, the link-local address that IPv6 needs beside them, and services'."""
        own = [(link_local(stable_mac(network.id)), 64)] if has_ipv6(network) else []
        virtual = [(each, _whole(each)) for each in sorted(self._virtual.get(network.id, ()))]
        return [*self.gateways(network), *own, *virtual]

    def gateways(self, network: Network) -> list[tuple[str, int]]:
        """Return the gateways that the bridge holds itself, with their prefix lengths."""
        values = parse(self.options, network.spec.options)
        held = []
        for pool in network.pools:
            subnet = ipaddress.ip_network(pool.subnet)
            inhibited = values.get(INHIBIT) and subnet.version == 4
            if pool.gateway and not inhibited and values[MODES[subnet.version]] != "isolated":
                held.append((pool.gateway, subnet.prefixlen))
        return held

    def _gateways(self, network: Network, endpoint: Endpoint) -> set[str]:
        """Return the endpoint's gateways that are the bridge itself."""
        held = {gateway for gateway, _ in self.gateways(network)}
        return {each.gateway for each in endpoint.addresses} & held

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
                peer=endpoint.interface_name if namespace is not None else endpoint.waiting_interface,
                peer_mac=endpoint.mac_address,
                peer_namespace=namespace,
            ),
            _port(network, endpoint, isolated=not parse(self.options, network.spec.options)[ICC]),
            netlink.link_up(endpoint.host_interface),
            *(addressing.neighbour_set(master, each.address, endpoint.mac_address) for each in endpoint.every_address),
        ]
        try:
            route.run(requests)
        except KernelError as error:
            return self._pair_refused(error, route, network, endpoint, namespace)
        return True

    def _pair_refused(
        self, error: KernelError, route: RouteSocket, network: Network, endpoint: Endpoint, namespace: int | None
    ) -> bool:
        if error.errno == errno.EXFULL:
            raise Exhausted(
                f"bridge {network.interface} of network {network.name} has {BR_MAX_PORTS} ports, the kernel's limit",
                hint="make a further network for what is to come, or disconnect what is not needed any more",
                reason="BRIDGE_FULL",
                network=network.name,
            ) from error
        if error.errno != errno.EEXIST or route.link(endpoint.host_interface) is None:
            self.host.deletions.delete(endpoint.host_interface)
            raise error
        if namespace is not None:
            with socket_in(namespace) as inside:
                peer = inside.link(endpoint.interface_name)
            if peer is not None and peer.mac == endpoint.mac_address:
                return False
        self.host.deletions.delete(endpoint.host_interface)
        return self._make_pair(route, network, endpoint, namespace)

    @contextmanager
    def _undone(self, network: Network, *, made: bool) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if made:
                self.remove_network(network)
            raise


def masked_elements(network: Network, addresses: Iterable[str]) -> set[Element]:
    """Return what lets endpoints answer clients of published ports though their way out is another."""
    return {(f"masked{_six(each)}", f"{network.interface} . {each}") for each in addresses}


def _masked(network: Network, endpoint: Endpoint) -> set[Element]:
    return set() if network.spec.internal else masked_elements(network, [each.address for each in endpoint.addresses])


def _port(network: Network, endpoint: Endpoint, *, isolated: bool) -> Request:
    return netlink.port_set(
        endpoint.host_interface,
        alias=alias("endpoint", endpoint.id),
        # Where br_netfilter hands bridged frames to nftables, a hairpin needs the bridge's consent too.
        hairpin=True,
        isolated=isolated,
        ipv6_addresses=not speaks_ipv6(network),
    )


def _single(route: RouteSocket, index: int, network: Network) -> frozenset[str]:
    """Return the addresses of the network's subnets that its bridge has alone."""
    subnets = [ipaddress.ip_network(pool.subnet) for pool in network.pools]
    return frozenset(
        each for each in route.addresses(index) if any(ipaddress.ip_address(each) in subnet for subnet in subnets)
    )


def _whole(address: str) -> int:
    """Return the prefix length of one address."""
    return 128 if ":" in address else 32


def _six(address: str) -> str:
    return "6" if ":" in address else ""
