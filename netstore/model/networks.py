"""Networks, sandboxes and endpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from netstore.model.common import PAIR_PREFIX, kernel_name

__all__ = [
    "Address",
    "Endpoint",
    "EndpointSpec",
    "Lease",
    "Network",
    "NetworkSpec",
    "PolicyAction",
    "Pool",
    "PortMapping",
    "Protocol",
    "Reach",
    "Route",
    "Sandbox",
    "SandboxRef",
    "Scope",
]


class Scope(StrEnum):
    """Where a driver's networks are: on one node, or on every node of a cluster."""

    LOCAL = "local"
    GLOBAL = "global"


class Protocol(StrEnum):
    """Transports of published ports."""

    TCP = "tcp"
    UDP = "udp"
    SCTP = "sctp"


class PolicyAction(StrEnum):
    """What happens to traffic that a policy describes, or that none does."""

    ALLOW = "allow"
    DENY = "deny"


@dataclass(frozen=True, slots=True, kw_only=True)
class PortMapping:
    """A port of an endpoint, or `count` consecutive ones, made reachable through the node.

    `host_ip` "" means every address, of both families. With `host_port_last` any free port up to it does. `sources` are
    the CIDRs that may come, () for everybody. With `mesh` every node of the cluster publishes it.
    """

    container_port: int
    host_port: int = 0
    host_ip: str = ""
    protocol: Protocol = Protocol.TCP
    count: int = 1
    host_port_last: int = 0
    sources: tuple[str, ...] = ()
    mesh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """An address and port at which a published port answers, and whom it answers there."""

    address: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """One address pool of a network: CIDR, gateway, CIDR of dynamic addresses, reserved addresses by name."""

    subnet: str = ""
    gateway: str = ""
    ip_range: str = ""
    aux_addresses: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A way to a destination (CIDR) by a machine of the network."""

    destination: str
    gateway: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """What was asked for."""

    driver: str = "bridge"
    internal: bool = False
    enable_ipv4: bool = True
    enable_ipv6: bool = False
    ipam_driver: str = "default"
    pools: tuple[Pool, ...] = ()
    dns_servers: tuple[str, ...] = ()
    routes: tuple[Route, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    policy_ingress: PolicyAction = PolicyAction.ALLOW
    policy_egress: PolicyAction = PolicyAction.ALLOW
    config_only: bool = False
    config_from: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """An isolated layer-2/3 domain. `pools` are resolved; `interface` and `mtu` are what the driver chose.

    `host_seen_at` are addresses by which its endpoints reach the host, where that is not `host_addresses`.

    Of scope global: `vni` is its number on the wire (RFC 7348), the driver's from an option or the cluster's choice;
    `host_addresses` and `host_mac_address` are this node's own on it, taken when it is first used here: before that
    the node holds the row alone, and nothing of it is in the kernel.
    """

    id: str
    name: str
    spec: NetworkSpec
    labels: Mapping[str, str] = field(default_factory=dict)
    pools: tuple[Pool, ...] = ()
    interface: str = ""
    mtu: int = 0
    host_seen_at: tuple[str, ...] = ()
    predefined: bool = False
    overlaps: tuple[str, ...] = ()
    vni: int = 0
    host_addresses: tuple[Address, ...] = ()
    host_mac_address: str = ""
    create_time: float = 0.0
    revision: int = 0

    @property
    def scope(self) -> Scope:
        """Where it is."""
        return Scope.GLOBAL if self.vni else Scope.LOCAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """A network namespace. `path` is where it is pinned or was named, "" for the host's own and for one that an engine
    moves interfaces into itself; `inode` tells it from a successor at the same path.

    `container_id` is "" for a namespace that an engine named. `resolver` says whether names are answered inside.
    """

    id: str
    path: str
    inode: int = 0
    container_id: str = ""
    resolver: bool = True
    dns_servers: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Of the lock under which endpoints come and go: the namespace's, where one is known."""
        return f"sandbox {self.inode or self.id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxRef:
    """How a caller names a sandbox: one of the four.

    `moved_id` is the sandbox's id, 64 hexadecimal digits, chosen by an engine that moves interfaces, configures them
    and answers names itself (Docker): for us their namespace is the host's.
    """

    netns_path: str = ""
    pid: int = 0
    container: str = ""
    moved_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSpec:
    """What was asked for, references resolved to ids by the network manager."""

    name: str = ""
    aliases: tuple[str, ...] = ()
    ipv4_address: str = ""
    ipv6_address: str = ""
    mac_address: str = ""
    interface_name: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    ports: tuple[PortMapping, ...] = ()
    gateway_priority: int = 0
    link_local_addresses: tuple[str, ...] = ()
    links: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """An address of an endpoint with its prefix length, and the gateway of its pool ("" for none)."""

    address: str
    prefix: int
    gateway: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """An address that a network's own DHCP server lends (RFC 2131). Seconds count from `obtained`, a time of the clock;
    `boot` and `uptime` are the same moment for `clock.since`.

    `router` is "" where there is none; `seconds` is -1 for one that lasts for ever.
    """

    address: str
    prefix: int
    obtained: float
    seconds: int
    renew_seconds: float
    rebind_seconds: float
    router: str = ""
    dns_servers: tuple[str, ...] = ()
    server: str = ""
    server_mac_address: str = ""
    boot: str = ""
    uptime: float = 0.0

    @property
    def lasts(self) -> float:
        """How long it lasts in all, infinity for ever."""
        return self.seconds if self.seconds >= 0 else math.inf

    @property
    def expire_time(self) -> float:
        """When it ends by the clock, infinity for never."""
        return self.obtained + self.lasts


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One sandbox's attachment to one network. `ports` have their host ports filled in.

    `attached` is false while only its addresses are reserved (a container that has not started).
    """

    id: str
    network_id: str
    sandbox_id: str
    spec: EndpointSpec
    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    addresses: tuple[Address, ...] = ()
    link_local_addresses: tuple[Address, ...] = ()
    mac_address: str = ""
    interface_name: str = ""
    ports: tuple[PortMapping, ...] = ()
    default_route: bool = False
    attached: bool = True
    lease: Lease | None = None
    create_time: float = 0.0
    revision: int = 0

    @property
    def every_address(self) -> tuple[Address, ...]:
        """Its addresses, also those that no name resolves to."""
        return (*self.addresses, *self.link_local_addresses)

    @property
    def host_interface(self) -> str:
        """The host's end of the pair, found again from the id."""
        return kernel_name(PAIR_PREFIX, self.id)

    @property
    def waiting_interface(self) -> str:
        """The other end, as long as it waits in the host for the engine that moves it."""
        return kernel_name("nsp-", self.id)
