"""The driver `macvlan`: endpoints on a physical network, each with a MAC of its own on an interface of the host."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network

from netstore.drivers.base import Observed
from netstore.drivers.interior import alias
from netstore.drivers.options import BANDWIDTHS, Option, boolean, choice, number, parse
from netstore.drivers.parent import MTU_OPTION, PARENT_OPTION, ParentDriver
from netstore.errors import FailedPrecondition, InvalidArgument, KernelError, Unsupported
from netstore.kernel import addressing, netlink
from netstore.kernel.links import host_socket
from netstore.kernel.route import Request
from netstore.kernel.sysctls import sysctl
from netstore.model import Endpoint, Network, Pool, kernel_name, stable_mac

__all__ = ["MacvlanDriver"]

MODE = "macvlan_mode"
HOST_ACCESS = "host_access"
BROADCAST = "netstore.macvlan.broadcast_cutoff"
CUTOFF_SINCE = (6, 4)
"""What is older takes IFLA_MACVLAN_BC_CUTOFF and says nothing."""
HOST = "host"
"""The auxiliary address that is the host's own on the network, with `host_access`."""


class MacvlanDriver(ParentDriver):
    """See the module."""

    name = "macvlan"
    options: Sequence[Option] = (
        PARENT_OPTION,
        Option(MODE, choice("bridge", "private", "vepa", "passthru"), "bridge", "who of the same parent may talk to"
               " each other: all (bridge), none (private), through an outside switch (vepa); passthru gives the parent"
               " to one endpoint alone"),
        MTU_OPTION,
        Option(HOST_ACCESS, boolean, False, "the host reaches the endpoints, and they it, at the auxiliary address"
               " `host` (--aux-address host=ADDRESS; by default the last one of the range)"),
        Option(BROADCAST, number(-1, 0x7FFFFFFF), 1, "broadcasts go at once to at most so many endpoints, and through a"
               " queue to more; -1 never queues (Linux 6.4)"),
        *BANDWIDTHS,
    )  # fmt: skip

    def validate(self, network: Network) -> Network:
        """Choose the parent's name, and where the host's own address on the network is."""
        network = super().validate(network)
        values = parse(self.options, network.spec.options)
        if not values[HOST_ACCESS]:
            return network
        if values[MODE] != "bridge":
            raise InvalidArgument(f"spec.options[{HOST_ACCESS}]", "true", f"false with {MODE}={values[MODE]}")
        if network.spec.ipam_driver == "dhcp":
            raise InvalidArgument(f"spec.options[{HOST_ACCESS}]", "true", "false with the IPAM driver dhcp")
        pools = tuple(_with_host(pool) for pool in network.pools)
        reached = tuple(pool.aux_addresses[HOST] for pool in pools if HOST in pool.aux_addresses)
        return replace(network, pools=pools, host_seen_at=reached)

    def check_beside(self, network: Network, others: Sequence[Network]) -> None:
        """Refuse a parent that another network has in passthru, or of which this one would have all."""
        super().check_beside(network, others)
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

    def interface(self, network: Network, endpoint: Endpoint, parent: int, namespace: int) -> Request:
        """Return the message that makes a macvlan interface."""
        values = parse(self.options, network.spec.options)
        return netlink.macvlan_add(
            endpoint.interface_name, parent, mode=values[MODE], mac=endpoint.mac_address, namespace=namespace,
            mtu=network.mtu, broadcast_cutoff=values[BROADCAST],
        )  # fmt: skip

    def refusal(self, error: KernelError, network: Network) -> Exception:
        """Tell a parent that has its one endpoint from other refusals."""
        passthru = parse(self.options, network.spec.options)[MODE] == "passthru"
        if not passthru or error.errno not in (errno.EBUSY, errno.EINVAL):
            return super().refusal(error, network)
        return FailedPrecondition(
            f"parent {network.interface} has an endpoint already: passthru gives it to one alone",
            hint="detach that one first, or choose another macvlan_mode",
        )

    def apply_network(self, network: Network) -> None:
        """Find or make the parent; then the host's own interface on the network."""
        if parse(self.options, network.spec.options)[BROADCAST] != 1 and _kernel() < CUTOFF_SINCE:
            raise Unsupported(
                f"option {BROADCAST}: this kernel ({os.uname().release}) would ignore it",
                hint="leave it out, or use Linux 6.4 or newer",
            )
        super().apply_network(network)
        if parse(self.options, network.spec.options)[HOST_ACCESS]:
            try:
                self._make_shim(network)
            except BaseException:
                self.remove_network(network)
                raise

    def remove_network(self, network: Network) -> None:
        """Remove the host's own interface, and the parent if it was made for this network."""
        self.remove_ours(network, _shim(network))
        super().remove_network(network)

    def apply_endpoint(self, network: Network, endpoint: Endpoint, namespace: int | None) -> None:
        """Make the interface inside, then the host's routes to it."""
        super().apply_endpoint(network, endpoint, namespace)
        route = host_socket()
        index = route.index_of(_shim(network))
        if index is not None:
            route.run([addressing.route_replace("", index, _host_route(each.address)) for each in endpoint.addresses])

    def remove_endpoint(self, network: Network, endpoint: Endpoint, namespace: int | None = None) -> None:
        """Take the host's routes away, and the interface out of the namespace."""
        route = host_socket()
        index = route.index_of(_shim(network))
        if index is not None:
            route.run([addressing.route_delete("", index, _host_route(each.address)) for each in endpoint.addresses])
        super().remove_endpoint(network, endpoint, namespace)

    def observe(self, network: Network) -> Observed:
        """Look for the parent, and for the host's own interface where there is to be one."""
        found = super().observe(network)
        shim = not parse(self.options, network.spec.options)[HOST_ACCESS] or host_socket().index_of(_shim(network))
        return replace(found, interface=found.interface and bool(shim))

    @staticmethod
    def _make_shim(network: Network) -> None:
        """Make the host's own interface on the parent: the parent itself does not reach the endpoints."""
        route, name = host_socket(), _shim(network)
        if route.link(name) is None:
            parent = route.index_of(network.interface) or 0
            route.run(
                [
                    netlink.macvlan_add(name, parent, mode="bridge", mac=stable_mac(f"host {network.id}")),
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
            addressing.address_add(index, each, widths[ip_address(each).version], tolerate={errno.EEXIST})
            for each in addresses
        ]
        route.run([*requests, netlink.link_set(index, up=True)])


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


def _kernel() -> tuple[int, ...]:
    """Return the kernel's version: 6, 1."""
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
