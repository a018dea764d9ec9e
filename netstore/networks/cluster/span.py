"""What the managers of networks and endpoints need of the cluster, where the node is in one."""

from __future__ import annotations

from dataclasses import dataclass

from netstore.errors import FailedPrecondition
from netstore.networks.cluster.balanced import Balanced
from netstore.networks.cluster.cluster import Cluster
from netstore.networks.cluster.dataplane import DataPlane
from netstore.networks.cluster.publication import Publication
from netstore.networks.cluster.spanning import Spanning

__all__ = ["Span", "no_cluster"]


@dataclass(frozen=True, slots=True)
class Span:
    """The cluster, its networks, their services, this node's endpoints on them, and the kernel's part of all others."""

    cluster: Cluster
    networks: Spanning
    services: Balanced
    publication: Publication
    data_plane: DataPlane


def no_cluster() -> FailedPrecondition:
    """Return what a node says that is in no cluster."""
    return FailedPrecondition(
        "this node is in no cluster", reason="NO_CLUSTER",
        hint="write [cluster] into its configuration: see docs/howto/run-a-cluster.md",
    )  # fmt: skip
