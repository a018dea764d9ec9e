"""What an engine that keeps the addresses of its networks itself (Docker) may use: subnets and addresses that are free.

An offer takes nothing: the network, or the endpoint, that comes with it does. So nothing is to be given back, whoever
ends in between. What was offered lately is not offered again soon: another one may ask before the first comes back.
"""

from __future__ import annotations

import secrets
import time
from ipaddress import ip_network

from netstore.errors import FailedPrecondition, InvalidArgument
from netstore.model import Pool
from netstore.networks import ipam
from netstore.networks.context import Context
from netstore.networks.ipam import HostRoute
from netstore.networks.uplink import read_uplink
from netstore.store import Transaction

__all__ = ["Offers"]

_SECONDS = 60.0


class Offers:
    """See the module."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._subnets: dict[str, float] = {}  # when each was offered
        self._cursors: dict[str, int] = {}  # the last address offered, by subnet

    async def subnet(self, asked: str, within: str, *, version: int, spanning: bool = False) -> tuple[str, str]:
        """Return a subnet and a range of it, as they were asked for; "" asks for a free one, for a network that spans
        nodes or not.

        Raises:
            InvalidArgument: one of them is none.
            Exhausted: no default pool is free.
        """
        pool = ipam.validate_pool(Pool(subnet=asked, ip_range=within), 0)
        if asked and ipam.is_chosen(pool):
            return pool.subnet, within
        prefix = ip_network(asked).prefixlen if asked else 0
        routes = (await self._context.apply(read_uplink)).routes
        now = time.monotonic()
        self._subnets = {each: since for each, since in self._subnets.items() if now - since < _SECONDS}

        def choose(tx: Transaction) -> str:
            offered = [HostRoute(ip_network(each), "") for each in self._subnets]
            pools = self._context.global_pools if spanning else self._context.pools
            return ipam.choose_subnet(tx, [*routes, *offered], pools, version=version, prefix=prefix)

        async with self._context.locks.hold("offers"):
            chosen = await self._context.store.read(choose)
            self._subnets[chosen] = now
        return chosen, ""

    def withdraw(self, subnet: str) -> None:
        """Let a subnet be offered again."""
        self._subnets.pop(subnet, None)
        self._cursors.pop(subnet, None)

    async def address(self, subnet: str, within: str, asked: str, *, gateway: bool) -> str:
        """Return an address of a subnet with its prefix length: the one asked for, "" for a free one.

        Raises:
            InvalidArgument: it is not in the subnet.
            FailedPrecondition: no network has the subnet.
            Exhausted: none is free.
        """
        pool = ipam.validate_pool(Pool(subnet=subnet, ip_range=within, gateway=asked), 0)
        if not ipam.is_chosen(pool):
            raise InvalidArgument("pool", subnet, "a subnet that was offered")
        if not asked and not gateway:
            return await self._context.store.read(lambda tx: self._free(tx, pool))
        return f"{pool.gateway}/{ip_network(subnet).prefixlen}"

    def _free(self, tx: Transaction, pool: Pool) -> str:
        row = tx.row("SELECT network_id FROM subnets WHERE subnet = ?", pool.subnet)
        if row is None:
            raise FailedPrecondition(
                f"no network of netstore has the subnet {pool.subnet}",
                hint="--ipam-driver netstore goes with --driver netstore",
            )
        network = tx.networks.require(row[0])
        after = self._cursors.get(pool.subnet, 0)
        if network.vni and ":" in pool.subnet:  # in a swarm, each node's dockerd asks for these, maybe at the same time
            within = ip_network(pool.ip_range or pool.subnet)
            after = int(within.network_address) + secrets.randbelow(within.num_addresses)
        address = ipam.next_free(tx, network, pool, after)
        self._cursors[pool.subnet] = int(address)
        return f"{address}/{ip_network(pool.subnet).prefixlen}"
