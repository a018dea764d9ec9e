"""NetworkService: messages in, manager calls, messages out."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from ipaddress import ip_network
from typing import Any

from netstore.api.v1 import network_pb2 as pb
from netstore.api.v1 import network_pb2_grpc
from netstore.drivers.options import boolean
from netstore.errors import InvalidArgument
from netstore.model import Network, NetworkSpec, NodeCheck, PolicyAction, Pool, Route, Scope
from netstore.networks.manager import NetworkManager
from netstore.networks.networks import NetworkChange
from netstore.rpc.endpoints import check_address, published
from netstore.rpc.fields import (
    Filters,
    check_labels,
    check_mask,
    check_name,
    check_request_id,
    check_servers,
    missing_allowed,
    page,
    timestamp,
)

__all__ = ["NetworkServicer", "to_action", "to_action_message"]

_FILTERS = ("driver", "id", "name", "label", "type", "scope", "dangling")
_FAMILIES = ("com.docker.network.enable_ipv4", "com.docker.network.enable_ipv6")
_ACTIONS: dict[int, PolicyAction] = {
    pb.POLICY_ACTION_UNSPECIFIED: PolicyAction.ALLOW,
    pb.POLICY_ACTION_ALLOW: PolicyAction.ALLOW,
    pb.POLICY_ACTION_DENY: PolicyAction.DENY,
}
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


class NetworkServicer(network_pb2_grpc.NetworkServiceServicer):
    """Implements `netstore.v1.NetworkService`."""

    def __init__(self, manager: NetworkManager) -> None:
        self._manager = manager
        self._networks = manager.networks
        self._endpoints = manager.endpoints

    async def GetNetwork(self, request: pb.GetNetworkRequest, context: Any) -> pb.GetNetworkResponse:
        network, count = await self._networks.get(request.network)
        message = to_message(network, count)
        for endpoint, _, _ in await self._endpoints.all("network_id = ?", network.id):
            for port in published(endpoint, network):
                message.status.ports.add(endpoint_id=endpoint.id, endpoint_name=endpoint.name, port=port)
        return pb.GetNetworkResponse(network=message)

    async def ListNetworks(self, request: pb.ListNetworksRequest, context: Any) -> pb.ListNetworksResponse:
        filters = Filters(request.filter, _FILTERS)
        dangling, (where, values) = filters.flag("dangling"), filters.where()
        found = [pair for pair in await self._networks.all(where, *values) if _matches(filters, dangling, *pair)]
        shown, token = page(found, request.page_size, request.page_token, lambda pair: pair[0])
        return pb.ListNetworksResponse(networks=[to_message(*pair) for pair in shown], next_page_token=token)

    async def CreateNetwork(self, request: pb.CreateNetworkRequest, context: Any) -> pb.CreateNetworkResponse:
        network, warnings = await self._networks.create(
            check_name("name", request.network.name),
            to_spec(request.network.spec),
            labels=check_labels(request.network.labels),
            request_id=check_request_id(request.request_id),
            strict=request.strict,
        )
        _, count = await self._networks.get(network.id)
        return pb.CreateNetworkResponse(network=to_message(network, count), warnings=warnings)

    async def UpdateNetwork(self, request: pb.UpdateNetworkRequest, context: Any) -> pb.UpdateNetworkResponse:
        mutable = (
            "labels", "spec.options", "spec.ipam", "spec.dns_servers", "spec.routes", "spec.policy_ingress",
            "spec.policy_egress",
        )  # fmt: skip
        paths = check_mask(request.update_mask, mutable=mutable, immutable=["name", "spec"])
        wanted = request.network
        spec = to_spec(wanted.spec)
        change = NetworkChange(
            labels=check_labels(wanted.labels) if "labels" in paths else None,
            options=spec.options if "spec.options" in paths else None,
            pools=spec.pools if "spec.ipam" in paths else None,
            dns_servers=spec.dns_servers if "spec.dns_servers" in paths else None,
            routes=spec.routes if "spec.routes" in paths else None,
            policy_ingress=spec.policy_ingress if "spec.policy_ingress" in paths else None,
            policy_egress=spec.policy_egress if "spec.policy_egress" in paths else None,
        )
        network, count = await self._networks.update(wanted.id or wanted.name, wanted.etag, change)
        return pb.UpdateNetworkResponse(network=to_message(network, count))

    async def DeleteNetwork(self, request: pb.DeleteNetworkRequest, context: Any) -> pb.DeleteNetworkResponse:
        with missing_allowed(allow=request.allow_missing):
            await self._networks.delete(request.network)
        return pb.DeleteNetworkResponse()

    async def PruneNetworks(self, request: pb.PruneNetworksRequest, context: Any) -> pb.PruneNetworksResponse:
        filters = Filters(request.filter, ("label", "label!", "until"))
        older = _until(filters)
        removed = await self._networks.prune(
            lambda network: filters.labels(network.labels) and older(network), dry_run=request.dry_run
        )
        return pb.PruneNetworksResponse(networks=removed)

    async def CheckNetwork(self, request: pb.CheckNetworkRequest, context: Any) -> pb.CheckNetworkResponse:
        checks = await self._manager.check_network(request.network)
        cluster = self._manager.cluster
        names = {node.id: node.name for node in await cluster.nodes()} if cluster else {}
        return pb.CheckNetworkResponse(nodes=[_to_check(check, names) for check in checks])


def _to_check(check: NodeCheck, names: Mapping[str, str]) -> pb.NodeCheck:
    message = pb.NodeCheck(
        node=names.get(check.node_id, "self"), used=check.used, mtu=check.mtu, findings=check.findings,
        error=check.error,
    )  # fmt: skip
    for each in check.probes:
        probe = message.probes.add(
            node=names.get(each.node_id, each.node_id[:12]), address=each.address, sent=each.sent,
            received=each.received, mtu=each.mtu,
        )  # fmt: skip
        probe.latency.FromNanoseconds(round(each.latency * 1e9))
    return message


def to_spec(spec: pb.NetworkSpec) -> NetworkSpec:
    """Translate a spec."""
    if spec.ipam_driver not in ("", "default", "null", "dhcp"):
        raise InvalidArgument("spec.ipam_driver", spec.ipam_driver, "default, null or dhcp")
    for key in spec.ipam_options:
        raise InvalidArgument("spec.ipam_options", key, f"nothing: {spec.ipam_driver or 'default'} has no options")
    if spec.config_only and (spec.driver or spec.config_from):
        field = "driver" if spec.driver else "config_from"
        raise InvalidArgument(f"spec.{field}", getattr(spec, field), "nothing beside config_only")
    if len(spec.ipam) > 16:
        raise InvalidArgument("spec.ipam", f"{len(spec.ipam)} pools", "at most 16")
    pools = tuple(
        Pool(subnet=each.subnet, gateway=each.gateway, ip_range=each.ip_range, aux_addresses=dict(each.aux_addresses))
        for each in spec.ipam
    )
    options = dict(spec.options)
    ipv4, ipv6 = (_family(options.pop(key, ""), f"spec.options[{key}]") for key in _FAMILIES)
    return NetworkSpec(
        driver="null" if spec.config_only else spec.driver or "bridge",
        config_only=spec.config_only,
        config_from=spec.config_from,
        internal=spec.internal,
        enable_ipv4=spec.enable_ipv4 if spec.HasField("enable_ipv4") else ipv4 is not False,
        enable_ipv6=spec.enable_ipv6 or ipv6 is True,
        ipam_driver=spec.ipam_driver or "default",
        pools=pools,
        options=options,
        routes=_routes(spec.routes),
        dns_servers=check_servers(spec.dns_servers, "spec.dns_servers", domains=True),
        policy_ingress=to_action(spec.policy_ingress, "spec.policy_ingress"),
        policy_egress=to_action(spec.policy_egress, "spec.policy_egress"),
    )


def to_action(action: int, field: str) -> PolicyAction:
    """Translate an action; unspecified means allow."""
    if action not in _ACTIONS:
        raise InvalidArgument(field, action, "POLICY_ACTION_ALLOW or POLICY_ACTION_DENY")
    return _ACTIONS[action]


def to_action_message(action: PolicyAction) -> pb.PolicyAction.ValueType:
    """Translate an action."""
    return pb.POLICY_ACTION_DENY if action is PolicyAction.DENY else pb.POLICY_ACTION_ALLOW


def _family(text: str, field: str) -> bool | None:
    """Return the value of an option that is the same as Docker's flag --ipv4 or --ipv6, None where it is not given."""
    try:
        return boolean(text) if text else None
    except ValueError as error:
        raise InvalidArgument(field, text, str(error)) from error


def _routes(routes: Sequence[pb.Route]) -> tuple[Route, ...]:
    if len(routes) > 64:
        raise InvalidArgument("spec.routes", f"{len(routes)} routes", "at most 64")
    checked: list[Route] = []
    for index, route in enumerate(routes):
        field = f"spec.routes[{index}]"
        try:
            destination = ip_network(route.destination)
        except ValueError as error:
            raise InvalidArgument(f"{field}.destination", route.destination, "a CIDR such as 10.9.0.0/16") from error
        gateway = check_address(route.gateway, f"{field}.gateway", destination.version)
        if any(each.destination == str(destination) for each in checked):
            raise InvalidArgument(f"{field}.destination", route.destination, "one route a destination")
        checked.append(Route(destination=str(destination), gateway=gateway))
    return tuple(checked)


def to_message(network: Network, endpoint_count: int) -> pb.Network:
    """Translate a network."""
    spec = network.spec
    return pb.Network(
        id=network.id,
        name=network.name,
        labels=network.labels,
        etag=str(network.revision),
        create_time=timestamp(network.create_time),
        spec=pb.NetworkSpec(
            driver=spec.driver,
            internal=spec.internal,
            enable_ipv4=spec.enable_ipv4,
            enable_ipv6=spec.enable_ipv6,
            ipam_driver=spec.ipam_driver,
            ipam=_pools(spec.pools),
            options=spec.options,
            dns_servers=spec.dns_servers,
            routes=[pb.Route(destination=each.destination, gateway=each.gateway) for each in spec.routes],
            policy_ingress=to_action_message(spec.policy_ingress),
            policy_egress=to_action_message(spec.policy_egress),
            config_only=spec.config_only,
            config_from=spec.config_from,
        ),
        status=pb.NetworkStatus(
            state=pb.NETWORK_STATE_ACTIVE,
            ipam=_pools(network.pools),
            interface=network.interface,
            mtu=network.mtu,
            endpoint_count=endpoint_count,
            predefined=network.predefined,
            scope=pb.NETWORK_SCOPE_GLOBAL if network.scope is Scope.GLOBAL else pb.NETWORK_SCOPE_LOCAL,
            vni=network.vni,
            host_addresses=[each.address for each in network.host_addresses],
        ),
    )


def _pools(pools: tuple[Pool, ...]) -> list[pb.IpamConfig]:
    return [
        pb.IpamConfig(subnet=p.subnet, gateway=p.gateway, ip_range=p.ip_range, aux_addresses=p.aux_addresses)
        for p in pools
    ]


def _matches(filters: Filters, dangling: bool | None, network: Network, count: int) -> bool:  # noqa: FBT001
    kind = "builtin" if network.predefined else "custom"
    return (
        filters.any("driver", lambda value: value == network.spec.driver)
        and filters.any("scope", lambda value: value == network.scope)
        and filters.any("type", lambda value: value == kind)
        and dangling in (None, count == 0 and not network.predefined and not network.spec.config_only)
    )


def _until(filters: Filters) -> Callable[[Network], bool]:
    limits = [_moment(value) for value in filters.values.get("until", [])]
    return lambda network: all(network.create_time < limit for limit in limits)


def _moment(text: str) -> float:
    match = _DURATION.fullmatch(text)
    if match and text:
        hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return time.time() - (hours * 3600 + minutes * 60 + seconds)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidArgument("filter", f"until={text}", "a duration such as 24h, or a time as RFC 3339") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
