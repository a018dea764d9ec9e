"""The driver `overlay`: a network on every node of a cluster, by VXLAN (RFC 7348) between bridges.

A node has a bridge and a VXLAN interface for each network that it uses. Nothing is flooded or learned: the control
plane says where each remote endpoint is (`apply_remote`), and the bridge answers for it (neighbour suppression), which
needs all of an entry in the tunnel's table, one in the bridge's, and a neighbour of the bridge.

The bridge's MAC and gateway are the same on every node. So that a node itself reaches remote endpoints, and they it,
each has an address and a MAC of its own on the network besides; frames to that MAC are the host's (set `ours`).
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

from netstore.drivers.base import Host, Observed
from netstore.drivers.bridged import ICC, ISOLATE, SHARED_OPTIONS, BridgedDriver, masked_elements
from netstore.drivers.direct import Direct
from netstore.drivers.interior import alias
from netstore.drivers.options import Option, boolean, parse
from netstore.errors import FailedPrecondition, InvalidArgument, KernelError
from netstore.kernel import addressing, netlink, wireguard
from netstore.kernel.conntrack import forget_published, forget_strays
from netstore.kernel.firewall import Element
from netstore.kernel.links import host_socket
from netstore.kernel.route import Request
from netstore.model import (
    TUNNEL_PREFIX,
    WIREGUARD_LINK,
    Address,
    Endpoint,
    Network,
    Node,
    RemoteEndpoint,
    Scope,
    kernel_name,
)

__all__ = ["OverlayDriver"]

VNIS = "com.docker.network.driver.overlay.vxlanid_list"
ENCRYPTED = "encrypted"
DIRECT = "direct"
OVERHEAD = {4: 50, 6: 70}  # bytes that VXLAN adds: Ethernet, IP, UDP and its own header
MAX_VNI = (1 << 24) - 1


def _vnis(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and 0 < int(part) <= MAX_VNI for part in parts):
        raise ValueError(f"numbers from 1 to {MAX_VNI}, separated by commas")
    return tuple(int(part) for part in parts)


class OverlayDriver(BridgedDriver):
    """See the module."""

    name = "overlay"
    scope = Scope.GLOBAL
    options: Sequence[Option] = (
        Option(VNIS, _vnis, (), "VXLAN network identifier; by default the cluster chooses a free one"),
        Option(ENCRYPTED, boolean, False, "encrypt what passes between nodes, by WireGuard"),
        Option(DIRECT, boolean, False, "plain routes to nodes on the same link, tunnels to the others"),
        *SHARED_OPTIONS,
    )

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._peers: Mapping[str, Node] = {}
        self._direct = Direct(host.vtep)
        self._key = self._public = ""

    def validate(self, network: Network) -> Network:
        """Choose the bridge's name, the identifier, and the MTU: what the tunnel leaves of the underlay's."""
        values = parse(self.options, network.spec.options)
        if not self.host.vtep:
            raise FailedPrecondition(
                "an overlay network needs a cluster, and this node is in none",
                hint="give [cluster] in the configuration",
            )
        _refuse_direct(values)
        version = 6 if ":" in self.host.vtep else 4
        inner = network.mtu - OVERHEAD[version]
        if values[ENCRYPTED]:
            self._require_encryption()
            inner -= wireguard.OVERHEAD[version] + (network.mtu - wireguard.OVERHEAD[version]) % 16
        network = super().validate(replace(network, mtu=max(inner, 0)))
        return replace(network, vni=values[VNIS][0] if values[VNIS] else network.vni)

    def apply_network(self, network: Network) -> None:
        """Make the bridge, then the tunnel, then what makes the node's own MAC on the network the host's."""
        route, name = host_socket(), _tunnel(network)
        fresh = route.index_of(network.interface) is None
        super().apply_network(network)
        isolated = not parse(self.options, network.spec.options)[ICC]
        bridge = route.index_of(network.interface)
        assert bridge is not None
        if self._sealed(network) and self._key and route.index_of(WIREGUARD_LINK) is None:
            self.apply_key(self._key)
        if route.index_of(name) and not self._is_sent_from_here(name):
            self.host.deletions.delete(name)  # the node's address was another: what leads to others is written anew
        requests = [] if route.index_of(name) else [self._tunnel_request(network, name, bridge)]
        requests += [
            netlink.tunnel_port_set(name, alias=alias("network", network.id), isolated=isolated),
            netlink.link_set(name, mtu=network.mtu, ipv6_addresses=False, tolerate=frozenset({errno.EAFNOSUPPORT})),
            netlink.link_up(name),
        ]
        if network.host_mac_address:
            requests.append(addressing.forwarding_local(bridge, network.host_mac_address))
        try:
            route.run(requests)
        except KernelError as error:
            if fresh:
                self.remove_network(network)
            if error.errno == errno.EEXIST:
                raise FailedPrecondition(
                    f"VXLAN identifier {network.vni} is in use on this node by an interface that is not ours",
                    hint=f"choose another (-o {VNIS}=NUMBER), or remove that interface",
                ) from error
            raise

    def remove_network(self, network: Network) -> None:
        """Remove routes and the tunnel, then what bridges have."""
        if self._is_direct(network):
            self._lead(network, remove=[_nobody(network, address) for address in self._direct.routes(network)])
        found = host_socket().link(_tunnel(network))
        if found is not None and found.alias in ("", alias("network", network.id)):
            self.host.deletions.delete(found.name)
        super().remove_network(network)

    def network_elements(self, network: Network) -> list[Element]:
        """Return what bridges have, and the node's own MAC behind the tunnel."""
        own = [("ours", f"{_tunnel(network)} . {network.host_mac_address}")] if network.host_mac_address else []
        direct = self._direct.network_elements(network) if self._is_direct(network) else ()
        return [*super().network_elements(network), *own, *direct]

    def _endpoint_elements(self, network: Network, endpoint: Endpoint) -> list[Element]:
        direct = self._direct.endpoint_elements(network, endpoint) if self._is_direct(network) else ()
        return [*super()._endpoint_elements(network, endpoint), *direct]

    def remote_elements(self, network: Network, remote: RemoteEndpoint) -> set[Element]:
        """Return what lets packets for an endpoint of another node go by a plain route, where there is one, what
        publishes its ports here, and what lets a node's probes in.
        """
        if not self.reaches(remote):
            return set()
        direct = self._direct.remote_elements(network, remote) if self._is_direct(network) else set()
        return direct | self._own_elements(network, remote)

    def _own_elements(self, network: Network, remote: RemoteEndpoint) -> set[Element]:
        """Return the elements that `_lead` does not see to."""
        if not remote.is_node:
            return self._mesh_elements(network, remote)
        name = network.interface
        return {("probers6" if ":" in each else "probers", f"{name} . {each}") for each in remote.addresses}

    def _mesh_elements(self, network: Network, remote: RemoteEndpoint) -> set[Element]:
        addresses = [Address(address=each, prefix=0) for each in remote.addresses]
        found = {
            element for element in self._port_elements(network, addresses, remote.ports)
            if not element[0].startswith("relayed")  # the relay of ::1 serves endpoints of this node
        }  # fmt: skip
        if found:
            found |= masked_elements(network, remote.addresses)
        return found

    def bridge_addresses(self, network: Network) -> list[tuple[str, int]]:
        """Return the node's own address first, from which the host speaks; the gateway's is no one node's. In a subnet
        where the node has none, the gateway's leads to it all the same.
        """
        own = [(each.address, each.prefix) for each in network.host_addresses]
        spoken = [ip_network(f"{address}/{prefix}", strict=False) for address, prefix in own]
        hidden = {
            address: 128 if ":" in address else 32
            for address, _ in self.gateways(network)
            if any(ip_address(address) in subnet for subnet in spoken)
        }
        return [*own, *((each, hidden.get(each, prefix)) for each, prefix in super().bridge_addresses(network))]

    def reaches(self, remote: RemoteEndpoint) -> bool:
        """Say whether the address of its node is of the same family as this one's: a tunnel has one."""
        return not remote.vtep or (":" in remote.vtep) == (":" in self.host.vtep)

    def apply_remote(
        self, network: Network, *, add: Sequence[RemoteEndpoint], remove: Sequence[RemoteEndpoint]
    ) -> None:
        """Write the entries of each, in one batch."""
        route = host_socket()
        add, remove = ([each for each in some if self.reaches(each)] for some in (add, remove))
        bridge, tunnel = route.index_of(network.interface), route.index_of(_tunnel(network))
        if bridge is None or tunnel is None:  # not used on this node
            return
        via = route.index_of(WIREGUARD_LINK) or 0 if self._sealed(network) else 0
        direct = self._is_direct(network)
        if direct:
            self._lead(network, remove=remove)
        requests = []
        for each in remove:
            if elements := self._own_elements(network, each):
                self.host.firewall.remove(sorted(elements))
            if each.ports:
                forget_published(each.ports, [Address(address=address, prefix=0) for address in each.addresses])
            if each.vtep:  # where nothing leads to it, there is no entry
                requests.append(addressing.forwarding_delete(tunnel, each.mac, each.vtep, via=via))
            requests += [addressing.neighbour_delete(bridge, address) for address in each.addresses]
        for each in add:
            requests.append(addressing.forwarding_set(tunnel, each.mac, each.vtep, via=via))
            requests += [addressing.neighbour_set(bridge, address, each.mac) for address in each.addresses]
        route.run(requests)
        if direct:
            self._lead(network, add=add)
        for each in add:
            if elements := self._own_elements(network, each):
                self.host.firewall.add(sorted(elements))
            if each.ports:
                forget_strays(each.ports)

    def _lead(
        self, network: Network, *, add: Sequence[RemoteEndpoint] = (), remove: Sequence[RemoteEndpoint] = ()
    ) -> None:
        """Make plain routes to those of some endpoints that are near, or take the routes to others away."""
        if remove:
            elements, requests = self._direct.remove(remove)
            self.host.firewall.remove(sorted(elements))
            host_socket().run(requests)
        host_socket().run([request for each in add for request in self._direct.add(network, each)])
        ends = {element for each in add for element in self._direct.remote_elements(network, each)}
        self.host.firewall.add(sorted(ends))

    def apply_peers(self, peers: Mapping[str, Node]) -> bool:
        """Change whose tunnels are heard, and who is near."""
        before = self.node_elements()
        self._peers = peers
        moved = self._direct.follow(peers) if self.host.vtep else False
        with self.host.firewall.steady:
            self.host.firewall.remove(sorted(before - self.node_elements()))
            self.host.firewall.add(sorted(self.node_elements()))
        if self._public:
            self._set_wireguard_peers()
        return moved

    def apply_key(self, private_key: str) -> str:
        """Give WireGuard's interface a key, and make it where it is missing; "" where the kernel has no WireGuard."""
        if not self.host.vtep:
            return ""
        self._key = private_key
        try:
            self._public = wireguard.make(self.host.vtep, self.host.wireguard_port, private_key)
        except KernelError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return ""
        self._set_wireguard_peers()
        return self._public

    def _set_wireguard_peers(self) -> None:
        wireguard.set_peers(
            {vtep: (node.public_key, self.host.wireguard_port) for vtep, node in self._peers.items() if node.public_key}
        )

    def _require_encryption(self) -> None:
        if not self._public:
            raise FailedPrecondition(
                f"spec.options[{ENCRYPTED}]: this kernel has no WireGuard",
                hint="leave it out where the underlay is trusted, or `modprobe wireguard` and restart netstored",
            )

    def _sealed(self, network: Network) -> bool:
        return bool(parse(self.options, network.spec.options)[ENCRYPTED])

    def node_elements(self) -> set[Element]:
        """Return where tunnels come in, and whose."""
        if not self.host.vtep:
            return set()
        peers = {("vteps6" if ":" in each else "vteps", each) for each in self._peers}
        port, sealed = str(self.host.vxlan_port), str(self.host.vxlan_port + 1)
        return {
            ("tunnels", port), ("tunnels", sealed), ("sealed", sealed), *peers, *self._direct.node_elements()
        }  # fmt: skip

    def observe(self, network: Network) -> Observed:
        """Look for bridge, tunnel and ports, and tell what leads to other nodes from what leads to endpoints here."""
        found, route = super().observe(network), host_socket()
        bridge, tunnel = route.index_of(network.interface), route.index_of(_tunnel(network))
        if bridge is None or tunnel is None or not self._is_sent_from_here(_tunnel(network)):
            return replace(found, interface=False)
        told = route.permanent_neighbours(bridge)
        tunnels, bridged = route.forwarding(tunnel)
        remotes = {
            (address, mac, tunnels[mac] if mac in bridged else "") for address, mac in told.items() if mac in tunnels
        }
        named = {mac for _, mac, _ in remotes}
        remotes |= {("", mac, vtep) for mac, vtep in tunnels.items() if mac not in named}
        if self._is_direct(network):
            remotes = self._judged(network, remotes)
        ports = found.endpoints - {_tunnel(network)}
        here = found.neighbours - {address for address, _, _ in remotes}
        return replace(found, endpoints=ports, neighbours=here, remotes=frozenset(remotes))

    def _is_sent_from_here(self, tunnel: str) -> bool:
        """Say whether a tunnel's packets carry the node's address: others hear no other one."""
        return host_socket().tunnel_source(tunnel) == str(ip_address(self.host.vtep))

    def _judged(self, network: Network, remotes: set[tuple[str, str, str]]) -> set[tuple[str, str, str]]:
        """Return remote endpoints without the VTEP of those whose route is not as it should be, and stray routes."""
        routes = self._direct.routes(network)
        judged = {
            (address, mac, vtep if routes.pop(address, "") == self._direct.gateway(network, vtep, address) else "")
            for address, mac, vtep in remotes
        }
        return judged | {(address, "", "") for address in routes}

    def elements(self, network: Network, endpoints: Collection[Endpoint]) -> set[Element]:
        """Return those of a network that is used here, and of its endpoints."""
        return super().elements(network, endpoints) if self.is_here(network) else set()

    def _is_direct(self, network: Network) -> bool:
        return bool(parse(self.options, network.spec.options)[DIRECT])

    def _tunnel_request(self, network: Network, name: str, bridge: int) -> Request:
        sealed, link = self._sealed(network), 0
        if sealed:
            self._require_encryption()
            link = host_socket().index_of(WIREGUARD_LINK) or 0
        return netlink.vxlan_add(
            name, vni=network.vni, local=self.host.vtep, port=self.host.vxlan_port + sealed, master=bridge,
            mtu=network.mtu, link=link,
        )  # fmt: skip


def _refuse_direct(values: Mapping[str, Any]) -> None:
    """Refuse what plain routes cannot keep."""
    if not values[DIRECT]:
        return
    for key, unfit, why in (
        (ENCRYPTED, True, "plain routes are not encrypted"),
        (ICC, False, "endpoints that may not talk need no routes"),
        (ISOLATE, "strict", "routed packets are not told from other networks'"),
    ):
        if values[key] == unfit:
            raise InvalidArgument(f"spec.options[{DIRECT}]", True, f"false together with {key}={unfit}: {why}".lower())


def _nobody(network: Network, address: str) -> RemoteEndpoint:
    return RemoteEndpoint(endpoint_id="", network_id=network.id, node_id="", vtep="", mac="", addresses=(address,))


def _tunnel(network: Network) -> str:
    return kernel_name(TUNNEL_PREFIX, network.id)
