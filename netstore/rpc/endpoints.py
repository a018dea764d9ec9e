"""EndpointService: messages in, manager calls, messages out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from ipaddress import ip_address, ip_network
from typing import Any

from netstore.api.v1 import common_pb2, endpoint_pb2_grpc
from netstore.api.v1 import endpoint_pb2 as pb
from netstore.drivers.options import ENDPOINT_OPTIONS, INTERFACE, MAC_ADDRESS, parse
from netstore.drivers.reach import reach
from netstore.errors import InvalidArgument
from netstore.model import Endpoint, EndpointSpec, Lease, Network, PortMapping, Protocol, Reach, Sandbox, SandboxRef
from netstore.networks.manager import NetworkManager
from netstore.networks.planning import AttachRequest
from netstore.rpc.fields import (
    Filters,
    check_labels,
    check_mask,
    check_name,
    check_request_id,
    missing_allowed,
    page,
    timestamp,
)

__all__ = [
    "EndpointServicer",
    "check_address",
    "check_endpoint_options",
    "check_interface",
    "check_link_local",
    "check_links",
    "check_mac",
    "check_static",
    "check_twins",
    "published",
    "to_attach",
    "to_message",
    "to_port",
    "to_port_message",
    "to_protocol",
    "to_protocol_message",
]

_FILTERS = ("network", "container", "sandbox", "id", "name", "label")
_MAX_BATCH, _MAX_PORTS, _MAX_ALIASES = 256, 1024, 64
_MAX_SOURCES = 64
_ADDRESSES = {
    0: "an address such as 10.1.0.2 or fd00:1::2", 4: "an IPv4 address such as 10.1.0.2",
    6: "an IPv6 address such as fd00:1::2",
}  # fmt: skip
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_INTERFACE = re.compile(r"[a-zA-Z0-9_.-]{1,15}")
_PROTOCOLS = {
    common_pb2.PROTOCOL_UNSPECIFIED: Protocol.TCP,
    common_pb2.PROTOCOL_TCP: Protocol.TCP,
    common_pb2.PROTOCOL_UDP: Protocol.UDP,
    common_pb2.PROTOCOL_SCTP: Protocol.SCTP,
}
_PROTOCOL_MESSAGES = {protocol: number for number, protocol in _PROTOCOLS.items() if number}


class EndpointServicer(endpoint_pb2_grpc.EndpointServiceServicer):
    """Implements `netstore.v1.EndpointService`."""

    def __init__(self, manager: NetworkManager) -> None:
        self._endpoints = manager.endpoints

    async def GetEndpoint(self, request: pb.GetEndpointRequest, context: Any) -> pb.GetEndpointResponse:
        return pb.GetEndpointResponse(endpoint=to_message(*await self._endpoints.get(request.endpoint)))

    async def ListEndpoints(self, request: pb.ListEndpointsRequest, context: Any) -> pb.ListEndpointsResponse:
        filters = Filters(request.filter, _FILTERS)
        where, values = filters.where()
        found = [joined for joined in await self._endpoints.all(where, *values) if _matches(filters, *joined)]
        shown, token = page(found, request.page_size, request.page_token, lambda joined: joined[0])
        return pb.ListEndpointsResponse(endpoints=[to_message(*joined) for joined in shown], next_page_token=token)

    async def AttachEndpoint(self, request: pb.AttachEndpointRequest, context: Any) -> pb.AttachEndpointResponse:
        wanted = [to_attach(request.endpoint)]
        made = await self._endpoints.attach(wanted, request_id=check_request_id(request.request_id))
        return pb.AttachEndpointResponse(endpoint=to_message(*made[0]))

    async def AttachEndpoints(self, request: pb.AttachEndpointsRequest, context: Any) -> pb.AttachEndpointsResponse:
        if not 1 <= len(request.endpoints) <= _MAX_BATCH:
            raise InvalidArgument("endpoints", f"{len(request.endpoints)} endpoints", f"1 to {_MAX_BATCH}")
        wanted = [to_attach(endpoint, f"endpoints[{i}].") for i, endpoint in enumerate(request.endpoints)]
        made = await self._endpoints.attach(wanted, request_id=check_request_id(request.request_id))
        return pb.AttachEndpointsResponse(endpoints=[to_message(*joined) for joined in made])

    async def DetachEndpoint(self, request: pb.DetachEndpointRequest, context: Any) -> pb.DetachEndpointResponse:
        with missing_allowed(allow=request.allow_missing):
            if request.endpoint:
                found = (await self._endpoints.get(request.endpoint))[0]
            else:
                found = await self._endpoints.find(request.network, _to_sandbox(request.sandbox, "sandbox"))
            await self._endpoints.detach(found.id)
        return pb.DetachEndpointResponse()

    async def UpdateEndpoint(self, request: pb.UpdateEndpointRequest, context: Any) -> pb.UpdateEndpointResponse:
        paths = check_mask(
            request.update_mask, mutable=["labels", "spec.aliases", "spec.options"], immutable=["name", "spec"]
        )
        wanted = request.endpoint
        endpoint, _, _ = await self._endpoints.get(wanted.id)
        joined = await self._endpoints.update(
            endpoint.id,
            wanted.etag,
            labels=check_labels(wanted.labels) if "labels" in paths else None,
            aliases=check_aliases(wanted.spec.aliases, "spec.aliases") if "spec.aliases" in paths else None,
            options=check_endpoint_options(wanted.spec.options, "spec.options") if "spec.options" in paths else None,
        )
        return pb.UpdateEndpointResponse(endpoint=to_message(*joined))

    async def PublishPorts(self, request: pb.PublishPortsRequest, context: Any) -> pb.PublishPortsResponse:
        ports = check_ports(request.ports, "ports")
        return pb.PublishPortsResponse(endpoint=to_message(*await self._endpoints.publish(request.endpoint, ports)))

    async def UnpublishPorts(self, request: pb.UnpublishPortsRequest, context: Any) -> pb.UnpublishPortsResponse:
        ports = check_ports(request.ports, "ports")
        return pb.UnpublishPortsResponse(endpoint=to_message(*await self._endpoints.unpublish(request.endpoint, ports)))


def to_port(port: common_pb2.PortMapping, field: str) -> PortMapping:
    """Translate a published port; an unspecified address becomes "".

    Raises:
        InvalidArgument: naming the field.
    """
    count = port.count or 1
    if not 1 <= port.container_port <= 65535:
        raise InvalidArgument(f"{field}.container_port", port.container_port, "1 to 65535")
    if port.host_port > 65535:
        raise InvalidArgument(f"{field}.host_port", port.host_port, "0 (any free port) to 65535")
    if max(port.host_port, port.container_port) + count - 1 > 65535:
        raise InvalidArgument(f"{field}.count", port.count, "so many that the last port is at most 65535")
    if port.host_port_last and not port.host_port + count - 1 <= port.host_port_last <= 65535:
        raise InvalidArgument(f"{field}.host_port_last", port.host_port_last, "host_port + count - 1 to 65535")
    protocol = to_protocol(port.protocol, f"{field}.protocol")
    host_ip = check_address(port.host_ip, f"{field}.host_ip") if port.host_ip else ""
    if host_ip == "::1" and protocol is not Protocol.TCP:
        raise InvalidArgument(f"{field}.host_ip", host_ip, "127.0.0.1 for UDP and SCTP: on ::1 TCP alone is served")
    return PortMapping(
        container_port=port.container_port,
        host_port=port.host_port,
        host_ip="" if host_ip in ("0.0.0.0", "::") else host_ip,
        protocol=protocol,
        count=count,
        host_port_last=0 if port.host_port_last == port.host_port else port.host_port_last,
        sources=_check_sources(port.sources, f"{field}.sources"),
        mesh=port.mesh,
    )


def _check_sources(sources: Sequence[str], field: str) -> tuple[str, ...]:
    if len(sources) > _MAX_SOURCES:
        raise InvalidArgument(field, f"{len(sources)} sources", f"at most {_MAX_SOURCES}")
    checked = []
    for index, source in enumerate(sources):
        try:
            checked.append(str(ip_network(source)))
        except ValueError as error:
            raise InvalidArgument(f"{field}[{index}]", source, "a CIDR such as 10.0.0.0/8 or 192.0.2.7/32") from error
    return tuple(checked)


def check_ports(ports: Sequence[common_pb2.PortMapping], field: str) -> list[PortMapping]:
    """Translate 1 to 1024 ports."""
    if not 1 <= len(ports) <= _MAX_PORTS:
        raise InvalidArgument(field, f"{len(ports)} ports", f"1 to {_MAX_PORTS}")
    return [to_port(port, f"{field}[{index}]") for index, port in enumerate(ports)]


def check_address(text: str, field: str, version: int = 0) -> str:
    """Return an address in its usual form; `version` 0 takes both families."""
    try:
        address = ip_address(text)
    except ValueError as error:
        raise InvalidArgument(field, text, _ADDRESSES[version]) from error
    if version not in (0, address.version) or getattr(address, "scope_id", None):
        raise InvalidArgument(field, text, _ADDRESSES[version])
    return str(address)


def check_static(ipv4: str, ipv6: str, field: str) -> dict[str, str]:
    """Return `ipv4_address` and `ipv6_address`, checked, as keywords of a spec."""
    return {
        f"ipv{version}_address": check_address(text, f"{field}.ipv{version}_address", version) if text else ""
        for version, text in ((4, ipv4), (6, ipv6))
    }


def check_link_local(addresses: Sequence[str], field: str) -> tuple[str, ...]:
    """Return at most 16 link-local addresses."""
    if len(addresses) > 16:
        raise InvalidArgument(field, f"{len(addresses)} addresses", "at most 16")
    checked = tuple(check_address(text, f"{field}[{index}]") for index, text in enumerate(addresses))
    for index, text in enumerate(checked):
        if not ip_address(text).is_link_local:
            raise InvalidArgument(f"{field}[{index}]", text, "an address of 169.254.0.0/16 or fe80::/10")
    return checked


def check_endpoint_options(options: Mapping[str, str], field: str) -> dict[str, str]:
    """Return the options of an endpoint, checked."""
    parse(ENDPOINT_OPTIONS, options, field=field)
    return dict(options)


def check_twins(options: Mapping[str, str], field: str, **own: str) -> None:
    """Refuse an option beside a field that says the same otherwise."""
    for name, key in (("interface_name", INTERFACE), ("mac_address", MAC_ADDRESS)):
        if own[name] and options.get(key, own[name]) != own[name]:
            raise InvalidArgument(f"{field}.options[{key}]", options[key], f"{own[name]}, as {name}; or one of the two")


def check_mac(text: str, field: str) -> str:
    """Return a unicast MAC address in lower case, "" for none."""
    mac = text.lower().replace("-", ":")
    if mac and (not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00"):
        raise InvalidArgument(field, text, "a unicast MAC address such as 02:42:ac:11:00:02")
    return mac


def check_interface(name: str, field: str) -> str:
    """Return an interface name that the kernel takes, "" for none."""
    if name and (not _INTERFACE.fullmatch(name) or name in (".", "..", "lo", "all", "default")):
        raise InvalidArgument(field, name, "1 to 15 letters, digits, '_', '.', '-'; not lo, all, default")
    return name


def check_aliases(aliases: Sequence[str], field: str) -> tuple[str, ...]:
    """Return at most 64 aliases that are names."""
    if len(aliases) > _MAX_ALIASES:
        raise InvalidArgument(field, f"{len(aliases)} aliases", f"at most {_MAX_ALIASES}")
    return tuple(check_name(f"{field}[{index}]", alias) for index, alias in enumerate(aliases))


def check_links(links: Sequence[str], field: str) -> tuple[str, ...]:
    """Return at most 64 links, each with its alias: "CONTAINER:ALIAS"."""
    if len(links) > _MAX_ALIASES:
        raise InvalidArgument(field, f"{len(links)} links", f"at most {_MAX_ALIASES}")
    checked = []
    for index, link in enumerate(links):
        container, separator, alias = link.partition(":")
        name = f"{field}[{index}]"
        checked.append(f"{check_name(name, container)}:{check_name(name, alias if separator else container)}")
    return tuple(checked)


def to_attach(endpoint: pb.Endpoint, prefix: str = "") -> AttachRequest:
    """Translate an endpoint that is asked for.

    Raises:
        InvalidArgument: naming the field.
    """
    spec = endpoint.spec
    if not spec.network:
        raise InvalidArgument(f"{prefix}spec.network", "", "the name or id of a network")
    check_twins(spec.options, f"{prefix}spec", interface_name=spec.interface_name, mac_address=spec.mac_address)
    return AttachRequest(
        network=spec.network,
        sandbox=_to_sandbox(spec.sandbox, f"{prefix}spec.sandbox"),
        labels=check_labels(endpoint.labels),
        spec=EndpointSpec(
            name=check_name(f"{prefix}spec.name", spec.name) if spec.name else "",
            aliases=check_aliases(spec.aliases, f"{prefix}spec.aliases"),
            **check_static(spec.ipv4_address, spec.ipv6_address, f"{prefix}spec"),
            options=check_endpoint_options(spec.options, f"{prefix}spec.options"),
            mac_address=check_mac(spec.mac_address, f"{prefix}spec.mac_address"),
            interface_name=check_interface(spec.interface_name, f"{prefix}spec.interface_name"),
            ports=tuple(check_ports(spec.ports, f"{prefix}spec.ports")) if spec.ports else (),
            gateway_priority=spec.gateway_priority,
            link_local_addresses=check_link_local(spec.link_local_addresses, f"{prefix}spec.link_local_addresses"),
            links=check_links(spec.links, f"{prefix}spec.links"),
        ),
    )


def _to_sandbox(ref: pb.SandboxRef, field: str) -> SandboxRef:
    kind = ref.WhichOneof("sandbox")
    if kind is None or not getattr(ref, kind):
        raise InvalidArgument(field, "", "one of netns_path, pid and container")
    if kind == "pid" and ref.pid < 1:
        raise InvalidArgument(f"{field}.pid", ref.pid, "the pid of a process")
    return SandboxRef(netns_path=ref.netns_path, pid=ref.pid, container=ref.container)


def _matches(filters: Filters, _: Endpoint, network: Network, sandbox: Sandbox) -> bool:
    return (
        filters.any("network", lambda value: value == network.name or network.id.startswith(value))
        and filters.any("container", lambda value: bool(value) and sandbox.container_id.startswith(value))
        and filters.any("sandbox", lambda value: value == sandbox.path or sandbox.id.startswith(value))
    )


def to_protocol(protocol: common_pb2.Protocol.ValueType, field: str) -> Protocol:
    """Translate a transport.

    Raises:
        InvalidArgument: it is none.
    """
    if protocol not in _PROTOCOLS:
        raise InvalidArgument(field, protocol, "PROTOCOL_TCP, PROTOCOL_UDP or PROTOCOL_SCTP")
    return _PROTOCOLS[protocol]


def to_protocol_message(protocol: Protocol) -> common_pb2.Protocol.ValueType:
    """Translate a transport."""
    return _PROTOCOL_MESSAGES[protocol]


def to_port_message(port: PortMapping, reached: Sequence[Reach] = ()) -> common_pb2.PortMapping:
    """Translate a port, with who can reach it where it is published."""
    return common_pb2.PortMapping(
        host_ip=port.host_ip or "0.0.0.0",
        host_port=port.host_port,
        container_port=port.container_port,
        protocol=to_protocol_message(port.protocol),
        count=port.count if port.count > 1 else 0,
        host_port_last=port.host_port_last,
        sources=port.sources,
        mesh=port.mesh,
        reach=[common_pb2.PortReach(address=each.address, sources=each.sources) for each in reached],
    )


def published(endpoint: Endpoint, network: Network) -> list[common_pb2.PortMapping]:
    """Translate the published ports of an endpoint."""
    return [to_port_message(port, reach(network, endpoint, port)) for port in endpoint.ports]


def to_message(endpoint: Endpoint, network: Network, sandbox: Sandbox) -> pb.Endpoint:
    """Translate an endpoint, with the network and the sandbox that it joins."""
    spec, state = endpoint.spec, pb.ENDPOINT_STATE_ACTIVE if endpoint.attached else pb.ENDPOINT_STATE_RESERVED
    reference = (
        pb.SandboxRef(container=sandbox.container_id)
        if sandbox.container_id
        else pb.SandboxRef(netns_path=sandbox.path)
    )
    return pb.Endpoint(
        id=endpoint.id,
        name=endpoint.name,
        labels=endpoint.labels,
        etag=str(endpoint.revision),
        create_time=timestamp(endpoint.create_time),
        spec=pb.EndpointSpec(
            network=network.name,
            sandbox=reference,
            name=spec.name,
            aliases=spec.aliases,
            ipv4_address=spec.ipv4_address,
            ipv6_address=spec.ipv6_address,
            options=spec.options,
            mac_address=spec.mac_address,
            interface_name=spec.interface_name,
            ports=[to_port_message(port) for port in spec.ports],
            gateway_priority=spec.gateway_priority,
            links=spec.links,
            link_local_addresses=spec.link_local_addresses,
        ),
        status=pb.EndpointStatus(
            state=state,
            addresses=[f"{each.address}/{each.prefix}" for each in endpoint.every_address],
            gateway="" if network.spec.internal else next((each.gateway for each in endpoint.addresses), ""),
            mac_address=endpoint.mac_address,
            interface_name=endpoint.interface_name,
            host_interface_name=endpoint.host_interface if endpoint.addresses else "",
            ports=published(endpoint, network),
            sandbox_id=sandbox.id,
            container_id=sandbox.container_id,
            network_id=network.id,
            network_name=network.name,
            lease=_lease(endpoint.lease) if endpoint.lease else None,
        ),
    )


def _lease(lease: Lease) -> pb.DhcpLease:
    ends = None if lease.expire_time == math.inf else timestamp(lease.expire_time)
    return pb.DhcpLease(server=lease.server, expire_time=ends, dns_servers=lease.dns_servers)
