"""IpamDriver: which subnet and which addresses dockerd may use. Nothing is taken here: see `Offers`."""

from __future__ import annotations

from typing import Any

from netstore.adapters.docker.messages import AddressRequest, Nothing, PoolRequest
from netstore.networks.manager import NetworkManager
from netstore.networks.offers import Offers

__all__ = ["IpamDriver"]

_LOCAL, _GLOBAL = "netstore", "netstore-global"
_KIND, _GATEWAY = "RequestAddressType", "com.docker.network.gateway"


class IpamDriver:
    """A pool's id is its subnet, with a range of it after a comma."""

    def __init__(self, networks: NetworkManager) -> None:
        self._offers: Offers = networks.offers

    async def capabilities(self, _: Nothing) -> dict[str, Any]:
        """Answer that dockerd need not ask again for what it has when it starts."""
        return {"RequiresMACAddress": False, "RequiresRequestReplay": False}

    async def spaces(self, _: Nothing) -> dict[str, Any]:
        """Answer the names of address spaces: they differ in where subnets come from that nobody chose."""
        return {"LocalDefaultAddressSpace": _LOCAL, "GlobalDefaultAddressSpace": _GLOBAL}

    async def request_pool(self, call: PoolRequest) -> dict[str, Any]:
        """Answer a subnet, checked where it was asked for."""
        subnet, within = await self._offers.subnet(
            call.pool, call.sub_pool, version=6 if call.v6 else 4, spanning=call.address_space == _GLOBAL
        )
        return {"PoolID": f"{subnet},{within}" if within else subnet, "Pool": subnet, "Data": {}}

    async def release_pool(self, call: AddressRequest) -> dict[str, Any]:
        """Let a subnet be offered again."""
        self._offers.withdraw(call.pool_id.partition(",")[0])
        return {}

    async def request_address(self, call: AddressRequest) -> dict[str, Any]:
        """Answer an address with its prefix length."""
        subnet, _, within = call.pool_id.partition(",")
        gateway = (call.options or {}).get(_KIND) == _GATEWAY
        return {"Address": await self._offers.address(subnet, within, call.address, gateway=gateway), "Data": {}}

    async def release_address(self, call: AddressRequest) -> dict[str, Any]:
        """Do nothing: an address goes with its endpoint."""
        return {}
