"""Policies: which endpoints may speak with which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from netstore.model.networks import PolicyAction

__all__ = ["Policy", "PolicyPort", "PolicySpec", "Selector"]


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
