"""What the managers of networks and endpoints need of the cluster, where the node is in one."""

from __future__ import annotations

from dataclasses import dataclass

from netstore.networks.cluster.balanced import Balanced
from netstore.networks.cluster.cluster import Cluster
from netstore.networks.cluster.dataplane import DataPlane
from netstore.networks.cluster.keys import Keys
from netstore.networks.cluster.publication import Publication
from netstore.networks.cluster.spanning import Spanning

__all__ = ["Span"]


@dataclass(frozen=True, slots=True)
class Span:
    """The cluster, its networks, their services, this node's endpoints on them, and the kernel's part of all others."""

    cluster: Cluster
    networks: Spanning
    services: Balanced
    publication: Publication
    data_plane: DataPlane
    keys: Keys
