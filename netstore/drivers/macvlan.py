"""The driver `macvlan`: endpoints on a physical network, each with a MAC of its own on a parent interface of the host.

An endpoint's interface lives in its sandbox alone (`ends_inside`); the kernel takes it away with its namespace, or with
its parent. A parent `eth0.50` that is not there is made, an 802.1q link, and goes with the last network on it; without
a parent the network is internal, on an interface that only it has.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network

from netstore.drivers.base import Driver, Observed
from netstore.drivers.interior import alias, changes_inside, configure, rates, replace_default_route, socket_in
from netstore.drivers.options import BANDWIDTHS, Option, boolean, choice, interface, number, parse
from netstore.errors import FailedPrecondition, InvalidArgument, KernelError
from netstore.kernel import netlink
from netstore.kernel.links import host_socket
from netstore.kernel.sysctls import sysctl
from netstore.model import Endpoint, Network, Pool, kernel_name, stable_mac

__all__ = ["MacvlanDriver"]

PARENT = "parent"
MODE = "macvlan_mode"
MTU = "com.docker.network.driver.mtu"
HOST_ACCESS = "host_access"
BROADCAST = "netstore.macvlan.broadcast_cutoff"
HOST = "host"
"""The auxiliary address that is the host's own on the network, with `host_access`."""

_VLAN = re.compile(r"(.+)\.([0-9]{1,4})")


class MacvlanDriver(Driver):
    """See the module."""

    name = "macvlan"
    ends_inside = True
    chooses_gateway = False
    options: Sequence[Option] = (
        Option(PARENT, interface, "", "interface of the host whose network the endpoints join; `eth0.50` is VLAN 50 of"
               " eth0, made where it is missing; none makes the network internal"),
        Option(MODE, choice("bridge", "private", "vepa", "passthru"), "bridge", "who of the same parent may talk to"
               " each other: all (bridge), none (private), through an outside switch (vepa); passthru gives the parent"
               " to one endpoint alone"),
        Option(MTU, number(68, 65535), 0, "MTU of the endpoints, at most the parent's; 0 takes the parent's"),
        Option(HOST_ACCESS, boolean, False, "the host reaches the endpoints, and they it, at the auxiliary address"
               " `host` (--aux-address host=ADDRESS; by default the last one of the range)"),
        Option(BROADCAST, number(-1, 0x7FFFFFFF), 1, "broadcasts go at once to at most so many endpoints, and through a"
               " queue to more; -1 never queues"),
        *BANDWIDTHS,
    )  # fmt: skip

    def validate(self, network: Network) -> Network:
        """Choose the parent's name, and where the host's own address on the network is."""
        values = parse(self.options, network.spec.options)
        parent, internal = values[PARENT], network.spec.internal
        if parent and internal:
            raise InvalidArgument(f"spec.options[{PARENT}]", parent, "none: an internal network is on no parent")
        if parent == "lo":
            raise InvalidArgument(f"spec.options[{PARENT}]", parent, "an Ethernet interface of the host")
        if values[HOST_ACCESS] and values[MODE] != "bridge":
            raise InvalidArgument(f"spec.options[{HOST_ACCESS}]", "true", f"false with {MODE}={values[MODE]}")
        if not parent:
            network = replace(network, spec=replace(network.spec, internal=True))
        pools = tuple(_with_host(pool) for pool in network.pools) if values[HOST_ACCESS] else network.pools
        return replace(network, interface=parent or kernel_name("nsmv-", network.id), mtu=values[MTU], pools=pools)

    def check_beside(self, network: Network, others: Sequence[Network]) -> None:
        """Refuse a parent that another network has in passthru, or of which this one would have all."""
        mode = parse(self.options, network.spec.options)[MODE]
        for other in others:
            if other.interface != network.interface or other.spec.driver != self.name:
                continue
            theirs = parse(self.options, other.spec.options)[MODE]
            if "passthru" in (mode, theirs):
                raise FailedPrecondition(
                    f"network {other.name} is on parent {network.interface} already ({theirs}): with passthru a parent"
                    " has one network", hint="choose another parent, or another macvlan_mode", network=other.name,
                )  # fmt: skip

    def apply_network(self, network: Network) -> None:
        """Find the parent, or make it where it is ours to make; then the host's own interface on the network."""
        made = not self._parent(network)
        if made:
            self._make_parent(network)
        try:
            if parse(self.options, network.spec.options)[HOST_ACCESS]:
                self._make_shim(network)
        except BaseException:
            if made:
                self.remove_network(network)
            raise

    def hand_over(self, network: Network, heir: Network) -> None:
        """Mark a parent that was made for a network as another's."""
        found = host_socket().link(network.interface)
        if found is not None and found.alias == alias("network", network.id):
            host_socket().run([netlink.link_set(found.index, alias=alias("network", heir.id))])

    def remove_network(self, network: Network) -> None:
        """Remove the host's own interface, and the parent if it was made for this network."""
        route = host_socket()
        for name in (_shim(network), network.interface):
            found = route.link(name)
            if found is not None and found.alias == alias("network", network.id):
                self.host.deletions.delete(name)

    def apply_endpoint(self, network: Network, endpoint: Endpoint, namespace: int | None) -> None:
        """Make the interface inside, then what belongs to it, then the host's routes."""
        if endpoint.ports:
            raise FailedPrecondition(
                f"network {network.name} (macvlan) publishes no ports: its endpoints are on the physical network",
                hint="reach them at their own addresses",
            )
        if namespace is None:
            raise FailedPrecondition(
                f"network {network.name} (macvlan) attaches namespaces only", hint="name a namespace by path or pid"
            )
        made = self._make(network, endpoint, namespace)
        try:
            configure(network, endpoint, namespace)
            self.update_endpoint(network, endpoint, namespace)
            self._route_host(network, endpoint)
        except BaseException:
            if made:
                self.remove_endpoint(network, endpoint, namespace)
            raise

    def update_endpoint(
        self, network: Network, endpoint: Endpoint, namespace: int, *, before: Network | None = None
    ) -> None:
        """Limit what the endpoint sends, and set its routes; what it receives is not ours to hold back."""
        _, outgoing = rates(network, endpoint)
        with socket_in(namespace) as route:
            index = route.index_of(endpoint.interface_name)
            if index is None:
                raise KernelError(errno.ENODEV, "changing the interface of endpoint", endpoint.name or endpoint.id)
            limit = [netlink.rate_limit(index, outgoing)] if outgoing or before else []
            route.run([*limit, *changes_inside(network, index, before=before)])

    def remove_endpoint(self, network: Network, endpoint: Endpoint, namespace: int | None = None) -> None:
        """Take the host's routes away, and the interface out of the namespace if it is ours."""
        index = host_socket().index_of(_shim(network))
        if index is not None:
            host_socket().run(
                [netlink.route_delete("", index, _host_route(each.address)) for each in endpoint.addresses]
            )
        if namespace is None:
            return
        with socket_in(namespace) as route:
            found = route.link(endpoint.interface_name)
            if found is not None and found.alias == alias("endpoint", endpoint.id):
                route.run([netlink.link_delete(endpoint.interface_name)])

    def observe(self, network: Network) -> Observed:
        """Look for the parent, and for the host's own interface where there is to be one."""
        shim = not parse(self.options, network.spec.options)[HOST_ACCESS] or host_socket().link(_shim(network))
        return Observed(interface=bool(self._parent(network) and shim), endpoints=frozenset())

    def is_inside(self, network: Network, endpoint: Endpoint, namespace: int) -> bool:
        """Say whether the endpoint's interface is in the namespace."""
        with socket_in(namespace) as route:
            found = route.link(endpoint.interface_name)
        return found is not None and found.alias == alias("endpoint", endpoint.id)

    def default_route(self, network: Network, endpoint: Endpoint, namespace: int) -> None:
        """Replace the namespace's default route."""
        replace_default_route(network, endpoint, namespace)

    @staticmethod
    def _parent(network: Network) -> int:
        """Return the parent's index, 0 when it is not there."""
        return host_socket().index_of(network.interface) or 0

    def _make_parent(self, network: Network) -> None:
        """Make the parent of an internal network, or a VLAN of an interface.

        Raises:
            FailedPrecondition: it is neither, or the kernel has no 802.1q.
        """
        route, name = host_socket(), network.interface
        mark = netlink.link_set(name, alias=alias("network", network.id), up=True)
        if not parse(self.options, network.spec.options)[PARENT]:
            # A pair of which both ends stay here is there in every kernel that has networks; a dummy device is not.
            peer = kernel_name("nsmw-", network.id)
            route.run([netlink.veth_pair(name, peer, mtu=network.mtu or 1500), mark, netlink.link_set(peer, up=True)])
            return
        vlan = _VLAN.fullmatch(name)
        below = route.index_of(vlan[1]) if vlan else None
        if not vlan or below is None or not 1 <= int(vlan[2]) <= 4094:
            missing = vlan[1] if vlan and below is None else name
            names = ", ".join(link.name for link in route.links() if not link.alias and link.name != "lo")
            raise FailedPrecondition(
                f"parent {missing} of network {network.name} is not there", hint=f"the host has {names}", parent=missing
            )
        try:
            route.run([netlink.vlan_add(name, below, int(vlan[2])), mark])
        except KernelError as error:
            self.host.deletions.delete(name)
            if error.errno != errno.EOPNOTSUPP:
                raise
            raise FailedPrecondition(
                f"making {name}: this kernel has no 802.1q",
                hint="load it (`modprobe 8021q`), or give an untagged parent",
            ) from error

    def _make_shim(self, network: Network) -> None:
        """Make the host's own interface on the parent: the parent itself does not reach the endpoints."""
        route, name = host_socket(), _shim(network)
        if route.link(name) is None:
            route.run(
                [
                    netlink.macvlan_add(
                        name, self._parent(network), mode="bridge", mac=stable_mac(f"host {network.id}")
                    ),
                    netlink.link_set(name, alias=alias("network", network.id)),
                    netlink.link_set(name, ipv6_addresses=False, tolerate=frozenset({errno.EAFNOSUPPORT})),
                ]
            )
        index = route.index_of(name)
        assert index is not None
        # Only for its own address: the host's others are answered for on the parent.
        sysctl(f"net/ipv4/conf/{name}/arp_ignore", "1")
        addresses = [pool.aux_addresses[HOST] for pool in network.pools if HOST in pool.aux_addresses]
        widths = {4: 32, 6: 128}
        requests = [
            netlink.address_add(index, each, widths[ip_address(each).version], tolerate={errno.EEXIST})
            for each in addresses
        ]
        route.run([*requests, netlink.link_set(index, up=True)])

    def _make(self, network: Network, endpoint: Endpoint, namespace: int) -> bool:
        """Make the interface in the namespace; False when it is there already."""
        if self.is_inside(network, endpoint, namespace):
            return False
        parent = self._parent(network)
        if not parent:
            raise FailedPrecondition(
                f"parent {network.interface} of network {network.name} is not there",
                hint="bring it back, then try again",
            )
        values = parse(self.options, network.spec.options)
        request = netlink.macvlan_add(
            endpoint.interface_name, parent, mode=values[MODE], mac=endpoint.mac_address, namespace=namespace,
            mtu=network.mtu, broadcast_cutoff=values[BROADCAST],
        )  # fmt: skip
        try:
            host_socket().run([request])
        except KernelError as error:
            if error.errno not in (errno.EBUSY, errno.EINVAL) or values[MODE] != "passthru":
                raise
            raise FailedPrecondition(
                f"parent {network.interface} has an endpoint already: passthru gives it to one alone",
                hint="detach that one first, or choose another macvlan_mode",
            ) from error
        with socket_in(namespace) as route:
            route.run([netlink.link_set(endpoint.interface_name, alias=alias("endpoint", endpoint.id))])
        return True

    @staticmethod
    def _route_host(network: Network, endpoint: Endpoint) -> None:
        index = host_socket().index_of(_shim(network))
        if index is not None:
            host_socket().run(
                [netlink.route_replace("", index, _host_route(each.address)) for each in endpoint.addresses]
            )


def _shim(network: Network) -> str:
    return kernel_name("nsmh-", network.id)


def _host_route(address: str) -> str:
    return f"{address}/{128 if ':' in address else 32}"


def _with_host(pool: Pool) -> Pool:
    if not pool.subnet or HOST in pool.aux_addresses:
        return pool
    subnet, within = ip_network(pool.subnet), ip_network(pool.ip_range or pool.subnet)
    taken = {pool.gateway, *pool.aux_addresses.values(), *([str(subnet[-1])] if subnet.version == 4 else [])}
    last = next(str(within[-at]) for at in range(1, len(taken) + 2) if str(within[-at]) not in taken)
    return replace(pool, aux_addresses={**pool.aux_addresses, HOST: last})
