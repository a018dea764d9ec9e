"""NodeService: messages in, cluster calls, messages out."""

from __future__ import annotations

from typing import Any

from netstore.api.v1 import node_pb2 as pb
from netstore.api.v1 import node_pb2_grpc, system_pb2
from netstore.model import Node
from netstore.networks.cluster.cluster import Cluster, State
from netstore.networks.manager import NetworkManager
from netstore.rpc.fields import Filters, missing_allowed, page, timestamp

__all__ = ["NodeServicer", "cluster_info"]

_STATES = {"up": pb.NODE_STATE_UP, "down": pb.NODE_STATE_DOWN, "unknown": pb.NODE_STATE_UNKNOWN}


async def cluster_info(cluster: Cluster) -> system_pb2.ClusterInfo:
    """Return how the node stands with its cluster."""
    nodes = await cluster.nodes()
    return system_pb2.ClusterInfo(
        state=getattr(system_pb2, f"CLUSTER_STATE_{cluster.state.name}"),
        message=cluster.reason,
        node_name=cluster.node.name,
        address=cluster.node.address,
        endpoints=cluster.endpoints,
        nodes=len(nodes),
        nodes_up=sum(node.up for node in nodes),
    )


class NodeServicer(node_pb2_grpc.NodeServiceServicer):
    """Implements `netstore.v1.NodeService`."""

    def __init__(self, manager: NetworkManager) -> None:
        self._manager = manager

    @property
    def _cluster(self) -> Cluster:
        return self._manager.require_cluster()

    async def GetNode(self, request: pb.GetNodeRequest, context: Any) -> pb.GetNodeResponse:
        node = await self._cluster.find(request.node)
        return pb.GetNodeResponse(node=await self._to_message(node))

    async def ListNodes(self, request: pb.ListNodesRequest, context: Any) -> pb.ListNodesResponse:
        filters = Filters(request.filter, ("id", "name", "state"))
        filters.refuse_unknown("state", _STATES)
        found = [node for node in await self._cluster.nodes() if self._matches(filters, node)]
        shown, token = page(found, request.page_size, request.page_token, lambda node: node)
        return pb.ListNodesResponse(nodes=[await self._to_message(node) for node in shown], next_page_token=token)

    async def DeleteNode(self, request: pb.DeleteNodeRequest, context: Any) -> pb.DeleteNodeResponse:
        with missing_allowed(allow=request.allow_missing):
            await self._cluster.remove(request.node, force=request.force)
        return pb.DeleteNodeResponse()

    async def DrainNode(self, request: pb.DrainNodeRequest, context: Any) -> pb.DrainNodeResponse:
        node = await self._cluster.drain(request.node, request.etag, drained=True)
        return pb.DrainNodeResponse(node=await self._to_message(node))

    async def UndrainNode(self, request: pb.UndrainNodeRequest, context: Any) -> pb.UndrainNodeResponse:
        node = await self._cluster.drain(request.node, request.etag, drained=False)
        return pb.UndrainNodeResponse(node=await self._to_message(node))

    def _matches(self, filters: Filters, node: Node) -> bool:
        return (
            filters.any("id", node.id.startswith)
            and filters.any("name", node.name.__contains__)
            and filters.any("state", lambda value: _STATES.get(value) == self._state(node))
        )

    def _state(self, node: Node) -> pb.NodeState.ValueType:
        if self._cluster.state is not State.JOINED and node.id != self._cluster.node.id:
            return pb.NODE_STATE_UNKNOWN
        return pb.NODE_STATE_UP if node.up else pb.NODE_STATE_DOWN

    async def _to_message(self, node: Node) -> pb.Node:
        return pb.Node(
            id=node.id,
            name=node.name,
            etag=str(node.revision),
            create_time=timestamp(node.create_time),
            status=pb.NodeStatus(
                state=self._state(node),
                availability=pb.NODE_AVAILABILITY_DRAIN if node.drained else pb.NODE_AVAILABILITY_ACTIVE,
                address=node.address,
                version=node.version,
                self=node.id == self._cluster.node.id,
                endpoint_count=await self._cluster.count_endpoints(node.id),
            ),
        )
