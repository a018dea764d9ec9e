"""ServiceService: messages in, manager calls, messages out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from google.protobuf.duration_pb2 import Duration

from netstore.api.v1 import service_pb2 as pb
from netstore.api.v1 import service_pb2_grpc
from netstore.errors import InvalidArgument
from netstore.model import EndpointMode, HealthCheck, ServicePort, ServiceSpec
from netstore.networks.manager import NetworkManager
from netstore.networks.services import ServiceView
from netstore.rpc.endpoints import to_protocol, to_protocol_message
from netstore.rpc.fields import (
    Filters,
    check_labels,
    check_mask,
    check_name,
    check_period,
    check_request_id,
    missing_allowed,
    page,
    timestamp,
)

__all__ = ["ServiceServicer"]

_FILTERS = ("network", "id", "name", "label", "mode")
_MODES = {
    pb.ENDPOINT_MODE_UNSPECIFIED: EndpointMode.VIP,
    pb.ENDPOINT_MODE_VIP: EndpointMode.VIP,
    pb.ENDPOINT_MODE_DNSRR: EndpointMode.DNSRR,
}
_MODE_MESSAGES = {mode: number for number, mode in _MODES.items() if number}
_MUTABLE = ("labels", "spec.selector", "spec.ports", "spec.health")
_MAX_LABELS, _MAX_PORTS, _MAX_PATH, _MAX_RETRIES = 16, 64, 1024, 1000
_DAY, _HOUR = 86400.0, 3600.0
_PERIOD, _RETRIES = 30.0, 3  # Docker's defaults


class ServiceServicer(service_pb2_grpc.ServiceServiceServicer):
    """Implements `netstore.v1.ServiceService`."""

    def __init__(self, manager: NetworkManager) -> None:
        self._services = manager.services

    async def GetService(self, request: pb.GetServiceRequest, context: Any) -> pb.GetServiceResponse:
        return pb.GetServiceResponse(service=_to_message(await self._services.get(request.service)))

    async def ListServices(self, request: pb.ListServicesRequest, context: Any) -> pb.ListServicesResponse:
        filters = Filters(request.filter, _FILTERS)
        found = [view for view in await self._services.all() if _matches(filters, view)]
        shown, token = page(found, request.page_size, request.page_token, lambda view: view.service)
        return pb.ListServicesResponse(services=[_to_message(view) for view in shown], next_page_token=token)

    async def CreateService(self, request: pb.CreateServiceRequest, context: Any) -> pb.CreateServiceResponse:
        spec = request.service.spec
        if spec.mode not in _MODES:
            raise InvalidArgument("spec.mode", spec.mode, "VIP or DNSRR")
        view = await self._services.create(
            check_name("name", request.service.name),
            spec.network,
            replace(_to_spec(spec), selector=_selector(spec.selector)),
            labels=check_labels(request.service.labels),
            request_id=check_request_id(request.request_id),
        )
        return pb.CreateServiceResponse(service=_to_message(view))

    async def UpdateService(self, request: pb.UpdateServiceRequest, context: Any) -> pb.UpdateServiceResponse:
        paths = check_mask(request.update_mask, mutable=_MUTABLE, immutable=["name", "spec"])
        wanted = request.service
        asked = _to_spec(wanted.spec)
        if "spec.selector" in paths:
            asked = replace(asked, selector=_selector(wanted.spec.selector))
        fields = [path.removeprefix("spec.") for path in paths if path.startswith("spec.")]

        def change(spec: ServiceSpec) -> ServiceSpec:
            return replace(spec, **{name: getattr(asked, name) for name in fields})

        view = await self._services.update(
            wanted.id or wanted.name,
            wanted.etag,
            labels=check_labels(wanted.labels) if "labels" in paths else None,
            change=change,
        )
        return pb.UpdateServiceResponse(service=_to_message(view))

    async def DeleteService(self, request: pb.DeleteServiceRequest, context: Any) -> pb.DeleteServiceResponse:
        with missing_allowed(allow=request.allow_missing):
            await self._services.delete(request.service)
        return pb.DeleteServiceResponse()


def _to_spec(spec: pb.ServiceSpec) -> ServiceSpec:
    return ServiceSpec(
        network_id="",
        selector=(),
        mode=_MODES.get(spec.mode, EndpointMode.VIP),
        ports=_ports(spec.ports),
        health=_health(spec.health) if spec.HasField("health") else None,
    )


def _selector(labels: Sequence[str]) -> tuple[str, ...]:
    if not 1 <= len(labels) <= _MAX_LABELS:
        raise InvalidArgument("spec.selector", f"{len(labels)} labels", f"1 to {_MAX_LABELS}")
    for index, label in enumerate(labels):
        key, _, value = label.partition("=")
        if not 1 <= len(key) <= 128 or len(value) > 4096:
            raise InvalidArgument(f"spec.selector[{index}]", label, "key or key=value, within the limits of labels")
    return tuple(sorted(set(labels)))


def _ports(ports: Sequence[pb.ServicePort]) -> tuple[ServicePort, ...]:
    if len(ports) > _MAX_PORTS:
        raise InvalidArgument("spec.ports", f"{len(ports)} ports", f"at most {_MAX_PORTS}")
    found = {}
    for index, port in enumerate(ports):
        field = f"spec.ports[{index}]"
        for name in ("published_port", "target_port"):
            if not 1 <= getattr(port, name) <= 65535:
                raise InvalidArgument(f"{field}.{name}", getattr(port, name), "1 to 65535")
        made = ServicePort(
            published_port=port.published_port,
            target_port=port.target_port,
            protocol=to_protocol(port.protocol, f"{field}.protocol"),
        )
        if (made.protocol, made.published_port) in found:
            raise InvalidArgument(f"{field}.published_port", port.published_port, "each port once")
        found[made.protocol, made.published_port] = made
    return tuple(made for _, made in sorted(found.items()))


def _health(check: pb.HealthCheck) -> HealthCheck:
    http = check.protocol == pb.HEALTH_PROTOCOL_HTTP
    if not http and check.protocol != pb.HEALTH_PROTOCOL_TCP:
        raise InvalidArgument("spec.health.protocol", check.protocol, "TCP or HTTP")
    if not 1 <= check.port <= 65535:
        raise InvalidArgument("spec.health.port", check.port, "1 to 65535")
    if check.path and not http:
        raise InvalidArgument("spec.health.path", check.path, "nothing with TCP")
    printable = check.path.isascii() and check.path.isprintable() and " " not in check.path
    if check.path and not (check.path.startswith("/") and printable and len(check.path) <= _MAX_PATH):
        raise InvalidArgument("spec.health.path", check.path, f"/…, without spaces, at most {_MAX_PATH} characters")
    if check.retries > _MAX_RETRIES:
        raise InvalidArgument("spec.health.retries", check.retries, f"0 (means 3) to {_MAX_RETRIES}")
    return HealthCheck(
        port=check.port,
        path=(check.path or "/") if http else "",
        interval_seconds=_period("interval", check.interval, 1.0, _DAY),
        timeout_seconds=_period("timeout", check.timeout, 0.1, _HOUR),
        retries=check.retries or _RETRIES,
    )


def _period(name: str, period: Duration, least: float, most: float) -> float:
    seconds = check_period(f"spec.health.{name}", period)
    if seconds and not least <= seconds <= most:
        raise InvalidArgument(f"spec.health.{name}", f"{seconds:g} s", f"{least:g} s to {most:g} s, or 0 (means 30 s)")
    return seconds or _PERIOD


def _to_message(view: ServiceView) -> pb.Service:
    service, spec = view.service, view.service.spec
    return pb.Service(
        id=service.id,
        name=service.name,
        labels=service.labels,
        etag=str(service.revision),
        create_time=timestamp(service.create_time),
        spec=pb.ServiceSpec(
            network=view.network.name,
            selector=spec.selector,
            mode=_MODE_MESSAGES[spec.mode],
            ports=[
                pb.ServicePort(
                    published_port=each.published_port,
                    target_port=each.target_port,
                    protocol=to_protocol_message(each.protocol),
                )
                for each in spec.ports
            ],
            health=_to_health(spec.health) if spec.health else None,
        ),
        status=pb.ServiceStatus(
            addresses=service.addresses,
            endpoints=[
                pb.ServiceEndpoint(
                    endpoint=each.endpoint_id,
                    name=each.name,
                    node=view.nodes.get(each.node_id, each.node_id),
                    addresses=each.addresses,
                    healthy=each.healthy,
                )
                for each in view.backends
            ],
            network_id=view.network.id,
        ),
    )


def _to_health(check: HealthCheck) -> pb.HealthCheck:
    message = pb.HealthCheck(
        protocol=pb.HEALTH_PROTOCOL_HTTP if check.path else pb.HEALTH_PROTOCOL_TCP,
        port=check.port,
        path=check.path,
        retries=check.retries,
    )
    message.interval.FromMilliseconds(round(check.interval_seconds * 1000))
    message.timeout.FromMilliseconds(round(check.timeout_seconds * 1000))
    return message


def _matches(filters: Filters, view: ServiceView) -> bool:
    return (
        filters.any("network", lambda value: value == view.network.name or view.network.id.startswith(value))
        and filters.any("id", view.service.id.startswith)
        and filters.any("name", lambda value: value in view.service.name)
        and filters.any("mode", lambda value: value == view.service.spec.mode)
        and filters.labels(view.service.labels)
    )
