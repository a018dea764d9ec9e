"""NetworkDriver of a swarm: its networks are overlays of the cluster, the same on every node.

swarm's leader allocates a network and frees it in the end: those calls make and remove it for all nodes. The dockerd
of a node creates it there when the first container of the node needs it, and deletes it after the last one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

from netstore.adapters.docker.messages import IpamData, NetworkAllocation, NetworkCall, NetworkCreate, Nothing
from netstore.adapters.docker.network import NetworkDriver, to_pools
from netstore.drivers.options import boolean
from netstore.errors import InvalidArgument
from netstore.model import Network, NetworkSpec, Pool
from netstore.networks.ipam import is_chosen

__all__ = ["SwarmDriver"]

INTERNAL = "netstore.internal"


class SwarmDriver(NetworkDriver):
    """See the module. Endpoints are as on networks of a dockerd's own."""

    async def capabilities(self, _: Nothing) -> dict[str, Any]:
        """Answer that networks are the swarm's, and that their containers reach each other across nodes."""
        return {"Scope": "global", "ConnectivityScope": "global"}

    async def allocate(self, call: NetworkAllocation) -> dict[str, Any]:
        """Make a network on every node; a new leader asks again. What is answered comes back with `create`."""
        await self._ensure(call, call.options or {}, [*(call.ipv4_data or ()), *(call.ipv6_data or ())])
        return {"Options": call.options or {}}

    async def free(self, call: NetworkCall) -> dict[str, Any]:
        """Remove a network from every node."""
        return await super().delete(call)

    async def create(self, call: NetworkCreate) -> dict[str, Any]:
        """See that a network is there: it was allocated, or is made again.

        A dockerd that was killed begins anew, and has forgotten its endpoints on the networks of the swarm.
        """
        forgotten = await self._forgotten(call)
        options = (call.options and call.options.generic) or {}
        network = await self._ensure(call, options, [*(call.ipv4_data or ()), *(call.ipv6_data or ())])
        if call.options and call.options.internal and not network.spec.internal:
            raise InvalidArgument("--internal", True, f"-o {INTERNAL}=true besides: swarm does not tell it in time")
        await self._detach(forgotten)
        return {}

    async def delete(self, call: NetworkCall) -> dict[str, Any]:
        """Remove what dockerd forgot on this node; the network is the other nodes', too."""
        await self._detach(await self._forgotten(call))
        return {}

    async def _ensure(self, call: NetworkCall, given: Mapping[str, str], data: Sequence[IpamData]) -> Network:
        options = dict(given)
        asked = options.pop(INTERNAL, "false")
        try:
            internal = boolean(asked)
        except ValueError as error:
            raise InvalidArgument(f"-o {INTERNAL}", asked, "true or false") from error
        pools = tuple(map(_upper, to_pools(data)))
        return await self._make(call, NetworkSpec(driver="overlay", internal=internal, options=options, pools=pools))


def _upper(pool: Pool) -> Pool:
    """Let what netstore itself gives out, the nodes' own addresses among it, be in a subnet's upper half: swarm counts
    from the lower end, and does not know of it.
    """
    if not is_chosen(pool):
        return pool
    _, upper = ip_network(pool.subnet).subnets()
    return replace(pool, ip_range=str(upper))
