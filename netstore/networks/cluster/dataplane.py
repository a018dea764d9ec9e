"""Makes the kernel follow what other nodes do: which drivers are told of whom."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import structlog

from netstore.drivers.base import Driver
from netstore.errors import NetstoreError
from netstore.model import Finding, Kind, Network, RemoteEndpoint, Scope
from netstore.networks.cluster import cache
from netstore.networks.cluster.cache import Effect
from netstore.networks.context import Context
from netstore.networks.policies import Policies

__all__ = ["DataPlane"]

log = structlog.get_logger(__name__)

_Triple = tuple[str, str, str]


class Followers(Protocol):
    """What of services follows the cluster, too."""

    def touch(self, network_id: str) -> None:
        """Follow a network's endpoints, where it has services."""

    def appear(self, network_id: str) -> None:
        """Follow a network whose services changed."""

    def look(self) -> None:
        """Look what this node is to publish, and cannot yet."""


class DataPlane:
    """What is in the kernel of endpoints of other nodes. What fails is logged, and repaired by the next resync."""

    def __init__(self, context: Context, node_id: str, policies: Policies, services: Followers) -> None:
        self._policies = policies
        self._services = services
        self.change: Callable[[Network], Awaitable[object]] | None = None
        """Lets a network be here as the cluster has it now."""
        self._context = context
        self._node_id = node_id

    async def follow(self, effect: Effect) -> None:
        """Do what an effect asks for."""
        for network in effect.gone:
            await self.remove(network, effect.remove.get(network.id, ()))
        if effect.peers:
            await self.follow_peers()
        for changed in effect.changed:
            await self._attempt(changed, "does not change here", self.change)
        for network_id in effect.policed:
            if policed := await self._network(network_id):
                await self._attempt(policed, "is not policed as it should be", self._policies.follow)
        for network_id in {**effect.remove, **effect.add}:
            async with self._context.locks.hold(network_id):
                found = await self._network(network_id)
                if found and self._driver(found).is_here(found):
                    await self._apply(found, effect.add.get(network_id, ()), effect.remove.get(network_id, ()))
        for network_id in effect.touched:
            self._services.touch(network_id)
        for network_id in effect.services:
            self._services.appear(network_id)
        if effect.services or any(each.ports for added in effect.add.values() for each in added):
            self._services.look()

    async def publish(self, remotes: Sequence[RemoteEndpoint]) -> None:
        """Publish ports of endpoints of other nodes that this node could not before."""
        for each in remotes:
            async with self._context.locks.hold(each.network_id):
                found = await self._network(each.network_id)
                now = await self._context.store.read(lambda tx, of=each.endpoint_id: cache.visible(tx, of))  # type: ignore[misc]
                if now and found and self._driver(found).is_here(found):  # it may have gone, or moved, meanwhile
                    await self._apply(found, [now], ())

    async def _network(self, network_id: str) -> Network | None:
        return await self._context.store.read(lambda tx: tx.networks.get(network_id))

    async def _attempt(self, network: Network, what: str, work: Callable[[Network], Awaitable[object]] | None) -> None:
        assert work
        try:
            await work(network)
        except NetstoreError as error:
            log.error(f"a network of the cluster {what}", network=network.name, error=str(error))

    async def follow_peers(self) -> None:
        """Tell drivers whom to hear, and let packets go the way that they go now."""
        if await self.apply_peers():
            await self._realign()

    async def apply_peers(self) -> bool:
        """Tell every driver whose networks span nodes whom to hear; says whether the ways to some changed."""
        moved = False
        peers = await self._context.store.read(lambda tx: cache.peers(tx, self._node_id))
        for driver in self._context.drivers.values():
            if driver.scope is Scope.GLOBAL:
                try:
                    moved |= await self._context.apply(driver.apply_peers, peers)
                except NetstoreError as error:
                    log.error("peers cannot be set", driver=driver.name, error=str(error))
        return moved

    async def resync(self) -> list[Finding]:
        """Make every network's remote endpoints what the picture says; returns what differed."""
        await self.apply_peers()
        return await self._realign()

    async def _realign(self) -> list[Finding]:
        found = []
        for network in await self._context.store.read(
            lambda tx: tx.networks.all("id IN (SELECT network_id FROM global_networks)")
        ):
            if self._driver(network).is_here(network):
                async with self._context.locks.hold(network.id):
                    found += await self.check(network, repair=True)
        return found

    async def check(self, network: Network, *, repair: bool) -> list[Finding]:
        """Compare what the kernel holds of a network's remote endpoints with the picture; the caller has its lock."""
        driver = self._driver(network)
        observed = (await self._context.apply(driver.observe, network)).remotes
        remotes = await self._context.store.read(lambda tx: cache.remotes(tx, network.id))
        wanted = {triple: each for each in remotes if driver.reaches(each) for triple in _triples(each)}
        missing = {each.endpoint_id: each for triple, each in wanted.items() if triple not in observed}
        extra = [_stranger(network, triple) for triple in sorted(observed - wanted.keys())]
        if not missing and not extra:
            return []
        detail = f"{len(missing)} remote endpoint(s) missing, {len(extra)} that are no more"
        error = await self._apply(network, list(missing.values()), extra) if repair else ""
        return [Finding(kind=Kind.NETWORK, resource_id=network.id, name=network.name, detail=detail,
                        repaired=repair and not error, error=error)]  # fmt: skip

    async def _apply(
        self, network: Network, add: Sequence[RemoteEndpoint], remove: Sequence[RemoteEndpoint]
    ) -> str:  # fmt: skip
        try:
            await self._context.apply(self._driver(network).apply_remote, network, add=add, remove=remove)
            await self._policies.exchange_remotes(network, remove, add)
        except NetstoreError as error:
            log.error("remote endpoints cannot be set", network=network.name, error=str(error))
            return str(error)
        return ""

    async def remove(self, network: Network, remotes: Sequence[RemoteEndpoint]) -> None:
        """Take a network of the cluster that is gone out of the kernel, with what leads to these."""
        async with self._context.locks.hold(network.id):
            try:
                if self._driver(network).is_here(network):
                    await self._apply(network, (), remotes)
                    await self._context.remove(self._driver(network).remove_network, network)
                await self._policies.forget(network)
            except NetstoreError as error:
                log.error("a network of the cluster that is gone stays", network=network.name, error=str(error))

    def _driver(self, network: Network) -> Driver:
        return self._context.driver(network.spec.driver)


def _triples(endpoint: RemoteEndpoint) -> list[_Triple]:
    return [(address, endpoint.mac, endpoint.vtep) for address in endpoint.addresses]


def _stranger(network: Network, triple: _Triple) -> RemoteEndpoint:
    address, mac, vtep = triple
    return RemoteEndpoint(
        endpoint_id="", network_id=network.id, node_id="", vtep=vtep, mac=mac, addresses=(address,) if address else ()
    )
