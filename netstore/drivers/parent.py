"""What the drivers macvlan and ipvlan share: endpoints on an interface of the host, the parent.

An endpoint's interface lives in its sandbox alone (`ends_inside`); the kernel takes it away with its namespace, or with
its parent. A parent `eth0.50` that is not there is made, an 802.1q link, and goes with the last network on it; without
a parent the network is internal, on an interface that only it has.
"""

from __future__ import annotations

import errno
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from netstore.drivers.base import Driver, Observed
from netstore.drivers.interior import alias, changes_inside, configure, rates, replace_default_route, socket_in
from netstore.drivers.options import Option, interface, number, parse
from netstore.errors import FailedPrecondition, InvalidArgument, KernelError
from netstore.kernel import netlink
from netstore.kernel.links import host_socket
from netstore.kernel.route import Request
from netstore.model import Endpoint, Network, kernel_name

__all__ = ["MTU_OPTION", "PARENT", "PARENT_OPTION", "ParentDriver"]

PARENT, MTU = "parent", "com.docker.network.driver.mtu"
PARENT_OPTION = Option(
    PARENT, interface, "", "interface of the host whose network the endpoints join; `eth0.50` is VLAN 50 of eth0, made"
    " where it is missing; none makes the network internal",
)  # fmt: skip
MTU_OPTION = Option(MTU, number(68, 65535), 0, "MTU of the endpoints, at most the parent's; 0 takes the parent's")

_VLAN = re.compile(r"(.+)\.([0-9]{1,4})")
_KINDS = ("macvlan", "ipvlan")


class ParentDriver(Driver):
    """See the module. A driver gives its options, the message that makes an endpoint's interface, and its refusals."""

    ends_inside = True
    chooses_gateway = False
    takes_leases = True

    def validate(self, network: Network) -> Network:
        """Choose the parent's name."""
        values = parse(self.options, network.spec.options)
        parent = values[PARENT]
        if parent and network.spec.internal:
            raise InvalidArgument(f"spec.options[{PARENT}]", parent, "none: an internal network is on no parent")
        if parent == "lo":
            raise InvalidArgument(f"spec.options[{PARENT}]", parent, "an Ethernet interface of the host")
        if not parent:
            network = replace(network, spec=replace(network.spec, internal=True))
        return replace(network, interface=parent or kernel_name("nsmv-", network.id), mtu=values[MTU])

    def check_beside(self, network: Network, others: Sequence[Network]) -> None:
        """Refuse a parent on which networks of the other kind are: the kernel lets an interface have one of them."""
        for other in others:
            if other.interface == network.interface and other.spec.driver != self.name and other.spec.driver in _KINDS:
                raise FailedPrecondition(
                    f"network {other.name} ({other.spec.driver}) is on parent {network.interface}: macvlan and ipvlan"
                    " cannot share one", hint="choose another parent, or the same driver", network=other.name,
                )  # fmt: skip

    @abstractmethod
    def interface(self, network: Network, endpoint: Endpoint, parent: int, namespace: int) -> Request:
        """Return the message that makes the endpoint's interface on the parent of that index, in the namespace."""

    def refusal(self, error: KernelError, network: Network) -> Exception:
        """Return what the caller is told when the kernel refuses that message."""
        if error.errno == errno.EOPNOTSUPP:
            return FailedPrecondition(
                f"network {network.name}: this kernel has no {self.name}", hint=f"load it (`modprobe {self.name}`)"
            )
        return error

    def apply_network(self, network: Network) -> None:
        """Find the parent, or make it where it is ours to make."""
        if not _parent(network):
            self._make_parent(network)

    def remove_network(self, network: Network) -> None:
        """Remove the parent if it was made for this network."""
        self.remove_ours(network, network.interface)

    def remove_ours(self, network: Network, name: str) -> None:
        """Remove an interface of the host if it carries the network's mark."""
        found = host_socket().link(name)
        if found is not None and found.alias == alias("network", network.id):
            self.host.deletions.delete(name)

    def hand_over(self, network: Network, heir: Network) -> None:
        """Mark a parent that was made for a network as another's."""
        found = host_socket().link(network.interface)
        if found is not None and found.alias == alias("network", network.id):
            host_socket().run([netlink.link_set(found.index, alias=alias("network", heir.id))])

    def apply_endpoint(self, network: Network, endpoint: Endpoint, namespace: int | None) -> None:
        """Make the interface inside, then what belongs to it."""
        if endpoint.ports:
            raise FailedPrecondition(
                f"network {network.name} ({self.name}) publishes no ports: its endpoints are on the physical network",
                hint="reach them at their own addresses",
            )
        if namespace is None:
            raise FailedPrecondition(
                f"network {network.name} ({self.name}) attaches namespaces only", hint="name one by path or pid"
            )
        made = self._make(network, endpoint, namespace)
        try:
            configure(network, endpoint, namespace)
            self.update_endpoint(network, endpoint, namespace)
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
        """Take the interface out of the namespace if it is ours."""
        if namespace is not None:
            with socket_in(namespace) as route:
                found = route.link(endpoint.interface_name)
                if found is not None and found.alias == alias("endpoint", endpoint.id):
                    route.run([netlink.link_delete(endpoint.interface_name)])

    def observe(self, network: Network) -> Observed:
        """Look for the parent."""
        return Observed(interface=bool(_parent(network)), endpoints=frozenset())

    def is_inside(self, network: Network, endpoint: Endpoint, namespace: int) -> bool:
        """Say whether the endpoint's interface is in the namespace."""
        with socket_in(namespace) as route:
            found = route.link(endpoint.interface_name)
        return found is not None and found.alias == alias("endpoint", endpoint.id)

    def default_route(self, network: Network, endpoint: Endpoint, namespace: int) -> None:
        """Replace the namespace's default route."""
        replace_default_route(network, endpoint, namespace)

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

    def _make(self, network: Network, endpoint: Endpoint, namespace: int) -> bool:
        """Make the interface in the namespace; False when it is there already."""
        if self.is_inside(network, endpoint, namespace):
            return False
        parent = host_socket().link(network.interface)
        if not parent:
            raise FailedPrecondition(
                f"parent {network.interface} of network {network.name} is not there",
                hint="bring it back, then try again",
            )
        if network.mtu > parent.mtu:
            raise FailedPrecondition(
                f"network {network.name}: MTU {network.mtu} is larger than that of its parent {network.interface},"
                f" {parent.mtu}", hint=f"`netstore network update -o {MTU}=…`, or raise the parent's",
            )  # fmt: skip
        # Linux before 6.14 looks for the new name in the host's namespace, too, where eth0 is another's.
        name = kernel_name("nsme-", endpoint.id)
        with socket_in(namespace) as route:
            if route.index_of(name) is None:
                try:
                    host_socket().run(
                        [self.interface(network, replace(endpoint, interface_name=name), parent.index, namespace)]
                    )
                except KernelError as error:
                    raise self.refusal(error, network) from error
            mark, index = alias("endpoint", endpoint.id), route.index_of(name) or 0
            try:
                route.run([netlink.link_set(index, name=endpoint.interface_name, alias=mark)])
            except BaseException:
                route.run([netlink.link_delete(name)])
                raise
        return True


def _parent(network: Network) -> int:
    """Return the parent's index, 0 when it is not there."""
    return host_socket().index_of(network.interface) or 0
