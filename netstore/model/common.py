"""What every part speaks of: kinds, ids, names in the kernel, events, findings."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = [
    "BRIDGE_PREFIX",
    "PAIR_PREFIX",
    "TUNNEL_PREFIX",
    "WIREGUARD_LINK",
    "Event",
    "Finding",
    "Kind",
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

WIREGUARD_LINK = "nswg"
"""How the one interface is named that encrypts for all networks of the node."""


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
