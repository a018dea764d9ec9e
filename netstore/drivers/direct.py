"""Plain routes instead of tunnels: to endpoints of the nodes that share a link with this one (`-o direct=true`).

An endpoint sends to another's MAC as ever, so that it need not know how its packets go, and nothing of it changes when
that does. What is for an endpoint of a near node is turned to the bridge itself where it leaves (sets `detours` and
`near_ends`), and the host routes it: one route for each address, by the node that has it.

Two nodes are near when each says that the other's address is in the subnet on its link. Both judge by what both told,
so that they agree. Packets of endpoints are taken from the MACs that near nodes told alone, by the interface that leads
to them (set `near_nodes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_address, ip_network

from netstore.kernel import addressing
from netstore.kernel.firewall import Element
from netstore.kernel.links import host_socket, node_link
from netstore.kernel.route import Request
from netstore.model import Endpoint, Network, Node, NodeLink, RemoteEndpoint, stable_mac

__all__ = ["Direct"]


class Direct:
    """Who is near, and what leads there. `vtep` is the node's own address on the underlay, "" without a cluster."""

    def __init__(self, vtep: str) -> None:
        self._vtep = vtep
        self._near: dict[str, NodeLink] = {}
        self._own, self._name, self._index = NodeLink(), "", 0
        self._led: set[str] = set()  # addresses with a route

    def follow(self, peers: Mapping[str, Node]) -> bool:
        """Look who of the other nodes, by address, is near; says whether that, or how they are reached, changed, or
        whether the kernel took routes away: it does so when their interface goes down.
        """
        before = (self._near, self._own, self._name, self._index)
        self._own, self._name, self._index = node_link(self._vtep)
        self._near = {
            vtep: node.link for vtep, node in peers.items() if _holds(self._own, vtep) and _holds(node.link, self._vtep)
        }
        if before != (self._near, self._own, self._name, self._index):
            return True
        return bool(self._led) and not self._led <= host_socket().routes(addressing.RTPROT_NETSTORE).keys()

    def node_elements(self) -> set[Element]:
        """Return whose packets are taken."""
        return {("near_nodes", f"{self._name} . {link.mac}") for link in self._near.values()}

    def network_elements(self, network: Network) -> Iterator[Element]:
        """Yield where a network's packets may come from and go to."""
        for pool in network.pools:
            six = _six(pool.subnet)
            yield f"near{six}", f"{network.interface} . {pool.subnet}"
            yield f"near_sources{six}", pool.subnet
            if source := _source(network, pool.subnet):
                yield f"near_hosts{six}", f"{pool.subnet} : {source}"

    def endpoint_elements(self, network: Network, endpoint: Endpoint) -> Iterator[Element]:
        """Yield what lets an endpoint of this node speak to those of near ones."""
        yield "detours", f"{endpoint.host_interface} : {stable_mac(network.id)}"

    def remote_elements(self, network: Network, remote: RemoteEndpoint) -> set[Element]:
        """Return what turns packets for an endpoint to the host: nothing where its node is not near."""
        return {_end(address) for address in remote.addresses} if self.gateway(network, remote.vtep) else set()

    def gateway(self, network: Network, vtep: str, address: str = "") -> str:
        """Return by whom an address of a network is reached on a node, "" where it is behind a tunnel."""
        link = self._near.get(vtep)
        if link is None:
            return ""
        if any(":" in pool.subnet for pool in network.pools) and ":" not in vtep:
            if not (link.link_local and self._own.link_local):  # IPv6 needs a gateway of its own
                return ""
            return link.link_local if ":" in address else vtep
        return vtep

    def add(self, network: Network, remote: RemoteEndpoint) -> list[Request]:
        """Return what makes routes to an endpoint, where it is near."""
        if not self.gateway(network, remote.vtep):
            return []
        self._led.update(remote.addresses)
        return [
            addressing.host_route_set(
                address, self.gateway(network, remote.vtep, address), self._index, _source(network, address)
            )
            for address in remote.addresses
        ]

    def remove(self, remotes: Sequence[RemoteEndpoint]) -> tuple[set[Element], list[Request]]:
        """Return elements and routes of those of endpoints that have routes."""
        led = {address for each in remotes for address in each.addresses} & self._led
        self._led -= led
        return {_end(address) for address in led}, [addressing.host_route_delete(address) for address in led]

    def routes(self, network: Network) -> dict[str, str]:
        """Return the gateways of the routes that there are to addresses of a network."""
        subnets = [ip_network(pool.subnet) for pool in network.pools]
        found = host_socket().routes(addressing.RTPROT_NETSTORE)
        theirs = {to: by for to, by in found.items() if any(ip_address(to) in subnet for subnet in subnets)}
        self._led.update(theirs)
        return theirs


def _holds(link: NodeLink, address: str) -> bool:
    return bool(link.mac) and ip_address(address) in ip_network(link.subnet)


def _end(address: str) -> Element:
    return f"near_ends{_six(address)}", address


def _source(network: Network, of: str) -> str:
    """Return the node's own address on a network, of the family of another."""
    return next((each.address for each in network.host_addresses if (":" in each.address) == (":" in of)), "")


def _six(address: str) -> str:
    return "6" if ":" in address else ""
