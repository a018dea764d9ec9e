"""PolicyService: messages in, manager calls, messages out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

from netstore.api.v1 import policy_pb2 as pb
from netstore.api.v1 import policy_pb2_grpc
from netstore.errors import InvalidArgument
from netstore.model import PolicyPort, PolicySpec, Selector
from netstore.networks.drops import Drop, Peer
from netstore.networks.manager import NetworkManager
from netstore.networks.policies import PolicyView
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
from netstore.rpc.networks import to_action, to_action_message

__all__ = ["PolicyServicer"]

_FILTERS = ("network", "id", "name", "label", "action")
_MAX_SELECTORS, _MAX_PORTS, _MAX_LABELS = 64, 64, 16
_PROTOCOLS = {
    pb.POLICY_PROTOCOL_TCP: "tcp",
    pb.POLICY_PROTOCOL_UDP: "udp",
    pb.POLICY_PROTOCOL_SCTP: "sctp",
    pb.POLICY_PROTOCOL_ICMP: "icmp",
}
_MAX_TAIL = 1000
_NUMBERS = {name: number for number, name in _PROTOCOLS.items()}
_MUTABLE = ("labels", "spec.sources", "spec.destinations", "spec.ports", "spec.action")


class PolicyServicer(policy_pb2_grpc.PolicyServiceServicer):
    """Implements `netstore.v1.PolicyService`."""

    def __init__(self, manager: NetworkManager, stopping: asyncio.Event) -> None:
        self._policies = manager.policies
        self._drops = manager.drops
        self._stopping = stopping

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Any) -> pb.GetPolicyResponse:
        return pb.GetPolicyResponse(policy=to_message(await self._policies.get(request.policy)))

    async def ListPolicies(self, request: pb.ListPoliciesRequest, context: Any) -> pb.ListPoliciesResponse:
        filters = Filters(request.filter, _FILTERS)
        found = [view for view in await self._policies.all() if _matches(filters, view)]
        shown, token = page(found, request.page_size, request.page_token, lambda view: view.policy)
        return pb.ListPoliciesResponse(policies=[to_message(view) for view in shown], next_page_token=token)

    async def CreatePolicy(self, request: pb.CreatePolicyRequest, context: Any) -> pb.CreatePolicyResponse:
        name = check_name("name", request.policy.name)
        view = await self._policies.create(
            name,
            request.policy.spec.network,
            _to_spec(request.policy.spec),
            labels=check_labels(request.policy.labels),
            request_id=check_request_id(request.request_id),
        )
        return pb.CreatePolicyResponse(policy=to_message(view))

    async def UpdatePolicy(self, request: pb.UpdatePolicyRequest, context: Any) -> pb.UpdatePolicyResponse:
        paths = check_mask(request.update_mask, mutable=_MUTABLE, immutable=["name", "spec"])
        wanted = request.policy
        asked = _to_spec(wanted.spec)
        fields = {path.removeprefix("spec."): path for path in paths if path.startswith("spec.")}

        def change(spec: PolicySpec) -> PolicySpec:
            return replace(spec, **{name: getattr(asked, name) for name in fields})

        view = await self._policies.update(
            wanted.id or wanted.name,
            wanted.etag,
            labels=check_labels(wanted.labels) if "labels" in paths else None,
            change=change,
        )
        return pb.UpdatePolicyResponse(policy=to_message(view))

    async def DeletePolicy(self, request: pb.DeletePolicyRequest, context: Any) -> pb.DeletePolicyResponse:
        with missing_allowed(allow=request.allow_missing):
            await self._policies.delete(request.policy)
        return pb.DeletePolicyResponse()

    async def WatchDrops(self, request: pb.WatchDropsRequest, context: Any) -> AsyncIterator[pb.WatchDropsResponse]:
        filters = Filters(request.filter, ("network", "policy", "name"))
        if not 0 <= request.tail <= _MAX_TAIL:
            raise InvalidArgument("tail", request.tail, f"0 to {_MAX_TAIL}")
        async for drop in self._drops.watch(tail=request.tail, follow=request.follow, stop=self._stopping):
            if _watched(filters, drop):
                yield pb.WatchDropsResponse(drop=_to_drop(drop))


def _to_spec(spec: pb.PolicySpec) -> PolicySpec:
    return PolicySpec(
        network_id="",
        sources=_selectors(spec.sources, "spec.sources"),
        destinations=_selectors(spec.destinations, "spec.destinations"),
        ports=_ports(spec.ports),
        action=to_action(spec.action, "spec.action"),
    )


def _selectors(selectors: Sequence[pb.Selector], field: str) -> tuple[Selector, ...]:
    if len(selectors) > _MAX_SELECTORS:
        raise InvalidArgument(field, f"{len(selectors)} selectors", f"at most {_MAX_SELECTORS}")
    found = {_selector(selector, f"{field}[{index}]") for index, selector in enumerate(selectors)}
    return tuple(sorted(found, key=lambda selector: (selector.labels, selector.cidr)))


def _selector(selector: pb.Selector, field: str) -> Selector:
    if bool(selector.labels) == bool(selector.cidr):
        raise InvalidArgument(field, str(selector).strip(), "labels, or a cidr; one of the two")
    if selector.cidr:
        try:
            return Selector(cidr=str(ip_network(selector.cidr)))
        except ValueError as error:
            raise InvalidArgument(f"{field}.cidr", selector.cidr, "a CIDR such as 10.0.0.0/8 or fd00::/8") from error
    if len(selector.labels) > _MAX_LABELS:
        raise InvalidArgument(f"{field}.labels", f"{len(selector.labels)} labels", f"at most {_MAX_LABELS}")
    for index, label in enumerate(selector.labels):
        key, _, value = label.partition("=")
        if not 1 <= len(key) <= 128 or len(value) > 4096:
            raise InvalidArgument(f"{field}.labels[{index}]", label, "key or key=value, within the limits of labels")
    return Selector(labels=tuple(sorted(set(selector.labels))))


def _ports(ports: Sequence[pb.PolicyPort]) -> tuple[PolicyPort, ...]:
    if len(ports) > _MAX_PORTS:
        raise InvalidArgument("spec.ports", f"{len(ports)} ports", f"at most {_MAX_PORTS}")
    found = sorted(
        (_port(port, f"spec.ports[{index}]") for index, port in enumerate(ports)),
        key=lambda port: (port.protocol, port.first, port.last),
    )
    merged: list[PolicyPort] = []
    for port in found:
        before = merged[-1] if merged else None
        if before and before.protocol == port.protocol and (not before.first or port.first <= before.last + 1):
            merged[-1] = replace(before, last=max(before.last, port.last))
        else:
            merged.append(port)
    return tuple(merged)


def _port(port: pb.PolicyPort, field: str) -> PolicyPort:
    protocol = _PROTOCOLS.get(port.protocol)
    if protocol is None:
        raise InvalidArgument(f"{field}.protocol", port.protocol, "tcp, udp, sctp or icmp")
    if protocol == "icmp" and (port.first_port or port.last_port):
        raise InvalidArgument(f"{field}.first_port", port.first_port, "nothing with icmp, which has no ports")
    if port.first_port > 65535:
        raise InvalidArgument(f"{field}.first_port", port.first_port, "0 (every port) to 65535")
    last = port.last_port or port.first_port
    if not port.first_port <= last <= 65535 or (last and not port.first_port):
        raise InvalidArgument(f"{field}.last_port", port.last_port, "0, or first_port to 65535")
    return PolicyPort(protocol=protocol, first=port.first_port, last=last)


def to_message(view: PolicyView) -> pb.Policy:
    """Translate a policy."""
    policy, spec = view.policy, view.policy.spec
    return pb.Policy(
        id=policy.id,
        name=policy.name,
        labels=policy.labels,
        etag=str(policy.revision),
        create_time=timestamp(policy.create_time),
        spec=pb.PolicySpec(
            network=view.network.name,
            sources=[pb.Selector(labels=each.labels, cidr=each.cidr) for each in spec.sources],
            destinations=[pb.Selector(labels=each.labels, cidr=each.cidr) for each in spec.destinations],
            ports=[
                pb.PolicyPort(
                    protocol=_NUMBERS[each.protocol],
                    first_port=each.first,
                    last_port=each.last if each.last > each.first else 0,
                )
                for each in spec.ports
            ],
            action=to_action_message(spec.action),
        ),
        status=pb.PolicyStatus(
            packets=view.packets,
            bytes=view.size_bytes,
            source_endpoints=view.sources,
            destination_endpoints=view.destinations,
            network_id=view.network.id,
        ),
    )


def _watched(filters: Filters, drop: Drop) -> bool:
    return (
        filters.any("network", lambda value: value == drop.network)
        and filters.any("policy", lambda value: value == drop.policy)
        and filters.any("name", lambda value: value in (drop.source.name, drop.destination.name))
    )


def _to_drop(drop: Drop) -> pb.Drop:
    return pb.Drop(
        time=timestamp(drop.time),
        network=drop.network,
        policy=drop.policy,
        protocol=drop.protocol,
        source=_to_peer(drop.source),
        destination=_to_peer(drop.destination),
        suppressed=drop.suppressed,
    )


def _to_peer(peer: Peer) -> pb.DropPeer:
    return pb.DropPeer(address=peer.address, port=peer.port, name=peer.name, endpoint=peer.endpoint_id)


def _matches(filters: Filters, view: PolicyView) -> bool:
    return (
        filters.any("network", lambda value: value == view.network.name or view.network.id.startswith(value))
        and filters.any("id", view.policy.id.startswith)
        and filters.any("name", lambda value: value in view.policy.name)
        and filters.any("action", lambda value: value == view.policy.spec.action)
        and filters.labels(view.policy.labels)
    )
