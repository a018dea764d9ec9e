"""Services: a name and an address for many endpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from netstore.model.networks import Protocol

__all__ = ["EndpointMode", "HealthCheck", "Service", "ServicePort", "ServiceSpec"]


class EndpointMode(StrEnum):
    """What a service's name means: its virtual address, or its endpoints' addresses."""

    VIP = "vip"
    DNSRR = "dnsrr"


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
