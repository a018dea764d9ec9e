"""The driver `ipvlan`: as macvlan, but every endpoint has the parent's MAC; for switches that take one MAC a port.

In the modes l3 and l3s the host routes between its endpoints and the outside: there is no broadcast and no gateway, and
the way out is the interface itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from netstore.drivers.interior import socket_in
from netstore.drivers.options import BANDWIDTHS, Option, choice, parse
from netstore.drivers.parent import MTU_OPTION, PARENT_OPTION, ParentDriver
from netstore.errors import InvalidArgument
from netstore.kernel import addressing, netlink
from netstore.kernel.route import Request
from netstore.model import Endpoint, Network

__all__ = ["IpvlanDriver"]

MODE, FLAG = "ipvlan_mode", "ipvlan_flag"
_LAST = 4096  # a metric behind that of every gateway


class IpvlanDriver(ParentDriver):
    """See the module."""

    name = "ipvlan"
    options: Sequence[Option] = (
        PARENT_OPTION,
        Option(MODE, choice("l2", "l3", "l3s"), "l2", "l2: the endpoints are on the parent's link; l3: the host routes"
               " for them; l3s: it does so past its firewall's hooks"),
        Option(FLAG, choice("bridge", "private", "vepa"), "bridge", "who of the same parent may talk to each other: all"
               " (bridge), none (private), through an outside router (vepa)"),
        MTU_OPTION,
        *BANDWIDTHS,
    )  # fmt: skip
    shares_mac = True

    def validate(self, network: Network) -> Network:
        """Choose the parent's name."""
        if parse(self.options, network.spec.options)[MODE] != "l2":
            for index, pool in enumerate(network.spec.pools):
                if pool.gateway:
                    raise InvalidArgument(f"spec.ipam[{index}].gateway", pool.gateway, f"none with {MODE}=l3 or l3s")
            if network.spec.ipam_driver == "dhcp":
                raise InvalidArgument("spec.ipam_driver", "dhcp", f"default or null with {MODE}=l3 or l3s")
        return super().validate(network)

    def interface(self, network: Network, endpoint: Endpoint, parent: int, namespace: int) -> Request:
        """Return the message that makes an ipvlan interface."""
        values = parse(self.options, network.spec.options)
        return netlink.ipvlan_add(
            endpoint.interface_name, parent, mode=values[MODE], flag=values[FLAG], namespace=namespace, mtu=network.mtu
        )

    def apply_endpoint(self, network: Network, endpoint: Endpoint, namespace: int | None) -> None:
        """Make the interface inside; in l3 and l3s it is the way out where no other network has a gateway."""
        super().apply_endpoint(network, endpoint, namespace)
        if network.spec.internal or parse(self.options, network.spec.options)[MODE] == "l2" or namespace is None:
            return
        with socket_in(namespace) as route:
            index = route.index_of(endpoint.interface_name) or 0
            everywhere = {"::/0" if ":" in each.address else "0.0.0.0/0" for each in endpoint.addresses}
            route.run([addressing.route_replace("", index, each, metric=_LAST) for each in sorted(everywhere)])
