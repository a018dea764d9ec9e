"""What podman writes to netavark's stdin, and what it reads (netavark 1 and 2, podman 4 and later)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated, Any, TypeVar

import msgspec

from netstore.adapters.fields import set_addresses, to_port
from netstore.adapters.programs import Refusal
from netstore.api.v1 import common_pb2, endpoint_pb2, network_pb2
from netstore.errors import InvalidArgument
from netstore.kernel.sandboxes import RESOLVER_ADDRESS
from netstore.model import Endpoint, Network

__all__ = [
    "CONTAINER_LABEL",
    "NETWORK_LABEL",
    "Container",
    "Creation",
    "NetworkInfo",
    "Subnet",
    "decode",
    "endpoint_spec",
    "free_subnet",
    "network_spec",
    "status",
    "to_ports",
]

NETWORK_LABEL = "podman.network-id"
"""Of networks that podman's configuration made: they go with their last endpoint."""
CONTAINER_LABEL = "podman.container-id"
_DOMAIN = "dns.podman"
"""Podman's search domain; the resolver knows it."""

_OPTIONS = {
    "bridge": {
        "mtu": "com.docker.network.driver.mtu",
        "outbound_addr4": "com.docker.network.host_ipv4",
        "outbound_addr6": "com.docker.network.host_ipv6",
    },
    "macvlan": {"mtu": "com.docker.network.driver.mtu", "mode": "macvlan_mode"},
    "ipvlan": {"mtu": "com.docker.network.driver.mtu", "mode": "ipvlan_mode"},
}
"""Podman's words for our options; the others are the same."""
_INTERFACES = {"bridge": "com.docker.network.bridge.name", "macvlan": "parent", "ipvlan": "parent"}

Prefix = Annotated[int, msgspec.Meta(ge=0, le=65535)]
T = TypeVar("T", bound=msgspec.Struct)


class Subnet(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A subnet; podman itself gives out the addresses of the lease range."""

    subnet: str
    gateway: str | None = None
    lease_range: dict[str, Any] | None = None


class Route(msgspec.Struct, kw_only=True):
    """A static route."""

    destination: str
    gateway: str
    metric: int | None = None


class NetworkInfo(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A network as podman's configuration has it; null is the same as absent."""

    name: str
    id: str = ""
    driver: str = "bridge"
    network_interface: str | None = None
    created: str | None = None
    subnets: list[Subnet] | None = None
    routes: list[Route] | None = None
    ipv6_enabled: bool = False
    internal: bool = False
    dns_enabled: bool = False
    network_dns_servers: list[str] | None = None
    labels: dict[str, str] | None = None
    options: dict[str, str] | None = None
    ipam_options: dict[str, str] | None = None


class PerNetwork(msgspec.Struct, kw_only=True):
    """What a container asks of one network."""

    interface_name: str = ""
    static_ips: list[str] | None = None
    static_mac: str | None = None
    aliases: list[str] | None = None
    options: dict[str, str] | None = None


class PortMapping(msgspec.Struct, kw_only=True):
    """Published ports: `range` consecutive ones, of protocols that commas separate."""

    container_port: Prefix
    host_port: Prefix
    host_ip: str = ""
    protocol: str = "tcp"
    range: Prefix = 1


class Container(msgspec.Struct, kw_only=True):
    """The input of setup and teardown."""

    container_id: str
    container_name: str = ""
    networks: dict[str, PerNetwork]
    network_info: dict[str, NetworkInfo]
    port_mappings: list[PortMapping] | None = None
    dns_servers: list[str] | None = None

    def in_order(self) -> list[tuple[PerNetwork, NetworkInfo]]:
        """Return what is asked of each network, in the order of the interfaces: the first has the published ports.

        Raises:
            Refusal: a network is not described.
        """
        unknown = self.networks.keys() - self.network_info.keys()
        if unknown:
            raise Refusal(f"network_info lacks {', '.join(sorted(unknown))}, which networks names")
        found = [(asked, self.network_info[name]) for name, asked in self.networks.items()]
        return sorted(found, key=lambda pair: (len(pair[0].interface_name), pair[0].interface_name))


class Used(msgspec.Struct, kw_only=True):
    """What podman's other networks use."""

    subnets: list[str] | None = None
    names: dict[str, str] | None = None
    interfaces: list[str] | None = None


class SubnetPool(msgspec.Struct, kw_only=True):
    """Where subnets are taken from: each has a prefix of `size` bits."""

    base: str
    size: int


class CreateOptions(msgspec.Struct, kw_only=True):
    """How free ones are found."""

    subnet_pools: list[SubnetPool] | None = None
    default_interface_name: str | None = None


class Creation(msgspec.Struct, kw_only=True):
    """The input of create."""

    network: NetworkInfo
    used: Used = msgspec.field(default_factory=Used)
    options: CreateOptions = msgspec.field(default_factory=CreateOptions)


def decode(body: bytes, kind: type[T]) -> T:
    """Read podman's input.

    Raises:
        Refusal: it is no such thing.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise Refusal(f"the input is not accepted: {error}") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refusal(f"the input is no JSON: {error}") from error


def network_spec(info: NetworkInfo) -> network_pb2.NetworkSpec:
    """Translate a network.

    Raises:
        InvalidArgument: naming what we have not.
    """
    if info.driver not in _OPTIONS:
        raise InvalidArgument("driver", info.driver, f"one of {', '.join(_OPTIONS)}")
    ipam = (info.ipam_options or {}).get("driver", "")
    if ipam not in ("", "host-local"):
        raise InvalidArgument("ipam_options.driver", ipam, "host-local")
    words = _OPTIONS[info.driver]
    options = {words.get(key, key): value for key, value in (info.options or {}).items()}
    if info.driver == "bridge" and options.get("mode") == "managed":
        del options["mode"]
    if info.network_interface:
        options[_INTERFACES[info.driver]] = info.network_interface
    subnets = info.subnets or []
    return network_pb2.NetworkSpec(
        driver=info.driver, internal=info.internal, options=options,
        enable_ipv4=not subnets or any(":" not in each.subnet for each in subnets),
        enable_ipv6=info.ipv6_enabled or any(":" in each.subnet for each in subnets),
        ipam=[network_pb2.IpamConfig(subnet=each.subnet, gateway=each.gateway or "") for each in subnets],
        routes=[network_pb2.Route(destination=each.destination, gateway=each.gateway) for each in info.routes or ()],
        dns_servers=info.network_dns_servers or (),
    )  # fmt: skip


def endpoint_spec(
    container: Container, asked: PerNetwork, info: NetworkInfo, netns: str, ports: Sequence[common_pb2.PortMapping]
) -> endpoint_pb2.EndpointSpec:
    """Translate what a container asks of a network. Without podman's DNS it has no name there.

    Raises:
        InvalidArgument: naming the field.
    """
    name = container.container_name if info.dns_enabled else ""
    aliases = dict.fromkeys([*(asked.aliases or ()), container.container_id[:12]] if info.dns_enabled else ())
    spec = endpoint_pb2.EndpointSpec(
        network=info.name, sandbox=endpoint_pb2.SandboxRef(netns_path=netns), interface_name=asked.interface_name,
        name=name, aliases=list(aliases), mac_address=asked.static_mac or "", ports=ports,
        options=asked.options or {},
    )  # fmt: skip
    set_addresses(spec, asked.static_ips or (), "static_ips")
    return spec


def to_ports(container: Container) -> list[common_pb2.PortMapping]:
    """Translate published ports.

    Raises:
        InvalidArgument: a protocol is none.
    """
    return [
        to_port(
            protocol, field="port_mappings: protocol", host_ip=each.host_ip, host_port=each.host_port,
            container_port=each.container_port, count=each.range or 1,
        )
        for each in container.port_mappings or () for protocol in each.protocol.split(",")
    ]  # fmt: skip


def status(info: NetworkInfo, endpoint: Endpoint, network: Network) -> Mapping[str, Any]:
    """Return the status block of a container on a network."""
    subnets = []
    for address in endpoint.addresses:
        subnet = {"ipnet": f"{address.address}/{address.prefix}"}
        if address.gateway and not network.spec.internal:
            subnet["gateway"] = address.gateway
        subnets.append(subnet)
    return {
        "dns_search_domains": [_DOMAIN] if info.dns_enabled else [],
        "dns_server_ips": [RESOLVER_ADDRESS] if info.dns_enabled else [],
        "interfaces": {endpoint.interface_name: {"mac_address": endpoint.mac_address, "subnets": subnets}},
    }


def free_subnet(creation: Creation, taken: Sequence[str]) -> str:
    """Return the first subnet of podman's pools that overlaps nothing.

    Raises:
        InvalidArgument: a subnet is none.
        Refusal: all are taken.
    """
    used = [_network(each, "used.subnets") for each in (*(creation.used.subnets or ()), *taken)]
    for pool in creation.options.subnet_pools or ():
        base = _network(pool.base, "options.subnet_pools")
        if base.version == 4 and base.prefixlen <= pool.size <= 30:
            for subnet in base.subnets(new_prefix=pool.size):
                if not any(each.version == 4 and subnet.overlaps(each) for each in used):
                    return str(subnet)
    raise Refusal("no subnet of podman's pools is free", "name one with --subnet")


def _network(text: str, field: str) -> IPv4Network | IPv6Network:
    try:
        return ip_network(text, strict=False)
    except ValueError as error:
        raise InvalidArgument(field, text, "a subnet such as 10.89.0.0/24") from error
