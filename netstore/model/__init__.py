"""What managers and drivers speak of: frozen dataclasses, one for each word of the design.

Every resource is stored as one of these, encoded to JSON by msgspec. A field's unit, limit and meaning are those of the
field of the same name in `proto/netstore/v1`; comments here say only what is not there. Imports nothing of ours.
"""

from __future__ import annotations

from netstore.model.cluster import Node, NodeCheck, NodeLink, Probe, RemoteEndpoint, host_id
from netstore.model.common import (
    BRIDGE_PREFIX,
    PAIR_PREFIX,
    TUNNEL_PREFIX,
    WIREGUARD_LINK,
    Event,
    Finding,
    Kind,
    kernel_name,
    label_matches,
    new_id,
    stable_mac,
)
from netstore.model.containers import Attachment, Container, ContainerSpec, ContainerState, Image, ImageConfig, Restart
from netstore.model.mounts import ForeignMount, IdMapping, Mount, MountRef, MountSpec, MountType
from netstore.model.networks import (
    Address,
    Endpoint,
    EndpointSpec,
    Lease,
    Network,
    NetworkSpec,
    PolicyAction,
    Pool,
    PortMapping,
    Protocol,
    Reach,
    Route,
    Sandbox,
    SandboxRef,
    Scope,
)
from netstore.model.policies import Policy, PolicyPort, PolicySpec, Selector
from netstore.model.services import EndpointMode, HealthCheck, Service, ServicePort, ServiceSpec
from netstore.model.volumes import Consistency, Snapshot, TrashedVolume, Volume, VolumeSpec

__all__ = [
    "BRIDGE_PREFIX",
    "PAIR_PREFIX",
    "TUNNEL_PREFIX",
    "WIREGUARD_LINK",
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
    "NodeCheck",
    "NodeLink",
    "Policy",
    "PolicyAction",
    "PolicyPort",
    "PolicySpec",
    "Pool",
    "PortMapping",
    "Probe",
    "Protocol",
    "Reach",
    "RemoteEndpoint",
    "Restart",
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
    "host_id",
    "kernel_name",
    "label_matches",
    "new_id",
    "stable_mac",
]
