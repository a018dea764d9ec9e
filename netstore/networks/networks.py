"""Networks: create, find, update, delete, prune."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_network
from pathlib import Path

from netstore.drivers.base import Driver
from netstore.errors import AlreadyExists, Conflict, FailedPrecondition, InUse, InvalidArgument
from netstore.kernel.links import host_socket
from netstore.model import Kind, Network, NetworkSpec, new_id
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

    async def update_labels(self, reference: str, labels: Mapping[str, str], etag: str) -> tuple[Network, int]:
        """Replace a network's labels.

        Raises:
            Conflict: the etag is not the current one.
        """

        def update(tx: Transaction) -> tuple[Network, int]:
            network = tx.networks.find(reference)
            if etag and etag != str(network.revision):
                raise Conflict(f"network {network.name} has changed", hint="read it again, then apply the change again")
            revision = tx.event(Kind.NETWORK, "update", network.id, network.name)
            network = replace(network, labels=dict(labels), revision=revision)
            tx.networks.update(network)
            return _counted(tx, network)

        return await self._store.write(update)

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
