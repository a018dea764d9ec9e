"""Keys and values in etcd.

Below STATE is what every node watches; below CLAIMS are keys whose existence is the holding of a name, an address, a
MAC or a number: they are created if absent, and say who holds them in their value. Nobody watches those.

    STATE/nodes/NODE            Node                              CLAIMS/names/nodes/NAME        NODE
    STATE/alive/NODE            whose, goes with its lease        CLAIMS/underlay/ADDRESS        NODE
    STATE/networks/NETWORK      Network                           CLAIMS/names/networks/NAME     NETWORK
    STATE/endpoints/NETWORK/ID  EndpointRecord                    CLAIMS/vnis/VNI                NETWORK
    STATE/hosts/NETWORK/NODE    EndpointRecord of the node        CLAIMS/addresses/NETWORK/IP    ENDPOINT or SERVICE
    STATE/services/NETWORK/ID   Service                           CLAIMS/macs/NETWORK/MAC        ENDPOINT
                                                                  CLAIMS/names/services/NAME     SERVICE
                                                                  CLAIMS/ports/PROTOCOL/PORT     SERVICE or ENDPOINT
    CLAIMS/members/NODE         exists as long as the node may claim anything
    CLAIMS/removed/NODE exists from its removal until its next start
    CLAIMS/recovering   exists for a while after etcd lost what it knew: nothing new is claimed meanwhile
    STATE/policies/NETWORK      its policies, all of them: they change as one
    STATE/checks/ID             CheckRequest; REPORTS/ID/NODE NodeCheck: the answers, which only the asker reads
    CLAIMS/subnets              changes with every network that comes or goes, so that two never take overlapping ones
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import msgspec

from netstore.model import Network, Node, NodeCheck, Policy, PortMapping, RemoteEndpoint

__all__ = [
    "ALIVE", "CHECKS", "CLAIMS", "ENDPOINTS", "HOSTS", "NETWORKS", "NODES", "POLICIES", "PORTS", "RECOVERING",
    "REPORTS", "SERVICES", "STATE", "SUBNETS", "CheckRequest", "EndpointRecord", "decode_check", "decode_endpoint",
    "decode_network", "decode_node", "decode_policies", "decode_request", "encode", "shared",
]  # fmt: skip

_ROOT = "/netstore/1/"
STATE = f"{_ROOT}state/"
CLAIMS = f"{_ROOT}claims/"
NODES, ALIVE, NETWORKS, ENDPOINTS, HOSTS, SERVICES = (
    f"{STATE}{name}/" for name in ("nodes", "alive", "networks", "endpoints", "hosts", "services")
)
PORTS = f"{CLAIMS}ports/"
SUBNETS = f"{CLAIMS}subnets"
RECOVERING = f"{CLAIMS}recovering"
POLICIES = f"{STATE}policies/"
CHECKS = f"{STATE}checks/"
REPORTS = f"{_ROOT}reports/"


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointRecord:
    """An endpoint as other nodes see it. `names` are lower case, `name` its own; `healthy` are ids of services that
    found it so; `ports` are those that every node publishes; one that is not `attached` has its addresses and no more.
    A node's own addresses on a network are one too, without a name.
    """

    id: str
    network_id: str
    node_id: str
    vtep: str
    mac: str
    addresses: tuple[str, ...]
    name: str = ""
    names: tuple[str, ...] = ()
    attached: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)
    healthy: tuple[str, ...] = ()
    ports: tuple[PortMapping, ...] = ()

    @property
    def remote(self) -> RemoteEndpoint:
        """What a driver is told of it."""
        aliases = tuple(name for name in self.names if name != self.name.lower())
        return RemoteEndpoint(
            endpoint_id=self.id, network_id=self.network_id, node_id=self.node_id, vtep=self.vtep, mac=self.mac,
            addresses=self.addresses, name=self.name, aliases=aliases, labels=self.labels, ports=self.ports,
        )  # fmt: skip

    @property
    def claims(self) -> list[str]:
        """The keys that it holds besides its own."""
        addresses = [f"{CLAIMS}addresses/{self.network_id}/{address}" for address in self.addresses]
        macs = [f"{CLAIMS}macs/{self.network_id}/{self.mac}"] if self.mac else []
        return [*addresses, *macs, *(f"{PORTS}{each.protocol}/{each.host_port}" for each in self.ports)]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRequest:
    """A question to all nodes: is this network in order? The answers go with its lease."""

    id: str
    network_id: str
    lease: int


encode = msgspec.json.Encoder().encode
decode_endpoint = msgspec.json.Decoder(EndpointRecord).decode
decode_policies = msgspec.json.Decoder(tuple[Policy, ...]).decode
decode_check = msgspec.json.Decoder(NodeCheck).decode
decode_request = msgspec.json.Decoder(CheckRequest).decode
decode_network = msgspec.json.Decoder(Network).decode
decode_node = msgspec.json.Decoder(Node).decode


def shared(network: Network) -> Network:
    """Return of a network what is the same on every node."""
    return replace(network, mtu=0, overlaps=(), host_addresses=(), host_mac_address="", revision=0)
