"""Services: create, find, change, remove; and how the kernel is made to follow their endpoints.

Whoever changes an endpoint calls `touch`. Where its network has services, the elements that differ are exchanged soon
afterwards, in the background: several changes at once cost one look, and a network without services costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from netstore.errors import Conflict, FailedPrecondition, NetstoreError
from netstore.kernel.conntrack import forget_published, forget_translated
from netstore.kernel.firewall import Element, Firewall
from netstore.model import (
    Address,
    EndpointMode,
    Kind,
    Network,
    PortMapping,
    Protocol,
    Service,
    ServiceSpec,
    new_id,
)
from netstore.networks import balance, ports, service_rows
from netstore.networks.balance import Backend
from netstore.networks.cluster import cache
from netstore.networks.cluster.balanced import Balanced, Change
from netstore.networks.cluster.members import no_cluster
from netstore.networks.cluster.span import Span
from netstore.networks.context import Context
from netstore.networks.health import Checks, Target
from netstore.store import Transaction

__all__ = ["ServiceView", "Services"]

_AT_ONCE = 60  # pairs of elements in a transaction
_RETRY_SECONDS = 5.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceView:
    """A service with its network and its endpoints; `nodes` are the names of those that have some, by id."""

    service: Service
    network: Network
    backends: Sequence[Backend]
    nodes: Mapping[str, str]


_Way = tuple[str, str]
"""A virtual address, or a protocol and port that is published ("tcp/80"), and an endpoint's address."""


@dataclass(frozen=True, slots=True)
class _Expected:
    """What there should be of a network's services."""

    services: Sequence[Service]
    elements: set[Element]
    ways: frozenset[_Way]
    """How they are reached: who is found ill keeps the connections that it has."""
    targets: frozenset[Target]


class Services:
    """The services of a node."""

    def __init__(self, context: Context, firewall: Firewall) -> None:
        self._context = context
        self._store = context.store
        self._firewall = firewall
        self._applied: dict[str, set[Element]] = {}  # by network: those with services alone
        self._ways: dict[str, frozenset[_Way]] = {}  # likewise
        self._checks = Checks(context.store, self._health_changed)
        self._dirty: set[str] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._span: Span | None = None

    def join(self, span: Span) -> None:
        """Share the services of networks that span nodes."""
        self._span = span

    async def start(self) -> None:
        """Take the store's services as those that are to be there; the check, which comes next, makes them so."""
        networks = await self._store.read(lambda tx: tx.networks.all("id IN (SELECT network_id FROM services)"))
        for network in networks:
            expected = await self._expect(network)
            self._applied[network.id], self._ways[network.id] = expected.elements, expected.ways
            self.touch(network.id)
        self._task = asyncio.create_task(self._follow(), name="services")

    async def close(self) -> None:
        """Stop following; what is in the kernel stays."""
        self._checks.close()
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def touch(self, network_id: str) -> None:
        """Let services follow a change of a network's endpoints."""
        if network_id in self._applied:
            self._dirty.add(network_id)
            self._wake.set()

    def appear(self, network_id: str) -> None:
        """Follow a network whose services changed."""
        self._applied.setdefault(network_id, set())
        self.touch(network_id)

    async def create(
        self, name: str, network: str, spec: ServiceSpec, *, labels: Mapping[str, str], request_id: str = ""
    ) -> ServiceView:
        """Make a service, or return the one of the same name and spec.

        Raises:
            AlreadyExists: the name is taken by another spec.
            NotFound: no such network.
            FailedPrecondition: the network cannot have services.
            AddressTaken: a port has a holder.
            Exhausted: no address is free.
        """
        found = await self._store.read(lambda tx: tx.networks.find(network))
        self._refuse_unbalanced(found, spec.mode)
        service = Service(
            id=new_id(), name=name, spec=replace(spec, network_id=found.id), labels=dict(labels),
            create_time=time.time(),
        )  # fmt: skip

        def plan(tx: Transaction) -> Change:
            inserted, made = service_rows.insert(tx, service, found, request_id)
            return None if made else inserted, inserted

        return await self._view(await self._commit(found, plan))

    def _refuse_unbalanced(self, network: Network, mode: EndpointMode) -> None:
        if network.predefined or not self._context.driver(network.spec.driver).has_services:
            raise FailedPrecondition(
                f"network {network.name} ({network.spec.driver}) has no services",
                hint="create a bridge or overlay network for them",
            )
        if mode is EndpointMode.VIP and not (network.host_seen_at or network.vni):
            raise FailedPrecondition(
                f"network {network.name} has no gateway on the node, through which a virtual address is reached",
                hint="use the endpoint mode dnsrr, or a network with a gateway",
            )

    async def get(self, reference: str) -> ServiceView:
        """Return a service by name, id or id prefix."""
        return await self._view(await self._store.read(lambda tx: tx.services.find(reference)))

    async def all(self) -> list[ServiceView]:
        """Return every service, oldest first."""
        return await self._store.read(lambda tx: [self._look(tx, service) for service in tx.services.all()])

    async def update(
        self,
        reference: str,
        etag: str,
        *,
        labels: Mapping[str, str] | None,
        change: Callable[[ServiceSpec], ServiceSpec],
    ) -> ServiceView:
        """Change a service; `change` returns its new spec, None keeps the labels.

        Raises:
            Conflict: the etag is not the current one.
            AddressTaken: a port has a holder.
            KernelError: the kernel refused; all is as it was.
        """

        found = await self._store.read(lambda tx: tx.services.find(reference))

        def plan(tx: Transaction) -> Change:
            old = tx.services.require(found.id)
            if etag and etag != str(old.revision):
                raise Conflict(f"service {old.name} has changed", hint="read it again, then change it again")
            new = replace(old, spec=change(old.spec), labels=old.labels if labels is None else dict(labels))
            if new == old:
                return old, old
            new = replace(new, revision=tx.event(Kind.SERVICE, "update", old.id, old.name))
            service_rows.change(tx, new)
            return old, new

        return await self._view(await self._commit(await self._network(found), plan))

    async def delete(self, reference: str) -> None:
        """Remove a service.

        Raises:
            NotFound: there is none.
            KernelError: the kernel refused; it is still there.
        """
        found = await self._store.read(lambda tx: tx.services.find(reference))

        def plan(tx: Transaction) -> Change:
            present = tx.services.get(found.id)
            if present:
                service_rows.delete(tx, present)
            return present, None

        await self._commit(await self._network(found), plan)

    async def _network(self, service: Service) -> Network:
        return await self._store.read(lambda tx: tx.networks.require(service.spec.network_id))

    async def _commit(self, network: Network, plan: Callable[[Transaction], Change]) -> Service | None:
        """Make a change in the store, or in the cluster's, and then in the kernel; returns the service, None
        where it was to go and others were faster.

        Raises:
            KernelError: the kernel refused; all is as it was, but for a network that spans nodes: there the service is
                what was asked for, and this node's part is repaired.
        """
        self._applied.setdefault(network.id, set())  # who attaches meanwhile touches it
        if network.vni:
            old, new = await self._shared_or_refuse().commit(plan)
        else:
            old, new = await self._store.write(plan)
        try:
            await self._refresh(network.id)
        except BaseException:
            if not network.vni:
                await self._store.write(lambda tx: _undo(tx, old, new))
            self.touch(network.id)
            raise
        return new or old

    def _shared_or_refuse(self) -> Balanced:
        if self._span is None:
            raise no_cluster()
        return self._span.services

    def look(self) -> None:
        """Look soon what this node is to publish, and cannot yet."""
        self._wake.set()

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _RETRY_SECONDS)
            self._wake.clear()
            try:
                await self._retry()
            except NetstoreError as error:
                log.info("ports that this node is to publish wait", reason=str(error))
            dirty, self._dirty = self._dirty, set()
            for network_id in dirty:
                try:
                    await self._refresh(network_id)
                except NetstoreError as error:
                    log.error("services do not follow their endpoints", network=network_id, error=str(error))

    async def _retry(self) -> None:
        """Publish what could not be: ports that others had may be free by now, and networks be opened."""
        if await self._store.read(_waits):
            claimed, remotes = await self._store.write(lambda tx: (_claim_ports(tx), cache.retry_mesh(tx)))
            for network_id in claimed:
                self.appear(network_id)
            if self._span:
                await self._span.data_plane.publish(remotes)
        for network in await self._store.read(_to_open) if self._span else ():
            assert self._span
            async with self._context.locks.hold(network.id):
                await self._span.networks.open(network)
            self.touch(network.id)

    async def _refresh(self, network_id: str) -> None:
        """Make the kernel's part of a network's services what the store says."""
        async with self._context.locks.hold(f"services {network_id}"):
            network = await self._store.read(lambda tx: tx.networks.get(network_id))
            if network is None:  # what it had went with it
                self._applied.pop(network_id, None)
                self._ways.pop(network_id, None)
                return
            expected = await self._expect(network)
            wanted, before = expected.elements, self._applied.get(network_id, set())
            driver = self._context.driver(network.spec.driver)
            if driver.is_here(network):
                await self._context.apply(driver.apply_services, network)
            applied = self._applied[network_id] = set(before)  # what is, also when a part of it fails
            await self._context.apply(self._exchange, applied, sorted(before - wanted), sorted(wanted - before))
            if left := self._ways.get(network_id, frozenset()) - expected.ways:
                await self._context.apply(_forget_ways, left)
            self._applied[network_id], self._ways[network_id] = wanted, expected.ways
            if not expected.services:
                del self._applied[network_id], self._ways[network_id]
            self._checks.follow(network_id, expected.targets)

    def _exchange(self, applied: set[Element], old: Sequence[Element], new: Sequence[Element]) -> None:
        """Exchange in parts, those of one key together, so that each is an answer at any moment; `applied` follows."""
        theirs = {(name, text.partition(" : ")[0]): (name, text) for name, text in old}
        for start in range(0, len(new), _AT_ONCE):
            part = new[start : start + _AT_ONCE]
            keys = [(name, text.partition(" : ")[0]) for name, text in part]
            gone = [theirs.pop(key) for key in keys if key in theirs]
            self._firewall.exchange(gone, part)
            applied.difference_update(gone)
            applied.update(part)
        self._firewall.remove(theirs.values())

    async def _expect(self, network: Network) -> _Expected:
        """Look at a network's services, and tell the driver their virtual addresses."""
        driver = self._context.driver(network.spec.driver)
        expected = await self._store.read(lambda tx: _look_at(tx, network))
        virtual = [address for service in expected.services for address in service.addresses]
        driver.expect_services(network, virtual)
        return expected if driver.is_here(network) else replace(expected, elements=set())

    async def elements(self, networks: Collection[Network]) -> set[Element]:
        """Return what the firewall is to hold of the services of these networks."""
        found = [await self._expect(network) for network in networks if network.id in self._applied]
        return set().union(*(each.elements for each in found))

    def _health_changed(self, network_id: str, endpoint_id: str) -> None:
        self.touch(network_id)
        if self._span:
            self._span.publication.poke([endpoint_id])

    async def repair(self, network: Network) -> None:
        """Make a network's virtual addresses what they should be."""
        async with self._context.locks.hold(f"services {network.id}"):
            await self._expect(network)
            await self._context.apply(self._context.driver(network.spec.driver).apply_services, network)

    async def _view(self, service: Service | None) -> ServiceView:
        assert service
        return await self._store.read(lambda tx: self._look(tx, tx.services.get(service.id) or service))

    def _look(self, tx: Transaction, service: Service) -> ServiceView:
        return ServiceView(
            service=service,
            network=tx.networks.require(service.spec.network_id),
            backends=balance.backends(tx.rows, service),
            nodes={
                "": self._span.cluster.node.name if self._span else "",
                **{node.id: node.name for node in tx.nodes.all()},
            },
        )


def _look_at(tx: Transaction, network: Network) -> _Expected:
    services = tx.services.all("network_id = ?", network.id)
    pairs = [(service, balance.backends(tx.rows, service)) for service in services]
    return _Expected(
        services,
        set().union(
            *(
                balance.elements(network, service, balance.ports_held(tx.rows, service), found)
                for service, found in pairs
            )
        ),
        frozenset(
            (way, address)
            for service, found in pairs
            for each in found
            for address in each.addresses
            for way in (
                *(virtual for virtual in service.addresses if (":" in virtual) == (":" in address)),
                *(f"{port.protocol}/{port.published_port}" for port in balance.ports_held(tx.rows, service)),
            )
        ),
        frozenset(
            Target(service.id, each.endpoint_id, each.revision, each.addresses[0], service.spec.health)
            for service, found in pairs for each in found
            if service.spec.health and each.addresses and not each.node_id
        ),
    )  # fmt: skip


def _waits(tx: Transaction) -> bool:
    """Say whether a port that this node is to publish is not taken yet."""
    wanted = sum(len(service.spec.ports) for service in tx.services.all())
    held = tx.row("SELECT count(*) FROM service_ports")
    return bool((held and wanted > held[0]) or cache.waiting_mesh(tx))


def _claim_ports(tx: Transaction) -> set[str]:
    """Take the ports of services that are free; returns their networks."""
    changed = set()
    for service in tx.services.all():
        before = balance.ports_held(tx.rows, service)
        ports.claim_for_service(tx, service, strict=False)
        if balance.ports_held(tx.rows, service) != before:
            changed.add(service.spec.network_id)
    return changed


def _to_open(tx: Transaction) -> list[Network]:
    """Return the networks that span nodes, are not in the kernel here, and have ports that every node publishes."""
    published = (
        "id IN (SELECT network_id FROM global_networks) AND json_array_length(body, '$.host_addresses') = 0 AND id IN ("
        "SELECT network_id FROM services JOIN service_ports ON service_id = services.id UNION ALL"
        " SELECT network_id FROM remote_endpoints JOIN mesh_ports ON endpoint_id = remote_endpoints.id WHERE held)"
    )
    return tx.networks.all(published)


def _undo(tx: Transaction, old: Service | None, new: Service | None) -> None:
    if old is None and new:
        service_rows.delete(tx, new)
    elif old and new is None:
        service_rows.restore(tx, old)
    elif old and new:
        service_rows.change(tx, old)


def _forget_ways(ways: Iterable[_Way]) -> None:
    """Forget flows that came to endpoints by a service that has them no more: a client that keeps its port would stay
    with one.
    """
    for way, address in ways:
        protocol, _, number = way.partition("/")
        if not number:
            forget_translated(way, address)
            continue
        port = PortMapping(container_port=int(number), host_port=int(number), protocol=Protocol(protocol))
        forget_published([port], [Address(address=address, prefix=0)])
