"""Services: create, find, change, remove; and how the kernel is made to follow their endpoints.

Whoever changes an endpoint calls `touch`. Where its network has services, the elements that differ are exchanged soon
afterwards, in the background: several changes at once cost one look, and a network without services costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address

import structlog

from netstore.errors import AlreadyExists, Conflict, FailedPrecondition, NetstoreError
from netstore.kernel.firewall import Element, Firewall
from netstore.model import EndpointMode, EndpointSpec, Kind, Network, Service, ServiceSpec, new_id
from netstore.networks import balance, ipam, ports
from netstore.networks.balance import Backend
from netstore.networks.context import Context
from netstore.networks.health import Checks, Target
from netstore.networks.planning import changes, changes_of_labels
from netstore.store import Transaction

__all__ = ["ServiceView", "Services"]

_AT_ONCE = 60  # pairs of elements in a transaction

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceView:
    """A service with its network and its endpoints; `nodes` are the names of those that have some, by id."""

    service: Service
    network: Network
    backends: Sequence[Backend]
    nodes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Expected:
    """What there should be of a network's services."""

    services: Sequence[Service]
    elements: set[Element]
    targets: frozenset[Target]


class Services:
    """The services of a node."""

    def __init__(self, context: Context, firewall: Firewall) -> None:
        self._context = context
        self._store = context.store
        self._firewall = firewall
        self._applied: dict[str, set[Element]] = {}  # by network: those with services alone
        self._checks = Checks(context.store, self._health_changed)
        self._dirty: set[str] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take the store's services as those that are to be there; the check, which comes next, makes them so."""
        networks = await self._store.read(lambda tx: tx.networks.all("id IN (SELECT network_id FROM services)"))
        for network in networks:
            self._applied[network.id] = (await self._expect(network)).elements
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
        service, made = await self._store.write(lambda tx: _insert(tx, service, found, request_id))
        if made:
            await self._applied_or(found, lambda tx: _delete(tx, service))
        return await self._view(service)

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
        return await self._store.read(lambda tx: [_look(tx, service) for service in tx.services.all()])

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

        def write(tx: Transaction) -> tuple[Service, Service, Network]:
            old = tx.services.find(reference)
            if etag and etag != str(old.revision):
                raise Conflict(f"service {old.name} has changed", hint="read it again, then change it again")
            new = replace(old, spec=change(old.spec), labels=old.labels if labels is None else dict(labels))
            new = replace(new, revision=tx.event(Kind.SERVICE, "update", old.id, old.name))
            _replace(tx, new)
            return old, new, tx.networks.require(old.spec.network_id)

        old, new, network = await self._store.write(write)
        await self._applied_or(network, lambda tx: _replace(tx, old))
        return await self._view(new)

    async def delete(self, reference: str) -> None:
        """Remove a service.

        Raises:
            NotFound: there is none.
            KernelError: the kernel refused; it is still there.
        """
        service = await self._store.write(lambda tx: _delete(tx, tx.services.find(reference)))
        network = await self._store.read(lambda tx: tx.networks.get(service.spec.network_id))
        if network:
            await self._applied_or(network, lambda tx: _restore(tx, service))

    async def _applied_or(self, network: Network, undo: Callable[[Transaction], object]) -> None:
        """Make the kernel follow, or undo what it cannot and raise."""
        self._applied.setdefault(network.id, set())  # who attaches meanwhile touches it
        try:
            await self._refresh(network.id)
        except BaseException:
            await self._store.write(undo)
            self.touch(network.id)
            raise

    async def _follow(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            dirty, self._dirty = self._dirty, set()
            for network_id in dirty:
                try:
                    await self._refresh(network_id)
                except NetstoreError as error:
                    log.error("services do not follow their endpoints", network=network_id, error=str(error))

    async def _refresh(self, network_id: str) -> None:
        """Make the kernel's part of a network's services what the store says."""
        async with self._context.locks.hold(f"services {network_id}"):
            network = await self._store.read(lambda tx: tx.networks.get(network_id))
            if network is None:  # what it had went with it
                self._applied.pop(network_id, None)
                return
            expected = await self._expect(network)
            wanted, before = expected.elements, self._applied.get(network_id, set())
            driver = self._context.driver(network.spec.driver)
            if driver.is_here(network):
                await self._context.apply(driver.apply_services, network)
            await self._context.apply(self._exchange, sorted(before - wanted), sorted(wanted - before))
            self._applied[network_id] = wanted
            if not expected.services:
                del self._applied[network_id]
            self._checks.follow(network_id, expected.targets)

    def _exchange(self, old: Sequence[Element], new: Sequence[Element]) -> None:
        """Exchange in parts, those of one key together, so that each is an answer at every moment."""
        theirs = {(name, text.partition(" : ")[0]): (name, text) for name, text in old}
        for start in range(0, len(new), _AT_ONCE):
            part = new[start : start + _AT_ONCE]
            keys = [(name, text.partition(" : ")[0]) for name, text in part]
            self._firewall.exchange([theirs.pop(key) for key in keys if key in theirs], part)
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

    async def repair(self, network: Network) -> None:
        """Make a network's virtual addresses what they should be."""
        async with self._context.locks.hold(f"services {network.id}"):
            await self._expect(network)
            await self._context.apply(self._context.driver(network.spec.driver).apply_services, network)

    async def _view(self, service: Service) -> ServiceView:
        return await self._store.read(lambda tx: _look(tx, service))


def _look(tx: Transaction, service: Service) -> ServiceView:
    return ServiceView(
        service=service,
        network=tx.networks.require(service.spec.network_id),
        backends=balance.backends(tx.rows, service),
        nodes={node.id: node.name for node in tx.nodes.all()},
    )


def _look_at(tx: Transaction, network: Network) -> _Expected:
    services = tx.services.all("network_id = ?", network.id)
    pairs = [(service, balance.backends(tx.rows, service)) for service in services]
    return _Expected(
        services,
        set().union(*(balance.elements(network, service, found) for service, found in pairs)),
        frozenset(
            Target(service.id, each.endpoint_id, each.revision, each.addresses[0], service.spec.health)
            for service, found in pairs for each in found
            if service.spec.health and each.addresses and not each.node_id
        ),
    )  # fmt: skip


def _insert(tx: Transaction, service: Service, network: Network, request_id: str) -> tuple[Service, bool]:
    for made in tx.answered(request_id, "CreateService"):
        return tx.services.require(made), False
    for present in tx.services.all("name = ?", service.name):
        difference = changes(service.spec, present.spec) or changes_of_labels(service.labels, present.labels)
        if difference:
            raise AlreadyExists(
                f"service {service.name} exists and differs: {difference}",
                hint="choose another name, or remove the service first", difference=difference,
            )  # fmt: skip
        return present, False
    tx.networks.require(network.id)
    if service.spec.mode is EndpointMode.VIP:
        taken = ipam.allocate(tx, network, None, EndpointSpec())
        service = replace(service, addresses=tuple(each.address for each in taken))
    revision = tx.event(Kind.SERVICE, "create", service.id, service.name, network=network.name)
    service = replace(service, revision=revision)
    tx.services.insert(service)
    ports.claim_for_service(tx, service)
    tx.answer(request_id, "CreateService", [service.id])
    return service, True


def _replace(tx: Transaction, service: Service) -> None:
    tx.services.update(service)
    ports.claim_for_service(tx, service)


def _delete(tx: Transaction, service: Service) -> Service:
    tx.event(Kind.SERVICE, "remove", service.id, service.name)
    tx.services.delete(service.id)
    for address in service.addresses:
        tx.execute(
            "DELETE FROM addresses WHERE network_id = ? AND address = ? AND endpoint_id IS NULL",
            service.spec.network_id, ip_address(address).packed,
        )  # fmt: skip
    return service


def _restore(tx: Transaction, service: Service) -> None:
    for address in service.addresses:
        tx.execute("INSERT INTO addresses VALUES (?, ?, NULL)", service.spec.network_id, ip_address(address).packed)
    tx.services.insert(service)
    ports.claim_for_service(tx, service)
