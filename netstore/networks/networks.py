"""Networks: create, find, update, delete, prune."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path

from netstore.drivers.base import Driver
from netstore.drivers.options import refuse_changes
from netstore.errors import AlreadyExists, Conflict, FailedPrecondition, Immutable, InUse, InvalidArgument
from netstore.kernel.links import host_socket
from netstore.kernel.namespaces import open_pinned
from netstore.kernel.paths import closing
from netstore.model import Endpoint, Kind, Network, NetworkSpec, Pool, Sandbox, new_id
from netstore.networks import ipam
from netstore.networks.context import Context
from netstore.networks.ipam import HostRoute
from netstore.networks.planning import changes
from netstore.store import Transaction

__all__ = ["DEFAULT_NETWORK", "Networks", "Uplink"]

DEFAULT_NETWORK = "bridge"
RTF_REJECT, RTF_LOCAL = 0x200, 0x80000000
_PREDEFINED = {DEFAULT_NETWORK: "bridge", "host": "host", "none": "null"}


@dataclass(frozen=True, slots=True)
class Uplink:
    """What the node's routes say: every destination, and the MTU of the interface of its default route."""

    routes: tuple[HostRoute, ...]
    mtu: int


class Networks:
    """The networks of a node."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._store = context.store

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
        request_id: str = "",
        strict: bool = False,
        predefined: bool = False,
    ) -> tuple[Network, list[str]]:
        """Make a network, or return the one of the same name and spec; with warnings.

        Raises:
            AlreadyExists: the name is taken by another spec.
            FailedPrecondition: a subnet overlaps another network's or, with `strict`, a route of the host.
            Exhausted: no default pool is free.
            InvalidArgument: naming the field.
        """
        driver = self._context.driver(spec.driver)
        if driver.predefined_only and not predefined:
            raise InvalidArgument("spec.driver", spec.driver, "bridge: host and none exist once, ready-made")
        _check_families(spec)
        pools = tuple(ipam.validate_pool(pool, index) for index, pool in enumerate(spec.pools))
        uplink = await self._context.apply(read_uplink)
        warnings = _warnings(spec, uplink.routes)
        if strict and warnings:
            raise FailedPrecondition(warnings[0], hint="choose another subnet, or leave --strict out")
        network = Network(
            id=new_id(), name=name, spec=spec, labels=dict(labels or {}), mtu=uplink.mtu, predefined=predefined,
            pools=pools, create_time=time.time(),
        )  # fmt: skip
        network = driver.validate(network if driver.has_interfaces else replace(network, mtu=0))
        async with self._context.locks.hold(network.id):
            network, made = await self._store.write(lambda tx: self._insert(tx, network, uplink.routes, request_id))
            if made:
                await self._apply(driver, network)
        return network, warnings if made else []

    def _insert(
        self, tx: Transaction, network: Network, routes: Sequence[HostRoute], request_id: str
    ) -> tuple[Network, bool]:
        for made in tx.answered(request_id, "CreateNetwork"):
            return tx.networks.require(made), False
        row = tx.row("SELECT id FROM networks WHERE name = ?", network.name)
        if row:
            return _same(tx.networks.require(row[0]), network), False
        spec = network.spec
        if self._context.driver(spec.driver).has_interfaces and spec.ipam_driver == "default":
            resolved = ipam.resolve_pools(tx, spec, network.pools, routes, self._context.pools)
            network = replace(network, pools=resolved)
        _check_routes(network)
        revision = tx.event(Kind.NETWORK, "create", network.id, network.name, driver=spec.driver)
        network = replace(network, revision=revision)
        tx.networks.insert(network)
        for pool in network.pools:
            ipam.reserve_pool(tx, network, pool)
        tx.answer(request_id, "CreateNetwork", [network.id])
        return network, True

    async def _apply(self, driver: Driver, network: Network) -> None:
        try:
            await self._context.apply(driver.apply_network, network)
        except BaseException:
            await self._store.write(lambda tx: _delete(tx, network))
            raise

    async def get(self, reference: str) -> tuple[Network, int]:
        """Return a network by name, id or id prefix, and how many endpoints it has."""
        return await self._store.read(lambda tx: _counted(tx, tx.networks.find(reference)))

    async def all(self) -> list[tuple[Network, int]]:
        """Return every network, oldest first, and how many endpoints each has."""
        return await self._store.read(lambda tx: [_counted(tx, network) for network in tx.networks.all()])

    async def update(
        self, reference: str, etag: str, *, labels: Mapping[str, str] | None = None,
        options: Mapping[str, str] | None = None, pools: Sequence[Pool] | None = None,
        dns_servers: Sequence[str] | None = None,
    ) -> tuple[Network, int]:  # fmt: skip
        """Change a network while it is used; None keeps a field. Pools may be added, options changed where live.

        Raises:
            Conflict: the etag is not the current one.
            Immutable: an option that is not live, or a pool that is there, would change.
            KernelError: the kernel refused; all is as it was.
        """
        found, _ = await self.get(reference)
        driver = self._context.driver(found.spec.driver)
        async with self._context.locks.hold(found.id):
            uplink = await self._context.apply(read_uplink)

            def change(tx: Transaction) -> tuple[Network, Network, list[Endpoint]]:
                network = tx.networks.require(found.id)
                if etag and etag != str(network.revision):
                    raise Conflict(f"network {network.name} has changed", hint="read it again, then change it again")
                spec = network.spec
                if dns_servers is not None:
                    spec = replace(spec, dns_servers=tuple(dns_servers))
                if options is not None:
                    refuse_changes(driver.options, spec.options, options)
                    spec = replace(spec, options=dict(options))
                changed = replace(network, spec=spec, labels=network.labels if labels is None else dict(labels))
                if pools is not None:
                    changed = _add_pools(tx, changed, pools)
                if driver.has_interfaces:
                    changed = driver.validate(replace(changed, mtu=uplink.mtu if options is not None else changed.mtu))
                revision = tx.event(Kind.NETWORK, "update", network.id, network.name)
                changed = replace(changed, revision=revision)
                tx.networks.update(changed)
                return network, changed, tx.endpoints.all("network_id = ?", network.id)

            old, new, endpoints = await self._store.write(change)
            attached = [endpoint for endpoint in endpoints if endpoint.attached]
            try:
                await self._follow(driver, old, new, attached)
            except BaseException:
                await self._store.write(lambda tx: _restore(tx, old))
                await self._follow(driver, new, old, attached)
                raise
            return new, len(endpoints)

    async def _follow(self, driver: Driver, old: Network, new: Network, attached: Sequence[Endpoint]) -> None:
        """Make the kernel follow a change of a network, and of its endpoints where it concerns them."""
        await self._context.apply(driver.update_network, old, new, attached)
        if old.mtu == new.mtu:
            return
        for endpoint in attached:
            sandbox = await self._store.read(lambda tx, e=endpoint: tx.sandboxes.require(e.sandbox_id))  # type: ignore[misc]
            await self._context.apply(_apply_inside, driver, new, endpoint, sandbox)

    async def delete(self, reference: str) -> None:
        """Remove a network without endpoints.

        Raises:
            NotFound: there is none.
            InUse: it has endpoints.
            FailedPrecondition: it is predefined.
        """

        def remove(tx: Transaction) -> Network:
            network = tx.networks.find(reference)
            if network.predefined:
                raise FailedPrecondition(
                    f"network {network.name} is predefined and stays", hint="remove only networks that you created"
                )
            _refuse_in_use(tx, network)
            _delete(tx, network)
            return network

        network = await self._store.write(remove)
        async with self._context.locks.hold(network.id):
            await self._context.remove(self._context.driver(network.spec.driver).remove_network, network)

    async def prune(self, wanted: Callable[[Network], bool], *, dry_run: bool) -> list[str]:
        """Remove every network that has no endpoints, is not predefined, and is wanted; returns their names."""
        unused = [n for n, endpoints in await self.all() if not endpoints and not n.predefined and wanted(n)]
        removed: list[str] = []
        for network in unused:
            if not dry_run:
                try:
                    await self.delete(network.id)
                except InUse:  # attached in between
                    continue
            removed.append(network.name)
        return removed


def read_uplink() -> Uplink:
    """Read routes, and the MTU of the default route's interface, of the daemon's own namespace. Blocking.

    From /proc/net/route and ipv6_route: one route a line, IPv4 in host byte order, metrics in decimal and hexadecimal.
    """
    routes, uplinks = [], []
    place = Path("/proc/thread-self/net")
    for line in (place / "route").read_text().splitlines()[1:]:
        interface, destination, _, _, _, _, metric, mask = line.split()[:8]
        network: IPv4Network | IPv6Network = IPv4Network((_address(destination), IPv4Address(_address(mask)).exploded))
        routes.append(HostRoute(network, interface))
        if network.prefixlen == 0:
            uplinks.append((int(metric), interface))
    for line in (place / "ipv6_route").read_text().splitlines() if (place / "ipv6_route").exists() else ():
        destination, length, *_, metric, _, _, flags, interface = line.split()
        network = IPv6Network((bytes.fromhex(destination), int(length, 16)))
        if network.is_multicast or network.is_link_local or int(flags, 16) & (RTF_LOCAL | RTF_REJECT):
            continue
        routes.append(HostRoute(network, interface))
        if network.prefixlen == 0:
            uplinks.append((int(metric, 16), interface))
    uplink = host_socket().link(min(uplinks)[1]) if uplinks else None
    return Uplink(tuple(routes), uplink.mtu if uplink else 1500)


def _address(text: str) -> bytes:
    return bytes.fromhex(text)[::-1] if sys.byteorder == "little" else bytes.fromhex(text)


def _apply_inside(driver: Driver, network: Network, endpoint: Endpoint, sandbox: Sandbox) -> None:
    namespace = open_pinned(sandbox.path, sandbox.inode)
    if namespace is not None:  # one that ended is the reconciler's
        with closing(namespace):
            driver.apply_endpoint(network, endpoint, namespace)


def _add_pools(tx: Transaction, network: Network, asked: Sequence[Pool]) -> Network:
    """Add the pools that a network does not have yet.

    Raises:
        Immutable: one that it has is missing, or differs.
    """
    wanted = [ipam.validate_pool(pool, index) for index, pool in enumerate(asked)]
    for pool in network.pools:
        if pool not in wanted:
            raise Immutable(f"spec.ipam: subnet {pool.subnet}", "further subnets")
    added = [pool for pool in wanted if pool not in network.pools]
    spec = replace(network.spec, pools=(*network.spec.pools, *added))
    _check_families(spec)
    for pool in added:
        ipam.reserve_pool(tx, network, pool)
    pools = sorted([*network.pools, *added], key=lambda pool: ":" in pool.subnet)
    return replace(network, spec=spec, pools=tuple(pools))


def _restore(tx: Transaction, network: Network) -> None:
    """Undo an update: the row as it was, and no pool besides its own."""
    kept = {pool.subnet for pool in network.pools}
    present = tx.networks.require(network.id)
    for pool in present.pools:
        if pool.subnet not in kept:
            ipam.release_pool(tx, network, pool)
    tx.networks.update(network)


def _check_families(spec: NetworkSpec) -> None:
    """Check that the subnets are of families that the network has."""
    if not spec.enable_ipv4 and not spec.enable_ipv6:
        raise InvalidArgument("spec.enable_ipv4", False, "true, or enable_ipv6 true: a network has one of them")
    for index, pool in enumerate(spec.pools):
        if spec.ipam_driver == "null" and pool.subnet:
            raise InvalidArgument(f"spec.ipam[{index}].subnet", pool.subnet, "nothing with the IPAM driver null")
        enabled = spec.enable_ipv6 if ":" in pool.subnet else spec.enable_ipv4
        if pool.subnet and not enabled:
            name = "enable_ipv6" if ":" in pool.subnet else "enable_ipv4"
            raise InvalidArgument(f"spec.ipam[{index}].subnet", pool.subnet, f"a network with {name} for it")


def _check_routes(network: Network) -> None:
    """Check that the gateways of the routes are the network's own neighbours."""
    subnets = [ip_network(pool.subnet) for pool in network.pools]
    for index, route in enumerate(network.spec.routes):
        if not any(ip_address(route.gateway) in subnet for subnet in subnets):
            accepted = f"an address inside {', '.join(map(str, subnets))}"
            raise InvalidArgument(f"spec.routes[{index}].gateway", route.gateway, accepted)


def _same(present: Network, asked: Network) -> Network:
    difference = changes(asked.spec, present.spec) or changes_of_labels(asked.labels, present.labels)
    if difference:
        raise AlreadyExists(
            f"network {asked.name} exists and differs: {difference}",
            hint="choose another name, or remove the network first", difference=difference,
        )  # fmt: skip
    return present


def changes_of_labels(asked: Mapping[str, str], present: Mapping[str, str]) -> str:
    """Say that labels differ, "" when they do not."""
    return "" if dict(asked) == dict(present) else f"labels is {dict(present)!r}, asked for {dict(asked)!r}"


def _delete(tx: Transaction, network: Network) -> None:
    tx.event(Kind.NETWORK, "remove", network.id, network.name)
    tx.networks.delete(network.id)


def _refuse_in_use(tx: Transaction, network: Network) -> None:
    endpoints = tx.endpoints.all("network_id = ?", network.id)
    if endpoints:
        names = ", ".join(endpoint.name or endpoint.id[:12] for endpoint in endpoints[:10])
        raise InUse(
            f"network {network.name} has {len(endpoints)} endpoint(s): {names}",
            hint="disconnect them, or remove their containers, first", endpoints=names,
        )  # fmt: skip


def _counted(tx: Transaction, network: Network) -> tuple[Network, int]:
    return network, tx.endpoints.count("network_id = ?", network.id)


def _warnings(spec: NetworkSpec, routes: Sequence[HostRoute]) -> list[str]:
    warnings = []
    for pool in spec.pools:
        route = ipam.overlapping_route(ip_network(pool.subnet), routes) if pool.subnet else None
        if route:
            warnings.append(
                f"subnet {pool.subnet} overlaps the host's route {route.destination} on {route.interface}: "
                "what is behind it may become unreachable"
            )
    return warnings
