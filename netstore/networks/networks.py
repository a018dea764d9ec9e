"""Networks: create, find, update, delete, prune."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import structlog

from netstore.drivers.base import Driver
from netstore.errors import (
    Conflict,
    FailedPrecondition,
    InUse,
    InvalidArgument,
    NetstoreError,
    NotFound,
)
from netstore.kernel.namespaces import open_pinned
from netstore.kernel.paths import closing
from netstore.model import Endpoint, Kind, Network, NetworkSpec, PolicyAction, Sandbox, Scope, new_id
from netstore.networks import ipam, network_rows
from netstore.networks.cluster.members import no_cluster
from netstore.networks.cluster.span import Span
from netstore.networks.context import Context
from netstore.networks.network_rows import NetworkChange
from netstore.networks.policies import Policies, refuse_unpoliced
from netstore.networks.uplink import DEFAULT_MTU, Uplink, overlaps, read_uplink, warnings
from netstore.store import Transaction

__all__ = ["DEFAULT_NETWORK", "NetworkChange", "Networks"]

DEFAULT_NETWORK = "bridge"
_PREDEFINED = {DEFAULT_NETWORK: "bridge", "host": "host", "none": "null"}

log = structlog.get_logger(__name__)


class Networks:
    """The networks of a node."""

    def __init__(self, context: Context, policies: Policies, span: Span | None) -> None:
        self._context = context
        self._store = context.store
        self._overlaps: set[str] | None = None
        self._policies = policies
        self._span = span

    async def start(self) -> None:
        """Make the predefined networks where they are not there yet."""
        present = {network.name for network in await self._store.read(lambda tx: tx.networks.all())}
        for name, driver in _PREDEFINED.items():
            if name not in present:
                await self.create(name, NetworkSpec(driver=driver), predefined=True)

    async def create(
        self,
        name: str,
        spec: NetworkSpec,
        *,
        labels: Mapping[str, str] | None = None,
        network_id: str = "",
        request_id: str = "",
        strict: bool = False,
        predefined: bool = False,
    ) -> tuple[Network, list[str]]:
        """Make a network, or return the one of the same name and spec; with warnings. Its id is random without one.

        Raises:
            AlreadyExists: the name is taken by another spec.
            FailedPrecondition: a subnet overlaps another network's or, with `strict`, a route of the host.
            Exhausted: no default pool is free.
            InvalidArgument: naming the field.
        """
        labels = dict(labels or {})
        if spec.config_from:
            config = await self._store.read(lambda tx: network_rows.configuration(tx, spec.config_from))
            spec, labels = network_rows.configured(spec, config), {**config.labels, **labels}
        driver = self._context.driver(spec.driver)
        if not predefined and spec.driver in self._context.options:
            spec = replace(spec, options={**self._context.options[spec.driver], **spec.options})
        if driver.predefined_only and not predefined and not spec.config_only:
            raise InvalidArgument("spec.driver", spec.driver, "bridge: host and none exist once, ready-made")
        network_rows.check_families(spec)
        network_rows.check_leases(spec, driver)
        pools = tuple(
            ipam.validate_pool(pool, index, gateway=driver.chooses_gateway) for index, pool in enumerate(spec.pools)
        )
        uplink = await self._context.apply(read_uplink)
        warned = warnings(spec.pools, uplink.routes)
        if strict and warned:
            raise FailedPrecondition(warned[0], hint="choose another subnet, or leave --strict out")
        network = Network(
            id=network_id or new_id(), name=name, spec=spec, labels=labels, mtu=uplink.mtu or DEFAULT_MTU,
            predefined=predefined, pools=pools, create_time=time.time(), overlaps=tuple(warned),
        )  # fmt: skip
        if not spec.config_only:
            network = driver.validate(network if driver.has_interfaces else replace(network, mtu=0))
        if network_rows.denies(spec) and not spec.config_only:
            refuse_unpoliced(network, driver)
        if driver.scope is Scope.GLOBAL and not spec.config_only:
            network, made = await self._create_spanning(network, uplink, request_id)
            return network, warned if made else []
        async with self._context.locks.hold(network.id):
            network, made = await self._store.write(lambda tx: self._insert(tx, network, uplink, request_id))
            if made:
                await self._apply(driver, network)
        return network, warned if made else []

    async def _create_spanning(self, network: Network, uplink: Uplink, request_id: str) -> tuple[Network, bool]:
        """Make a network on every node; its part in this one's kernel comes with the first endpoint here."""
        if self._span is None:
            raise no_cluster()
        found, made = await self._span.networks.create(lambda tx: self._insert(tx, network, uplink, ""))
        if made and request_id:
            await self._store.write(lambda tx: tx.answer(request_id, "CreateNetwork", [found.id]))
        return found, made

    def _insert(self, tx: Transaction, network: Network, uplink: Uplink, request_id: str) -> tuple[Network, bool]:
        for made in tx.answered(request_id, "CreateNetwork"):
            return tx.networks.require(made), False
        row = tx.row("SELECT id FROM networks WHERE name = ?", network.name)
        if row:
            return network_rows.same(tx.networks.require(row[0]), network), False
        spec, driver = network.spec, self._context.driver(network.spec.driver)
        if driver.has_interfaces and spec.ipam_driver == "default":
            pools = self._context.global_pools if driver.scope is Scope.GLOBAL else self._context.pools
            resolved = ipam.resolve_pools(tx, spec, network.pools, uplink.routes, pools, gateway=driver.chooses_gateway)
            network = driver.validate(replace(network, pools=resolved, mtu=uplink.mtu or DEFAULT_MTU))
        driver.check_beside(network, tx.networks.all())
        if not spec.config_only:
            network_rows.check_routes(network)
        revision = tx.event(Kind.NETWORK, "create", network.id, network.name, driver=spec.driver)
        network = replace(network, revision=revision)
        tx.networks.insert(network)
        for pool in () if spec.config_only else network.pools:
            ipam.reserve_pool(tx, network, pool)
        tx.answer(request_id, "CreateNetwork", [network.id])
        return network, True

    async def _apply(self, driver: Driver, network: Network) -> None:
        try:
            await self._context.apply(driver.apply_network, network)
        except BaseException:
            await self._store.write(lambda tx: network_rows.delete(tx, network))
            raise
        if network_rows.denies(network.spec):
            try:
                await self._policies.follow(network)
            except BaseException:
                await self._store.write(lambda tx: network_rows.delete(tx, network))
                await self._context.remove(driver.remove_network, network)
                raise

    async def named(self, name: str) -> Network:
        """Return a network by its name alone: for protocols that know no ids, and so no beginnings of ids.

        Raises:
            NotFound: there is none.
        """
        for found in await self._store.read(lambda tx: tx.networks.all("name = ?", name)):
            return found
        raise NotFound(Kind.NETWORK, name, hint="`netstore network ls` shows what there is")

    async def get(self, reference: str) -> tuple[Network, int]:
        """Return a network by name, id or id prefix, and how many endpoints it has."""
        return await self._store.read(lambda tx: network_rows.counted(tx, tx.networks.find(reference)))

    async def all(self, where: str = "1", *values: object) -> list[tuple[Network, int]]:
        """Return the networks that an SQL condition selects, oldest first, and how many endpoints each has."""

        def counted(tx: Transaction) -> list[tuple[Network, int]]:
            counts = dict(tx.rows("SELECT network_id, count(*) FROM endpoints GROUP BY network_id"))
            return [(network, counts.get(network.id, 0)) for network in tx.networks.all(where, *values)]

        return await self._store.read(counted)

    async def update(self, reference: str, etag: str, change: NetworkChange) -> tuple[Network, int]:
        """Change a network while it is used.

        Raises:
            Conflict: the etag is not the current one.
            Immutable: an option that is not live, or a pool that is there, would change.
            KernelError: the kernel refused; all is as it was.
        """
        found, _ = await self.get(reference)

        def edit(tx: Transaction, network: Network) -> Network:
            if etag and etag != str(network.revision):
                raise Conflict(f"network {network.name} has changed", hint="read it again, then change it again")
            return network_rows.changed(tx, self._context.driver(network.spec.driver), network, change)

        if self._context.driver(found.spec.driver).scope is Scope.GLOBAL:
            if self._span is None:
                raise no_cluster()
            await self._span.networks.update(found, edit)
            return await self.get(found.id)
        return await self._update(found.id, edit)

    async def take_over(self, shared: Network) -> None:
        """Let a network of the cluster be here as it was changed on another node, or on this one.

        Raises:
            KernelError: the kernel refused; here it is as it was.
        """

        def edit(tx: Transaction, network: Network) -> Network:
            for pool in shared.pools:
                if pool not in network.pools:
                    ipam.reserve_pool(tx, network, pool)
            return replace(network, spec=shared.spec, pools=shared.pools, labels=shared.labels)

        await self._update(shared.id, edit)

    async def _update(self, network_id: str, edit: Callable[[Transaction, Network], Network]) -> tuple[Network, int]:
        """Change a network's row, then the kernel; when that refuses, both go back."""
        async with self._context.locks.hold(network_id):
            uplink = await self._context.apply(read_uplink)

            def change(tx: Transaction) -> tuple[Network, Network, list[Endpoint], dict[str, Sandbox]]:
                network = tx.networks.require(network_id)
                changed, driver = edit(tx, network), self._context.driver(network.spec.driver)
                if driver.has_interfaces:
                    changed = driver.validate(replace(changed, mtu=uplink.mtu or changed.mtu))
                revision = tx.event(Kind.NETWORK, "update", network.id, network.name)
                changed = replace(changed, revision=revision)
                tx.networks.update(changed)
                endpoints = tx.endpoints.all("network_id = ?", network.id)
                inside = tx.sandboxes.all("id IN (SELECT sandbox_id FROM endpoints WHERE network_id = ?)", network.id)
                return network, changed, endpoints, {sandbox.id: sandbox for sandbox in inside}

            old, new, endpoints, sandboxes = await self._store.write(change)
            attached = [(endpoint, sandboxes[endpoint.sandbox_id]) for endpoint in endpoints if endpoint.attached]
            driver = self._context.driver(new.spec.driver)
            try:
                await self._context.apply(_follow, driver, old, new, attached)
                if _defaults(old) != _defaults(new):
                    await self._policies.follow(new)
            except BaseException:
                await self._store.write(lambda tx: network_rows.restore(tx, old))
                await self._context.apply(_follow, driver, new, old, attached)
                raise
            return new, len(endpoints)

    async def follow_uplink(self) -> int:
        """Give every network whose MTU is the uplink's its present one, and report routes that overlap a subnet.

        Returns:
            The index of the uplink's interface, 0 when there is none.
        """
        uplink = await self._context.apply(read_uplink)
        networks = await self._store.read(lambda tx: tx.networks.all())
        for network in networks:
            driver = self._context.driver(network.spec.driver)
            try:
                if not driver.is_here(network):
                    continue
                wanted = driver.validate(replace(network, mtu=uplink.mtu or network.mtu)).mtu
                if driver.has_interfaces and wanted != network.mtu:
                    await self._update(network.id, lambda _, network: network)
                    log.info("network follows its uplink", network=network.name, mtu=wanted)
            except NetstoreError as error:
                log.warning("network does not follow its uplink", network=network.name, error=str(error))
        found = overlaps(networks, uplink.routes)
        known, self._overlaps = self._overlaps, {text for _, text in found}
        new = [(network, text) for network, text in found if known is not None and text not in known]
        if new:
            await self._store.write(lambda tx: _report(tx, new))
        return uplink.index

    async def delete(self, reference: str) -> None:
        """Remove a network without endpoints.

        Raises:
            NotFound: there is none.
            InUse: it has endpoints.
            FailedPrecondition: it is predefined.
        """

        def remove(tx: Transaction) -> tuple[Network, list[Network]]:
            network = tx.networks.find(reference)
            if network.predefined:
                raise FailedPrecondition(
                    f"network {network.name} is predefined and stays", hint="remove only networks that you created"
                )
            network_rows.refuse_in_use(tx, network)
            network_rows.refuse_referred(tx, network)
            network_rows.delete(tx, network)
            return network, [each for each in tx.networks.all() if network.interface == each.interface != ""]

        if self._span:
            spanning, _ = await self.get(reference)
            if self._context.driver(spanning.spec.driver).scope is Scope.GLOBAL:
                await self._store.read(lambda tx: network_rows.refuse_in_use(tx, spanning))
                await self._span.networks.remove(spanning)
                return
        network, sharing = await self._store.write(remove)
        driver = self._context.driver(network.spec.driver)
        async with self._context.locks.hold(network.id):
            for heir in sharing[:1]:
                await self._context.apply(driver.hand_over, network, heir)
            await self._context.remove(driver.remove_network, network)
            await self._policies.forget(network)

    async def prune(self, wanted: Callable[[Network], bool], *, dry_run: bool) -> list[str]:
        """Remove every network that has no endpoints, is not predefined, and is wanted; returns their names."""
        unused = [
            n for n, endpoints in await self.all()
            if not endpoints and not n.predefined and not n.spec.config_only and wanted(n)
        ]  # fmt: skip
        removed: list[str] = []
        for network in unused:
            if not dry_run:
                try:
                    await self.delete(network.id)
                except InUse:  # attached in between
                    continue
            removed.append(network.name)
        return removed


def _report(tx: Transaction, found: Sequence[tuple[Network, str]]) -> None:
    for network, text in found:
        log.warning("a route overlaps a network", network=network.name, detail=text)
        tx.event(Kind.NETWORK, "overlap", network.id, network.name, detail=text)


def _defaults(network: Network) -> tuple[PolicyAction, PolicyAction]:
    return network.spec.policy_ingress, network.spec.policy_egress


def _follow(driver: Driver, old: Network, new: Network, attached: Sequence[tuple[Endpoint, Sandbox]]) -> None:
    """Make the kernel follow a change of a network, and of its endpoints where it concerns them. Blocking."""
    if not driver.is_here(new):
        return
    driver.update_network(old, new, [endpoint for endpoint, _ in attached])
    if (old.mtu, old.spec.routes, old.spec.options) == (new.mtu, new.spec.routes, new.spec.options):
        return
    for endpoint, sandbox in attached:
        namespace = open_pinned(sandbox.path, sandbox.inode) if sandbox.path else None
        if namespace is not None:  # one that ended is the reconciler's
            with closing(namespace):
                driver.update_endpoint(new, endpoint, namespace, before=old)
