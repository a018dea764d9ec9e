"""What managers and drivers speak of: frozen dataclasses, one for each word of the design.

Every resource is stored as one of these, encoded to JSON by msgspec. A field's unit, limit and meaning are those of the
field of the same name in `proto/netstore/v1`; comments here say only what is not there. Imports nothing of ours.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = [
    "BRIDGE_PREFIX",
    "PAIR_PREFIX",
    "TUNNEL_PREFIX",
    "Address",
    "Attachment",
    "Consistency",
    "Container",
    "ContainerSpec",
    "ContainerState",
    "Endpoint",
    "EndpointMode",
    "EndpointSpec",
    "Event",
    "Finding",
    "ForeignMount",
    "HealthCheck",
    "IdMapping",
    "Image",
    "ImageConfig",
    "Kind",
    "Lease",
    "Mount",
    "MountRef",
    "MountSpec",
    "MountType",
    "Network",
    "NetworkSpec",
    "Node",
    "Policy",
    "PolicyAction",
    "PolicyPort",
    "PolicySpec",
    "Pool",
    "PortMapping",
    "Protocol",
    "Reach",
    "RemoteEndpoint",
    "Route",
    "Sandbox",
    "SandboxRef",
    "Scope",
    "Selector",
    "Service",
    "ServicePort",
    "ServiceSpec",
    "Snapshot",
    "TrashedVolume",
    "Volume",
    "VolumeSpec",
    "kernel_name",
    "label_matches",
    "new_id",
    "stable_mac",
]


BRIDGE_PREFIX = "nsbr-"
"""How bridges are named that nobody named otherwise: with this, and the first digits of the network's id."""

TUNNEL_PREFIX = "nsvx-"
PAIR_PREFIX = "nsv-"
"""How the host's ends of endpoints' interfaces are named: with this, and the first digits of the endpoint's id."""


class Kind(StrEnum):
    """Sorts of resources; the values are those of events and filters."""

    NETWORK = "network"
    ENDPOINT = "endpoint"
    VOLUME = "volume"
    SNAPSHOT = "snapshot"
    CONTAINER = "container"
    IMAGE = "image"
    SANDBOX = "sandbox"
    NODE = "node"
    POLICY = "policy"
    MOUNT = "mount"
    SERVICE = "service"


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


class EndpointMode(StrEnum):
    """What a service's name means: its virtual address, or its endpoints' addresses."""

    VIP = "vip"
    DNSRR = "dnsrr"


class MountType(StrEnum):
    """What is mounted."""

    VOLUME = "volume"
    BIND = "bind"
    TMPFS = "tmpfs"
    IMAGE = "image"


class ContainerState(StrEnum):
    """Where a container is in its life."""

    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"


class Restart(StrEnum):
    """When a container is started again by itself: Docker's policies."""

    NO = "no"
    ON_FAILURE = "on-failure"  # it ended with another code than 0, at most `restart_limit` times
    ALWAYS = "always"  # also one that was stopped, when the node starts
    UNLESS_STOPPED = "unless-stopped"


def new_id() -> str:
    """Return 64 random hexadecimal digits, as Docker's ids."""
    return secrets.token_hex(32)


def kernel_name(prefix: str, resource_id: str) -> str:
    """Return an interface name derived from an id: at most 15 bytes (IFNAMSIZ - 1), so that it can be found again."""
    return f"{prefix}{resource_id[: 15 - len(prefix)]}"


def label_matches(labels: Mapping[str, str], wanted: str) -> bool:
    """Say whether labels hold `key` or `key=value`."""
    key, separator, value = wanted.partition("=")
    return key in labels and (not separator or labels[key] == value)


def stable_mac(resource_id: str) -> str:
    """Return a locally administered unicast MAC (IEEE 802, U/L bit) derived from an id, the same at every start."""
    digest = hashlib.sha256(resource_id.encode()).digest()
    return ":".join(f"{octet:02x}" for octet in (digest[0] & 0xFC | 0x02, *digest[1:6]))


@dataclass(frozen=True, slots=True, kw_only=True)
class PortMapping:
    """A port of an endpoint, or `count` consecutive ones, made reachable through the node.

    `host_ip` "" means every address, of both families. With `host_port_last` any free port up to it does. `sources` are
    the CIDRs that may come, () for everybody.
    """

    container_port: int
    host_port: int = 0
    host_ip: str = ""
    protocol: Protocol = Protocol.TCP
    count: int = 1
    host_port_last: int = 0
    sources: tuple[str, ...] = ()


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
    """An address that a network's own DHCP server lends (RFC 2131). Seconds count from `obtained`, a time of the clock.

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

    @property
    def expire_time(self) -> float:
        """When it ends, infinity for never."""
        return self.obtained + self.seconds if self.seconds >= 0 else math.inf


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
    up: bool = False
    create_time: float = 0.0
    revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteEndpoint:
    """An attached endpoint on another node, or that node's own addresses on a network (`name` "").

    `vtep` is the node's address on the underlay; `addresses` have no prefix length.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """Who is meant: endpoints that have every label ("key" or "key=value"), or addresses of a CIDR; one of the two."""

    labels: tuple[str, ...] = ()
    cidr: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyPort:
    """Destination ports `first` to `last` of tcp, udp or sctp, 0 for all of them; or icmp, of both families."""

    protocol: str
    first: int = 0
    last: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """What was asked for. No `sources`, `destinations` or `ports` means any. Lists are sorted, nothing is twice."""

    network_id: str
    sources: tuple[Selector, ...] = ()
    destinations: tuple[Selector, ...] = ()
    ports: tuple[PolicyPort, ...] = ()
    action: PolicyAction = PolicyAction.ALLOW


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Which traffic of a network's endpoints is allowed, or denied."""

    id: str
    name: str
    spec: PolicySpec
    labels: Mapping[str, str] = field(default_factory=dict)
    create_time: float = 0.0
    revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthCheck:
    """How an endpoint is asked whether it works. `path` is "" for a mere connection, else what HTTP gets."""

    port: int
    path: str
    interval_seconds: float
    timeout_seconds: float
    retries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePort:
    """A port of every node that has the network, and the endpoints' port that it leads to."""

    published_port: int
    target_port: int
    protocol: Protocol = Protocol.TCP


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSpec:
    """What was asked for. `selector` are labels ("key" or "key=value"), all of which an endpoint of it has; lists are
    sorted, nothing is twice."""

    network_id: str
    selector: tuple[str, ...]
    mode: EndpointMode = EndpointMode.VIP
    ports: tuple[ServicePort, ...] = ()
    health: HealthCheck | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One name, and virtual address, for several endpoints of a network."""

    id: str
    name: str
    spec: ServiceSpec
    labels: Mapping[str, str] = field(default_factory=dict)
    addresses: tuple[str, ...] = ()
    create_time: float = 0.0
    revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeSpec:
    """What was asked for. `block` is the mode: a device node instead of a filesystem."""

    driver: str = "local"
    options: Mapping[str, str] = field(default_factory=dict)
    size_bytes: int = 0
    snapshot_schedule: str = ""
    snapshot_keep: int = 0
    block: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """Named storage that outlives containers."""

    id: str
    name: str
    spec: VolumeSpec
    labels: Mapping[str, str] = field(default_factory=dict)
    mountpoint: str = ""
    anonymous: bool = False
    filling: str = ""
    create_time: float = 0.0
    revision: int = 0


class Consistency(StrEnum):
    """What a copy of a volume is of: one moment while it was used, a volume that nobody used, or files one by one."""

    MOMENT = "moment"
    UNUSED = "unused"
    LIVE = "live"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A read-only point in time of a volume. `scheduled` ones go by themselves when there are newer ones enough."""

    id: str
    name: str
    volume_id: str
    labels: Mapping[str, str] = field(default_factory=dict)
    consistency: Consistency = Consistency.UNUSED
    frozen_seconds: float = 0.0
    size_bytes: int = 0
    scheduled: bool = False
    create_time: float = 0.0
    revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrashedVolume:
    """A volume that was removed and can come back until `expire_time`."""

    volume: Volume
    remove_time: float
    expire_time: float
    revision: int = 0

    @property
    def id(self) -> str:
        """The volume's id."""
        return self.volume.id

    @property
    def create_time(self) -> float:
        """When it was removed: lists are ordered by it."""
        return self.remove_time


@dataclass(frozen=True, slots=True)
class IdMapping:
    """`count` ids from `stored_id` on show as those from `mount_id` on."""

    stored_id: int
    mount_id: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MountSpec:
    """What a container asks to see at `target`."""

    target: str
    type: MountType = MountType.VOLUME
    source: str = ""
    read_only: bool = False
    no_copy: bool = False
    create_source: bool = False
    propagation: str = ""
    tmpfs_size_bytes: int = 0
    tmpfs_mode: int = 0
    tmpfs_options: tuple[str, ...] = ()
    volume_driver: str = ""
    volume_options: Mapping[str, str] = field(default_factory=dict)
    volume_labels: Mapping[str, str] = field(default_factory=dict)
    subpath: str = ""
    recursive: str = ""
    no_exec: bool = False
    no_suid: bool = False
    no_dev: bool = False
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()
    chown: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A resolved mount of a container: `source` is a host path, an image's id, or "" for tmpfs; `volume_id` and
    `volume` are "" where it is no volume's. `made` are the paths inside that were made for an attached one.
    """

    spec: MountSpec
    source: str = ""
    volume_id: str = ""
    volume: str = ""
    attached: bool = False
    made: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MountRef:
    """How a caller names a mount namespace: one of the three."""

    container: str = ""
    pid: int = 0
    path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignMount:
    """A mount in a namespace that is no container's. `inode` is the namespace's, `start_time` (clock ticks) tells the
    process from its pid's next owner.
    """

    id: str
    ref: MountRef
    inode: int
    mount: Mount
    start_time: int = 0
    create_time: float = 0.0
    revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """Defaults to run an image (OCI image-spec, config.md)."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    stop_signal: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A root filesystem with the defaults to run it. `layers` are hexadecimal sha256, bottom first."""

    id: str
    name: str
    config: ImageConfig
    layers: tuple[str, ...]
    size_bytes: int = 0
    architecture: str = ""
    os: str = "linux"
    create_time: float = 0.0
    revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """One network of a container spec."""

    network: str
    aliases: tuple[str, ...] = ()
    ipv4_address: str = ""
    ipv6_address: str = ""
    mac_address: str = ""
    interface_name: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    gateway_priority: int = 0
    link_local_addresses: tuple[str, ...] = ()
    links: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSpec:
    """What was asked for. `entrypoint` None keeps the image's; `stop_timeout` is in seconds."""

    image: str
    command: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    hostname: str = ""
    domainname: str = ""
    dns_servers: tuple[str, ...] = ()
    dns_search: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()
    extra_hosts: tuple[str, ...] = ()
    publish_all: bool = False
    exposed_ports: tuple[str, ...] = ()
    networks: tuple[Attachment, ...] = ()
    sandbox_container: str = ""
    ports: tuple[PortMapping, ...] = ()
    mounts: tuple[MountSpec, ...] = ()
    volumes_from: tuple[str, ...] = ()
    auto_remove: bool = False
    read_only: bool = False
    stop_signal: str = ""
    stop_timeout: float = 10.0
    restart: Restart = Restart.NO
    restart_limit: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """An image's filesystem, a sandbox, mounts and a process.

    `pid` and `supervisor_pid` (conmon) go with `supervisor_start`, the supervisor's start time in clock ticks
    (proc_pid_stat(5), field 22), so that a reused pid is never taken for it. `stopped` is by a person, not by itself;
    `restart_count` counts since a person started it.
    """

    id: str
    name: str
    spec: ContainerSpec
    image_id: str
    sandbox_id: str
    args: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    state: ContainerState = ContainerState.CREATED
    pid: int = 0
    supervisor_pid: int = 0
    supervisor_start: int = 0
    exit_code: int = 0
    message: str = ""
    stopped: bool = False
    restart_count: int = 0
    create_time: float = 0.0
    start_time: float = 0.0
    finish_time: float = 0.0
    revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One committed change of one resource."""

    revision: int
    time: float
    kind: Kind
    action: str
    resource_id: str
    resource_name: str
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One difference between store and kernel. `kind` None is garbage; `error` says why a repair failed."""

    name: str
    detail: str
    kind: Kind | None = None
    resource_id: str = ""
    repaired: bool = False
    error: str = ""
