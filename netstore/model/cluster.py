"""The nodes of a cluster, and what they tell each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from netstore.model.networks import PortMapping

__all__ = ["Node", "NodeCheck", "NodeLink", "Probe", "RemoteEndpoint", "host_id"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLink:
    """Where a node is on the underlay: MAC and link-local address of the interface that has its address there, and the
    subnet that is said to be on its link (CIDR); "" for what there is not.
    """

    mac: str = ""
    subnet: str = ""
    link_local: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine of the cluster. `address` is its one on the underlay; `up` says that it holds its lease; a `drained`
    one takes no new endpoints of networks that span nodes. `public_key` is WireGuard's, "" where it has none.
    """

    id: str
    name: str
    address: str
    version: str = ""
    drained: bool = False
    public_key: str = ""
    link: NodeLink = NodeLink()
    up: bool = False
    create_time: float = 0.0
    revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteEndpoint:
    """An attached endpoint on another node, or that node's own addresses on a network (`name` "").

    `vtep` is the node's address on the underlay; `addresses` have no prefix length; `ports` are those that this node
    publishes, too.
    """

    endpoint_id: str
    network_id: str
    node_id: str
    vtep: str
    mac: str
    addresses: tuple[str, ...]
    name: str = ""
    aliases: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: tuple[PortMapping, ...] = ()

    @property
    def is_node(self) -> bool:
        """Whether it is a node's own addresses on a network."""
        return bool(self.node_id) and self.endpoint_id == host_id(self.network_id, self.node_id)


def host_id(network_id: str, node_id: str) -> str:
    """Return the endpoint id of a node's own addresses on a network."""
    return network_id[:32] + node_id[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What came back from another node's address on a network; `mtu` is the largest packet that did, in bytes, and
    `latency` the shortest time, in seconds."""

    node_id: str
    address: str
    sent: int
    received: int
    latency: float
    mtu: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCheck:
    """How a network is on a node, which need not use it; or why nothing is known (`error`)."""

    node_id: str
    used: bool = False
    mtu: int = 0
    findings: tuple[str, ...] = ()
    probes: tuple[Probe, ...] = ()
    error: str = ""
