"""Networks that span nodes: created and removed by one transaction, and used on a node from its first endpoint on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from ipaddress import ip_address
from typing import TypeVar

import structlog

from netstore.drivers.base import Driver
from netstore.errors import Exhausted, FailedPrecondition, InUse, NotFound, Unavailable
from netstore.model import Address, EndpointSpec, Network, Policy, stable_mac
from netstore.networks import ipam
from netstore.networks.cluster import cache, claims
from netstore.networks.cluster.cluster import Cluster
from netstore.networks.cluster.dataplane import DataPlane
from netstore.networks.cluster.members import member_key
from netstore.networks.cluster.records import (
    CLAIMS,
    ENDPOINTS,
    HOSTS,
    NETWORKS,
    POLICIES,
    RECOVERING,
    SERVICES,
    SUBNETS,
    decode_endpoint,
    decode_network,
    encode,
    shared,
)
from netstore.networks.context import Context
from netstore.networks.uplink import DEFAULT_MTU, read_uplink
from netstore.store import Store, Transaction
from netstore.store.etcd import KeyValue, Op, absent, delete, delete_below, empty_below, exists, get, put, unchanged

__all__ = ["Spanning", "rehearse"]

_TRIES = 20
_PAUSE_SECONDS = 0.5
_FIRST_VNI, _LAST_VNI = 4096, (1 << 24) - 1
"""Docker's choice begins there too."""

T = TypeVar("T")

log = structlog.get_logger(__name__)


class _Rehearsed(Exception):
    """Takes a transaction back that only was to be tried."""


async def rehearse(store: Store, plan: Callable[[Transaction], T]) -> T:
    """Return what a function of the store's returns; all that it writes is taken back."""
    found: list[T] = []

    def tried(tx: Transaction) -> None:
        found.append(plan(tx))
        raise _Rehearsed

    try:
        await store.write(tried)
    except _Rehearsed:
        pass
    return found[0]


class Spanning:
    """The networks of the cluster."""

    def __init__(self, context: Context, cluster: Cluster, data_plane: DataPlane) -> None:
        self._context = context
        self._store = context.store
        self._cluster = cluster
        self._data_plane = data_plane

    async def create(self, plan: Callable[[Transaction], tuple[Network, bool]]) -> tuple[Network, bool]:
        """Make the network that `plan` inserts on every node, or return the one that it found (with False).

        `plan` runs several times, and all that it writes is taken back: what is inserted in the end is what etcd has.

        Raises:
            FailedPrecondition: the VNI is taken.
            Unavailable: etcd does not answer, or this node is not in the cluster.
        """
        for _ in range(_TRIES):
            mark = await self._read(SUBNETS)
            network, made = await rehearse(self._store, plan)
            if not made:
                return network, False
            network = await self._store.read(lambda tx, found=network: _numbered(tx, found))  # type: ignore[misc]
            conditions = [unchanged(SUBNETS, mark.revision if mark else 0), exists(member_key(self._cluster.node.id))]
            conditions += [absent(key) for key in (RECOVERING, *_claims(network))]
            result = await self._cluster.ask(self._cluster.etcd.transact(conditions, _puts(network), [get(RECOVERING)]))
            if not result.succeeded and result.found[0]:
                raise claims.recovers()
            await self._cluster.caught_up(result.revision)
            if result.succeeded:
                return await self._found(network), True
        raise Unavailable(f"network {network.name}: others create networks at the same time", hint="try again")

    async def update(self, network: Network, edit: Callable[[Transaction, Network], Network]) -> None:
        """Change a network on every node; `edit` may run several times, and what it writes is taken back.

        Raises:
            FailedPrecondition: this node could not follow.
            Unavailable: etcd does not answer, or this node is not in the cluster.
        """
        key, driver = f"{NETWORKS}{network.id}", self._context.driver(network.spec.driver)
        uplink = await self._context.apply(read_uplink)

        def valid(tx: Transaction) -> Network:
            changed = edit(tx, tx.networks.require(network.id))
            return shared(driver.validate(replace(changed, mtu=uplink.mtu or DEFAULT_MTU)))

        for _ in range(_TRIES):
            present, mark = await self._read(key), await self._read(SUBNETS)
            if present is None:
                raise NotFound("network", network.name, hint="it was removed meanwhile")
            wanted = await rehearse(self._store, valid)
            conditions = [unchanged(key, present.revision), unchanged(SUBNETS, mark.revision if mark else 0)]
            then = [put(key, encode(wanted))]
            if wanted.pools != network.pools:
                then.append(put(SUBNETS, wanted.id.encode()))
            result = await self._cluster.ask(self._cluster.etcd.transact(conditions, then, [get(key)]))
            await self._cluster.caught_up(result.revision)
            if result.succeeded or result.shows(encode(wanted)):
                now = await self._store.read(lambda tx: tx.networks.require(network.id))
                if (now.spec, now.pools, now.labels) != (wanted.spec, wanted.pools, wanted.labels):
                    raise FailedPrecondition(
                        f"network {network.name} changed in the cluster, but not on this node",
                        hint="see netstored's log",
                    )
                return
        raise Unavailable(f"network {network.name}: others change it at the same time", hint="try again")

    async def _read(self, key: str) -> KeyValue | None:
        """Read a key, and let the picture be as new."""
        await self._cluster.ready()
        found = await self._cluster.ask(self._cluster.etcd.read(key))
        await self._cluster.caught_up(found.revision if found else 0)
        return found

    async def change_policies(self, network: Network, edit: Callable[[Transaction], T]) -> T:
        """Let an edit of a network's policies be every node's; returns what it returned. It may run several times, and
        what it writes is taken back: what is kept in the end is what etcd has.

        Raises:
            Unavailable: etcd does not answer, or this node is not in the cluster.
        """
        key = f"{POLICIES}{network.id}"

        def tried(tx: Transaction) -> tuple[T, tuple[Policy, ...]]:
            result = edit(tx)
            return result, tuple(replace(each, revision=0) for each in tx.policies.all("network_id = ?", network.id))

        for _ in range(_TRIES):
            present = await self._read(key)
            found, policies = await rehearse(self._store, tried)
            conditions = [unchanged(key, present.revision if present else 0), exists(f"{NETWORKS}{network.id}")]
            result = await self._cluster.ask(self._cluster.etcd.transact(conditions, [put(key, encode(policies))]))
            await self._cluster.caught_up(result.revision)
            if result.succeeded:
                return found
        raise Unavailable(f"policies of network {network.name}: others change them at the same time", hint="try again")

    async def _found(self, network: Network) -> Network:
        found = await self._store.read(lambda tx: tx.networks.get(network.id))
        if found is None:
            why = self._cluster.refused.get(network.id, "another node removed it at once")
            raise FailedPrecondition(f"network {network.name} is in the cluster, but not on this node: {why}")
        return found

    async def remove(self, network: Network) -> None:
        """Remove a network from every node; while etcd is away from this one, and from the others later.

        Raises:
            InUse: it has endpoints on other nodes.
        """
        _refuse_used(network, await self._store.read(lambda tx: cache.users(tx, network.id)))
        try:
            await self._cluster.ready()
        except Unavailable:
            remotes = await self._store.read(lambda tx: cache.remotes(tx, network.id))
            await self._store.write(lambda tx: _remove_later(tx, network))
            await self._data_plane.remove(network, remotes)
            return
        revision = await self._remove(network)
        await self._cluster.caught_up(revision)

    async def _remove(self, network: Network) -> int:
        """Remove a network from etcd; returns the revision from which on it is gone."""
        looks = [get(f"{NETWORKS}{network.id}")]
        result = await self._cluster.ask(
            self._cluster.etcd.transact(
                [
                    exists(f"{NETWORKS}{network.id}"),
                    *(empty_below(f"{each}{network.id}/") for each in (ENDPOINTS, SERVICES)),
                ],
                _deletions(network),
                looks,
            )
        )
        if not result.succeeded and result.found[0]:
            items = (await self._cluster.ask(self._cluster.etcd.snapshot(f"{ENDPOINTS}{network.id}/"))).items
            _refuse_used(network, [record.name or record.id[:12] for record in map(decode_endpoint, _values(items))])
            raise InUse(f"network {network.name} has services", hint="remove them first (`netstore service rm`)")
        return result.revision

    async def finish(self) -> list[Network]:
        """Do what could not be done while etcd was away, and put back what it lost (a backup was restored).

        Returns:
            Networks that could not be put back yet: see `put_back`.
        """
        for (body,) in await self._store.read(lambda tx: tx.rows("SELECT body FROM unpublished_removals")):
            network = decode_network(body)
            try:
                await self._remove(network)
            except InUse as error:
                log.warning("a network that was removed here while etcd was away stays", reason=str(error))
                self._cluster.relist()
            await self._store.write(
                lambda tx, of=network.id: tx.execute("DELETE FROM unpublished_removals WHERE network_id = ?", of)  # type: ignore[misc]
            )
        used = "id IN (SELECT network_id FROM global_networks) AND id IN (SELECT network_id FROM endpoints)"
        networks = await self._store.read(lambda tx: tx.networks.all(used))
        return [each for each in networks if not await self._put_back(each)]

    async def put_back(self, networks: list[Network]) -> None:
        """Go on putting networks back, as long as nodes do so."""
        while networks:
            if await self._cluster.ask(self._cluster.etcd.read(RECOVERING)) is None:
                break
            await asyncio.sleep(_PAUSE_SECONDS)
            networks = [each for each in networks if not await self._put_back(each)]
        for network in networks:
            log.error("etcd has lost a network, or what is this node's of it", network=network.name)

    async def _put_back(self, network: Network) -> bool:
        keys = [f"{NETWORKS}{network.id}", *_claims(network)]
        result = await self._cluster.ask(
            self._cluster.etcd.transact([absent(key) for key in keys], _puts(network), [get(key) for key in keys])
        )
        if result.succeeded:
            log.warning("etcd had lost a network: it is put back", network=network.name)
            await self.change_policies(network, lambda tx: None)
        elif not result.found[0]:
            for rival in {items[0].value.decode() for items in result.found[1:] if items}:
                await self._remove_returned(rival)
            return False
        if not network.host_addresses:
            return True
        record = cache.host_record(network, self._cluster.node, network.host_addresses, network.host_mac_address)
        try:
            return not await self._cluster.ask(claims.hold(self._cluster.etcd, record, host=True))
        except claims.Recovering:
            return False

    async def _remove_returned(self, network_id: str) -> None:
        """Remove a network that came back with a backup and has the name or number of one that is used; it is not."""
        found = await self._cluster.ask(self._cluster.etcd.read(f"{NETWORKS}{network_id}"))
        if found:
            unused = [empty_below(f"{each}{network_id}/") for each in (ENDPOINTS, SERVICES)]
            conditions = [unchanged(found.key, found.revision), exists(RECOVERING), *unused]
            deletions = _deletions(decode_network(found.value))
            if (await self._cluster.ask(self._cluster.etcd.transact(conditions, deletions))).succeeded:
                log.warning("a network that a backup brought back gives way to one that is used", network=network_id)

    async def open(self, network: Network) -> Network:
        """Make a network real on this node, with addresses of the node's own on it; the caller has its lock.

        Raises:
            Unavailable: etcd does not answer.
            KernelError: the kernel refused.
        """
        present = await self._store.read(lambda tx: tx.networks.require(network.id))
        driver = self._context.driver(network.spec.driver)
        if driver.is_here(present):
            return present
        opened = await self._take_addresses(driver, present)
        await self._store.write(lambda tx: tx.networks.update(opened))
        try:
            await self._context.apply(driver.apply_network, opened)
        except BaseException:
            await self._store.write(lambda tx: tx.networks.update(present))
            raise
        await self._data_plane.check(opened, repair=True)
        return opened

    async def _take_addresses(self, driver: Driver, network: Network) -> Network:
        await self._cluster.ready()
        node = self._cluster.node
        before = await self._cluster.ask(self._cluster.etcd.read(f"{HOSTS}{network.id}/{node.id}"))
        if before:  # from a run that ended in between
            found = decode_endpoint(before.value)
            await self._store.write(lambda tx: _give_back(tx, network.id, found.addresses))
            await self._cluster.ask(claims.release(self._cluster.etcd, found, host=True))
        uplink = await self._context.apply(read_uplink)
        lost: list[str] = []  # kept meanwhile, so that the next are others
        try:
            for _ in range(_TRIES):
                addresses = await self._store.write(lambda tx: _reserve(tx, network))
                mac = stable_mac(f"{network.id} {addresses[0].address}")
                record = cache.host_record(network, node, addresses, mac)
                lost += record.addresses  # if etcd has it though it fails, the next attempt finds it there
                if not await self._cluster.ask(claims.hold(self._cluster.etcd, record, host=True, new=True)):
                    del lost[-len(record.addresses) :]
                    taken = replace(network, host_addresses=addresses, host_mac_address=mac)
                    return driver.validate(replace(taken, mtu=uplink.mtu or DEFAULT_MTU))
        finally:
            await self._store.write(lambda tx: _give_back(tx, network.id, lost))
        raise Unavailable(f"network {network.name}: others take its addresses at the same time", hint="try again")


def _values(items: list[KeyValue]) -> list[bytes]:
    return [item.value for item in items]


def _reserve(tx: Transaction, network: Network) -> tuple[Address, ...]:
    found = ipam.allocate(tx, network, None, EndpointSpec())
    if not found:
        raise Exhausted(f"network {network.name} has no subnet for the node's own address", hint="give it one")
    return found


def _give_back(tx: Transaction, network_id: str, addresses: Iterable[str]) -> None:
    """Free addresses that were to be the node's own, but for those that endpoints elsewhere have by now."""
    free = (
        "DELETE FROM addresses WHERE network_id = ? AND address = ? AND endpoint_id IS NULL AND (network_id, address)"
        " NOT IN (SELECT network_id, address FROM remote_addresses)"
    )
    for address in addresses:
        tx.execute(free, network_id, ip_address(address).packed)


def _numbered(tx: Transaction, network: Network) -> Network:
    """Return a network with a number of its own.

    Raises:
        FailedPrecondition: the one that it was given is taken.
    """
    used = {vni for (vni,) in tx.rows("SELECT vni FROM global_networks ORDER BY vni")}
    if network.vni in used:
        row = tx.row("SELECT name FROM networks JOIN global_networks ON network_id = id WHERE vni = ?", network.vni)
        holder = row[0] if row else "another"
        raise FailedPrecondition(
            f"VNI {network.vni} is taken by network {holder}", hint="choose another, or none to take a free one",
            reason="VNI_TAKEN", network=holder,
        )  # fmt: skip
    if network.vni:
        return network
    free = next((vni for vni in range(_FIRST_VNI, _LAST_VNI) if vni not in used), 0)
    if not free:
        raise Exhausted("no VNI is free", hint="remove networks", reason="VNIS_EXHAUSTED")
    return replace(network, vni=free)


def _claims(network: Network) -> list[str]:
    return [f"{CLAIMS}names/networks/{network.name}", f"{CLAIMS}vnis/{network.vni}"]


def _puts(network: Network) -> list[Op]:
    mine = network.id.encode()
    return [put(SUBNETS, mine), *(put(key, mine) for key in _claims(network)),
            put(f"{NETWORKS}{network.id}", encode(shared(network)))]  # fmt: skip


def _deletions(network: Network) -> list[Op]:
    below = (f"{HOSTS}{network.id}/", f"{CLAIMS}addresses/{network.id}/", f"{CLAIMS}macs/{network.id}/")
    return [put(SUBNETS, network.id.encode()), *(delete(key) for key in _claims(network)), *map(delete_below, below),
            delete(f"{POLICIES}{network.id}"), delete(f"{NETWORKS}{network.id}")]  # fmt: skip


def _remove_later(tx: Transaction, network: Network) -> None:
    tx.execute(
        "INSERT OR REPLACE INTO unpublished_removals VALUES (?, ?)", network.id, encode(shared(network)).decode()
    )
    cache.forget_network(tx, network)


def _refuse_used(network: Network, names: list[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:10])
        raise InUse(
            f"network {network.name} has {len(names)} endpoint(s) on other nodes: {shown}",
            hint="disconnect them, or remove their containers, first; `netstore node rm` a node that is no more",
            endpoints=shown,
        )  # fmt: skip
