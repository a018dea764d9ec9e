"""This node's endpoints on networks that span nodes: they are claimed when they are made, and what changes is told.

The store's triggers note every change; `publish` works the notes off, so that what was asked for while etcd was away
is finished when it is back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address

import msgspec
import structlog

from netstore.errors import AddressTaken, FailedPrecondition, NetstoreError, NotFound, Unavailable
from netstore.model import Endpoint, Kind, Network, PortMapping, stable_mac
from netstore.networks import ipam
from netstore.networks.cluster import cache, claims
from netstore.networks.cluster.cluster import Cluster, State
from netstore.networks.cluster.records import PORTS, EndpointRecord
from netstore.networks.context import KeyedLocks
from netstore.store import Store, Transaction

__all__ = ["Publication", "readdress"]

_TRIES = 100
_SETTLED_SECONDS = 1.0
"""After so long a change is nobody's who still works on it."""
_AT_ONCE = 16

log = structlog.get_logger(__name__)

_decode = msgspec.json.Decoder(Endpoint).decode


class Publication:
    """Claims endpoints and publishes their changes. `evict` takes an endpoint away that lost its address; none whose
    sandbox's lock somebody has: its attachment may not be answered yet, and asks for another, or is being undone.
    """

    def __init__(self, store: Store, cluster: Cluster, locks: KeyedLocks) -> None:
        self._store = store
        self._cluster = cluster
        self._locks = locks
        self._claiming: set[str] = set()
        self._urgent: set[str] = set()
        self._first_seen: dict[str, float] = {}
        self._wake = asyncio.Event()
        self.evict: Callable[[str], Awaitable[None]] | None = None
        self.unpublish: Callable[[str, Sequence[PortMapping]], Awaitable[object]] | None = None
        """Takes ports back that others have got."""

    def poke(self, endpoint_ids: Iterable[str] = ()) -> None:
        """Publish what changed soon, and these endpoints' changes although they are fresh."""
        self._urgent.update(endpoint_ids)
        self._wake.set()

    async def tell(self, endpoint_id: str) -> None:
        """Publish an endpoint's change, or its end, before returning; where etcd does not answer, later."""
        if self._cluster.state is not State.JOINED:
            return
        try:
            newest, changes = await self._store.read(cache.unpublished)
            if endpoint_id in changes and await self._settle(endpoint_id, changes[endpoint_id], fresh=False):
                await self._store.write(lambda tx: _forget_notes(tx, [endpoint_id], newest))
        except NetstoreError as error:
            log.info("the cluster hears of it later", endpoint=endpoint_id, reason=str(error))
            self.poke([endpoint_id])

    async def claim(self, endpoint: Endpoint, network: Network) -> Endpoint:
        """Hold a new endpoint's addresses in the cluster; where another was faster it gets others.

        Raises:
            AddressTaken: a static address, or a MAC, has a holder.
            FailedPrecondition: the node is drained.
            Unavailable: etcd does not answer, or this node is not in the cluster.
        """
        self._claiming.add(endpoint.id)
        taken: set[str] = set()
        try:
            await self._cluster.ready()
            for _ in range(_TRIES):
                record, drained = await self._store.read(
                    lambda tx, now=endpoint: (self._record(tx, now), self._is_drained(tx))  # type: ignore[misc]
                )
                if drained:
                    raise FailedPrecondition(
                        f"node {self._cluster.node.name} is drained: it takes no endpoints on network {network.name}",
                        hint=f"use another node, or `netstore node undrain {self._cluster.node.name}`",
                        reason="NODE_DRAINED",
                    )  # fmt: skip
                others = await self._cluster.ask(claims.hold(self._cluster.etcd, record, new=True))
                if not others:
                    return endpoint
                if found := {key: holder for key, holder in others.items() if key.startswith(PORTS)}:
                    await self._take_over(found)
                    continue
                taken = taken | {key.rsplit("/", 1)[1] for key in others}
                await self._refuse_static(endpoint, network, others)
                endpoint = await self._store.write(
                    lambda tx, now=endpoint, gone=taken: readdress(tx, network, now, gone)  # type: ignore[misc]
                )
            raise Unavailable(f"network {network.name}: others take its addresses at the same time", hint="try again")
        finally:
            self._claiming.discard(endpoint.id)

    async def hold_ports(self, endpoint: Endpoint) -> None:
        """Hold in the cluster the ports that an endpoint has on every node.

        Raises:
            AddressTaken: one has a holder.
            Unavailable: etcd does not answer, or this node is not in the cluster.
        """
        self._claiming.add(endpoint.id)
        try:
            await self._cluster.ready()
            record = await self._store.read(lambda tx: self._record(tx, endpoint))
            while others := await self._cluster.ask(claims.hold(self._cluster.etcd, record)):
                await self._take_over({key: holder for key, holder in others.items() if key.startswith(PORTS)})
        finally:
            self._claiming.discard(endpoint.id)

    async def _take_over(self, others: Mapping[str, str]) -> None:
        """Free ports that endpoints of lost nodes hold.

        Raises:
            AddressTaken: there are none, or a node that is up holds one.
        """
        for key, holder_id in others.items():
            row = await self._store.read(
                lambda tx, of=holder_id: tx.row("SELECT node_id FROM remote_endpoints WHERE id = ?", of)  # type: ignore[misc]
            )
            if row and await self._cluster.ask(claims.take_over(self._cluster.etcd, key, holder_id, row[0])):
                continue
            protocol, number = key.removeprefix(PORTS).split("/")
            holder = await self._store.read(lambda tx, of=holder_id: _holder(tx, of))  # type: ignore[misc]
            raise AddressTaken(
                f"port {number}/{protocol} of every node is taken by {holder}", reason="PORT_TAKEN", holder=holder,
                hint="publish on another port, or on this node alone (without --mesh)",
            )  # fmt: skip
        if not others:
            raise Unavailable("what the endpoint has in the cluster changes at the same time", hint="try again")

    def _record(self, tx: Transaction, endpoint: Endpoint) -> EndpointRecord:
        names = tx.rows("SELECT name FROM names WHERE endpoint_id = ? ORDER BY name", endpoint.id)
        healthy = tx.rows("SELECT service_id FROM service_health WHERE endpoint_id = ? ORDER BY 1", endpoint.id)
        return EndpointRecord(
            id=endpoint.id, network_id=endpoint.network_id, node_id=self._cluster.node.id,
            vtep=self._cluster.node.address, mac=endpoint.mac_address,
            addresses=tuple(each.address for each in endpoint.addresses), name=endpoint.name,
            names=tuple(name for (name,) in names), attached=endpoint.attached,
            labels=endpoint.labels, healthy=tuple(service_id for (service_id,) in healthy),
            ports=tuple(each for each in endpoint.ports if each.mesh),
        )  # fmt: skip

    def _is_drained(self, tx: Transaction) -> bool:
        node = tx.nodes.get(self._cluster.node.id)
        return node is not None and node.drained

    async def _refuse_static(self, endpoint: Endpoint, network: Network, others: dict[str, str]) -> None:
        """Refuse if what another holds was asked for by name."""
        spec = endpoint.spec
        fields = {spec.ipv4_address: "ipv4_address", spec.ipv6_address: "ipv6_address", spec.mac_address: "mac_address"}
        for key, holder_id in others.items():
            value = key.rsplit("/", 1)[1]
            if field := fields.get(value):
                holder = await self._store.read(lambda tx, of=holder_id: _holder(tx, of))  # type: ignore[misc]
                raise AddressTaken(
                    f"spec.{field}: {value} of network {network.name} is taken by {holder}",
                    hint="choose another, or none to take a free one", network=network.name, holder=holder,
                )  # fmt: skip

    async def publish(self) -> None:
        """Tell the cluster what changes here, for ever."""
        await self._store.write(_note_all)
        self._urgent |= set((await self._store.read(cache.unpublished))[1])
        while True:
            self._wake.clear()
            await self._work_off()
            try:
                await asyncio.wait_for(self._wake.wait(), _SETTLED_SECONDS)
            except TimeoutError:
                pass

    async def _work_off(self) -> None:
        newest, changes = await self._store.read(cache.unpublished)
        now = time.monotonic()
        urgent, self._urgent = self._urgent, set()
        self._first_seen = {each: self._first_seen.get(each, now) for each in changes}
        gate = asyncio.Semaphore(_AT_ONCE)

        async def settle(endpoint_id: str, body: str) -> None:
            async with gate:
                fresh = now - self._first_seen[endpoint_id] < _SETTLED_SECONDS and endpoint_id not in urgent
                if endpoint_id not in self._claiming and await self._settle(endpoint_id, body, fresh=fresh):
                    done.append(endpoint_id)

        done: list[str] = []
        try:
            async with asyncio.TaskGroup() as group:
                for endpoint_id, body in changes.items():
                    group.create_task(settle(endpoint_id, body))
        finally:
            if done:
                await self._store.write(lambda tx: _forget_notes(tx, done, newest))

    async def _settle(self, endpoint_id: str, body: str, *, fresh: bool) -> bool:
        """Make etcd's record of an endpoint what this node has; False when it is left for later."""
        for last in (False, True):
            endpoint = await self._store.read(lambda tx: tx.endpoints.get(endpoint_id))
            if endpoint is None:
                gone = await self._store.read(lambda tx: self._record(tx, _decode(body)))
                await claims.release(self._cluster.etcd, gone)
                return True
            if fresh:
                return False
            try:
                others = await self._hold(endpoint)
            except claims.Recovering:
                return False
            if not others:
                return True
            if all(key.startswith(PORTS) for key in others):
                await self._lose(endpoint, others)
                return False
            if last:
                await self._evict(endpoint, ", ".join(key.rsplit("/", 1)[-1] for key in others))
            elif self._locks.held(await self._store.read(lambda tx, of=endpoint: _lock_of(tx, of))):  # type: ignore[misc]
                return False
            # Nobody works on it: what it has by now is what it was answered.
        return True

    async def _hold(self, endpoint: Endpoint) -> dict[str, str]:
        record = await self._store.read(lambda tx: self._record(tx, endpoint))
        try:
            return await claims.hold(self._cluster.etcd, record)
        except NotFound:
            return {"its network": ""}

    async def _evict(self, endpoint: Endpoint, lost: str) -> None:
        log.error("an endpoint lost what it held, and is taken away", endpoint=endpoint.id, lost=lost)
        await self._store.write(
            lambda tx: tx.event(Kind.ENDPOINT, "evict", endpoint.id, endpoint.name, detail=f"others have {lost}")
        )
        if self.evict:
            try:
                await self.evict(endpoint.id)
            except NetstoreError as error:
                log.error("it stays for now", endpoint=endpoint.id, error=str(error))

    async def _lose(self, endpoint: Endpoint, others: Collection[str]) -> None:
        """Take back ports that others got while this node was lost."""
        lost = [each for each in endpoint.ports if each.mesh and f"{PORTS}{each.protocol}/{each.host_port}" in others]
        named = ", ".join(f"{each.host_port}/{each.protocol}" for each in lost)
        log.error("others publish ports of an endpoint", endpoint=endpoint.id, ports=named)
        await self._store.write(
            lambda tx: tx.event(Kind.ENDPOINT, "port-taken", endpoint.id, endpoint.name, detail=f"others have {named}")
        )
        if self.unpublish:
            await self.unpublish(endpoint.id, lost)

    async def release_stray(self, record: EndpointRecord) -> None:
        """Give back what etcd says that this node has, and it has not."""
        if record.id not in self._claiming:
            await claims.release(self._cluster.etcd, record)


def readdress(tx: Transaction, network: Network, endpoint: Endpoint, taken: Iterable[str]) -> Endpoint:
    """Give an endpoint other addresses than those, which others have. That is noted only meanwhile: who has one may go
    before its row comes here, and nothing would take the note away.
    """
    tx.execute("DELETE FROM addresses WHERE endpoint_id = ?", endpoint.id)
    there = "SELECT 1 FROM addresses WHERE network_id = ? AND address = ?"
    packed = [ip_address(text).packed for text in taken if "." in text or text.count(":") != 5]  # no MAC
    noted = [each for each in packed if not tx.row(there, network.id, each)]
    for each in noted:
        tx.execute("INSERT INTO addresses VALUES (?, ?, NULL)", network.id, each)
    addresses = ipam.allocate(tx, network, endpoint.id, endpoint.spec)
    for each in noted:
        tx.execute("DELETE FROM addresses WHERE network_id = ? AND address = ?", network.id, each)
    mac = endpoint.spec.mac_address or stable_mac(f"{network.id} {addresses[0].address}" if addresses else endpoint.id)
    endpoint = replace(endpoint, addresses=addresses, mac_address=mac)
    tx.endpoints.update(endpoint)
    return endpoint


def _note_all(tx: Transaction) -> None:
    """Note every endpoint, for what etcd may have lost (a backup was restored) or given to others meanwhile."""
    tx.execute(
        "INSERT INTO unpublished (endpoint_id, network_id, body) SELECT id, network_id, body FROM endpoints"
        " WHERE network_id IN (SELECT network_id FROM global_networks)"
    )


def _forget_notes(tx: Transaction, endpoint_ids: Iterable[str], newest: int) -> None:
    for endpoint_id in endpoint_ids:
        tx.execute("DELETE FROM unpublished WHERE endpoint_id = ? AND serial <= ?", endpoint_id, newest)


def _lock_of(tx: Transaction, endpoint: Endpoint) -> str:
    sandbox = tx.sandboxes.get(endpoint.sandbox_id)
    return sandbox.key if sandbox else ""


def _holder(tx: Transaction, endpoint_id: str) -> str:
    row = tx.row(
        "SELECT json_extract(remote_endpoints.body, '$.name'), nodes.name FROM remote_endpoints"
        " JOIN nodes ON nodes.id = node_id WHERE remote_endpoints.id = ?", endpoint_id,
    )  # fmt: skip
    return f"endpoint {row[0] or endpoint_id[:12]} on node {row[1]}" if row else f"endpoint {endpoint_id[:12]}"
