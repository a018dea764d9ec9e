"""Leases: addresses of endpoints that the network's own DHCP server lends (`--ipam-driver dhcp`).

A lease is part of its endpoint's row, so that the next netstored renews it where this one ended. One task an endpoint
waits until something is due. A lease that is lost takes its address out of the sandbox, and another is asked for.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from itertools import dropwhile

import structlog

from netstore import clock
from netstore.drivers.interior import drop_addresses
from netstore.errors import NetstoreError
from netstore.kernel import dhcp
from netstore.kernel.sandboxes import ways_out
from netstore.model import Address, Endpoint, Kind, Lease, Network, Sandbox
from netstore.networks import ipam, planning, way_out
from netstore.networks.context import Context
from netstore.networks.planning import Plan
from netstore.networks.sandboxes import OpenSandbox, Sandboxes
from netstore.store import Transaction

__all__ = ["Leases", "is_leased"]

log = structlog.get_logger(__name__)

_LONGEST_PAUSE_SECONDS = 300.0
"""Between attempts to get a lease in place of one that was lost."""
_SHORTEST_PAUSE_SECONDS = 60.0
"""Between attempts to renew, as long as the lease is not itself short (RFC 2131, section 4.4.5)."""


def is_leased(network: Network) -> bool:
    """Say whether addresses of a network are lent by a server of its own."""
    return network.spec.ipam_driver == "dhcp"


class Leases:
    """Gets, renews and releases the leases of a node's endpoints."""

    def __init__(self, context: Context, sandboxes: Sandboxes) -> None:
        self._context = context
        self._store = context.store
        self._sandboxes = sandboxes
        self._keepers: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Go on with the leases that the store knows, and ask for those that it misses."""
        there = "json_extract(networks.body, '$.spec.ipam_driver') = 'dhcp'"
        condition = f"network_id IN (SELECT id FROM networks WHERE {there})"
        for endpoint in await self._store.read(lambda tx: tx.endpoints.all(condition)):
            if endpoint.attached:
                self._keep(endpoint.id)

    async def close(self) -> None:
        """Stop renewing; the leases stay."""
        keepers = list(self._keepers.values())
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)

    async def bind(self, plan: Plan) -> Plan:
        """Get a lease for an endpoint whose interface was just made, and put its address there.

        Raises:
            Unavailable, FailedPrecondition: no server answers, or not as it should; the caller undoes the attachment.
        """
        lease = await self._acquire(plan.endpoint, plan.network, plan.opened.sandbox)
        assert plan.opened.namespace is not None
        try:
            ways = await self._context.apply(ways_out, plan.opened.namespace)
            endpoint, demoted = await self._store.write(lambda tx: _lend(tx, plan.endpoint.id, lease, ways))
        except BaseException:
            await self._release(plan.endpoint, plan.network, plan.opened.sandbox, lease)
            raise
        driver = self._context.driver(plan.network.spec.driver)
        await self._context.apply(driver.apply_endpoint, plan.network, endpoint, plan.opened.namespace)
        await self._demote(demoted)
        self._keep(endpoint.id)
        return replace(plan, endpoint=endpoint)

    async def give_back(self, endpoint_id: str, network: Network, sandbox: Sandbox) -> None:
        """Release the lease of an endpoint that is about to be detached. That a server is away is no failure."""
        if keeper := self._keepers.pop(endpoint_id, None):
            keeper.cancel()
        endpoint = await self._store.read(lambda tx: tx.endpoints.get(endpoint_id))
        if endpoint and endpoint.lease and _age(endpoint.lease) < endpoint.lease.lasts:
            await self._release(endpoint, network, sandbox, endpoint.lease)

    def _keep(self, endpoint_id: str) -> None:
        keeper = asyncio.create_task(self._renew_for_ever(endpoint_id), name=f"lease of {endpoint_id[:12]}")
        self._keepers[endpoint_id] = keeper

    async def _renew_for_ever(self, endpoint_id: str) -> None:
        failures = 0
        while True:
            found = await self._store.read(lambda tx: planning.joined_or_none(tx, endpoint_id))
            if found is None or not found[0].attached:
                return
            endpoint, network, sandbox = found
            pause = _pause(endpoint.lease, failures)
            if pause == math.inf:
                return
            await asyncio.sleep(pause)
            try:
                kept = await self._follow(endpoint, network, sandbox)
            except (NetstoreError, OSError) as error:  # its namespace or interface is gone: others see to that
                log.warning("a lease was not renewed", endpoint=endpoint_id, network=network.name, error=str(error))
                kept = False
            except Exception:  # what we did not think of must not end the renewals
                log.exception("a lease was not renewed", endpoint=endpoint_id)
                kept = False
            failures = 0 if kept else failures + 1
            if failures == 1 and endpoint.lease:
                try:
                    await self._store.write(partial(_tell, endpoint=endpoint, action="lease-unanswered"))
                except NetstoreError as error:  # a full disk, say, which must not end the renewals
                    log.warning("an event is not noted", endpoint=endpoint_id, error=str(error))

    async def _follow(self, endpoint: Endpoint, network: Network, sandbox: Sandbox) -> bool:
        """Do what is due for an endpoint; False when no server answered."""
        held = endpoint.lease
        if held is None:
            lease = await self._acquire(endpoint, network, sandbox)
            await self._change(endpoint, network, sandbox, lease)
            return True
        if _age(held) >= held.lasts:
            await self._change(endpoint, network, sandbox, None)
            return True
        rebind = _age(held) >= held.rebind_seconds
        try:
            async with self._sandboxes.reopen(sandbox) as opened:
                renewed = await dhcp.renew(await self._interface(endpoint, network, opened), held, rebind=rebind)
        except dhcp.Refused as error:
            log.warning("a lease was refused", endpoint=endpoint.id, network=network.name, error=str(error))
            await self._change(endpoint, network, sandbox, None)
            return True
        if renewed:
            await self._change(endpoint, network, sandbox, renewed)
        return renewed is not None

    async def _change(self, before: Endpoint, network: Network, sandbox: Sandbox, lease: Lease | None) -> None:
        """Make a lease, or none, what an endpoint has, in the store and inside, where it was not detached meanwhile."""
        driver = self._context.driver(network.spec.driver)
        async with self._context.locks.hold(f"sandbox {sandbox.inode}"), self._sandboxes.reopen(sandbox) as opened:
            assert opened.namespace is not None
            if lease and _same(before.lease, lease):
                await self._store.write(lambda tx: _prolong(tx, before.id, lease))
                return
            ways = await self._context.apply(ways_out, opened.namespace)
            demoted = heir = None
            if lease:
                endpoint, demoted = await self._store.write(lambda tx: _lend(tx, before.id, lease, ways))
            else:
                endpoint, heir = await self._store.write(lambda tx: _lose(tx, before.id))
            await self._context.apply(drop_addresses, before, opened.namespace)
            await self._context.apply(driver.apply_endpoint, network, endpoint, opened.namespace)
            await self._demote(demoted)
            if heir and heir[0].attached:
                other, its = heir
                await self._context.apply(
                    self._context.driver(its.spec.driver).default_route, its, other, opened.namespace
                )

    async def _demote(self, demoted: tuple[Network, Endpoint] | None) -> None:
        if demoted:
            driver = self._context.driver(demoted[0].spec.driver)
            await self._context.apply(driver.lose_default_route, *demoted)

    async def _acquire(self, endpoint: Endpoint, network: Network, sandbox: Sandbox) -> Lease:
        async with self._sandboxes.reopen(sandbox) as opened:
            interface = await self._interface(endpoint, network, opened)
            try:
                return await dhcp.acquire(interface, wanted=endpoint.spec.ipv4_address)
            except NetstoreError as error:
                error.what = f"network {network.name} (parent {network.interface}): {error.what}"
                raise

    async def _release(self, endpoint: Endpoint, network: Network, sandbox: Sandbox, lease: Lease) -> None:
        try:
            async with self._sandboxes.reopen(sandbox) as opened:
                await dhcp.release(await self._interface(endpoint, network, opened), lease)
        except (NetstoreError, OSError) as error:  # it ends by itself
            log.info("a lease was not released", endpoint=endpoint.id, address=lease.address, reason=str(error))

    async def _interface(self, endpoint: Endpoint, network: Network, opened: OpenSandbox) -> dhcp.Interface:
        assert opened.namespace is not None
        hostname = await self._store.read(lambda tx: _hostname(tx, endpoint, opened.sandbox))
        identifier = endpoint.id.encode() if self._context.driver(network.spec.driver).shares_mac else b""
        return dhcp.Interface(opened.namespace, endpoint.interface_name, hostname, identifier)


def _hostname(tx: Transaction, endpoint: Endpoint, sandbox: Sandbox) -> str:
    container = tx.containers.get(sandbox.container_id) if sandbox.container_id else None
    return (container.spec.hostname if container else "") or endpoint.name or sandbox.container_id[:12]


def _age(lease: Lease) -> float:
    return clock.since(lease.obtained, lease.boot, lease.uptime)


def _pause(lease: Lease | None, failures: int) -> float:
    """Return how long to wait before the next attempt, or the end of a lease."""
    if lease is None:
        return random.uniform(0.5, 1) * min(2.0**failures, _LONGEST_PAUSE_SECONDS) if failures else 0.0
    age, end = _age(lease), lease.lasts
    if end == math.inf:
        return math.inf
    if not failures or age >= end:
        return max(0.0, min(lease.renew_seconds, end) - age)
    until = lease.rebind_seconds if age < lease.rebind_seconds else end
    shortest = min(_SHORTEST_PAUSE_SECONDS, lease.seconds / 8)
    return min(max((until - age) / 2, shortest), end - age)


def _same(held: Lease | None, lease: Lease) -> bool:
    return held is not None and (held.address, held.prefix, held.router) == (lease.address, lease.prefix, lease.router)


def _lend(
    tx: Transaction, endpoint_id: str, lease: Lease, ways: Collection[str]
) -> tuple[Endpoint, tuple[Network, Endpoint] | None]:
    """Give an endpoint the address of a lease; `ways` are interfaces through which its namespace has default routes.
    Returns also who had the default route that it has now.

    Raises:
        AddressTaken: the server lent the same to another endpoint.
    """
    endpoint, network, _ = planning.joined(tx, planning.without_lease(tx, tx.endpoints.require(endpoint_id)))
    ipam.hold(tx, network, ip_address(lease.address), endpoint.id, "lease")
    address = Address(address=lease.address, prefix=lease.prefix, gateway=lease.router)
    theirs = tx.endpoints.all("sandbox_id = ?", endpoint.sandbox_id)  # oldest first
    others = [each for each in theirs if each.id != endpoint.id]
    taken = not {endpoint.interface_name, *(each.interface_name for each in others)}.issuperset(ways)
    kept = endpoint.default_route and not (taken and endpoint.interface_name not in ways)  # it went with a lease
    endpoint = replace(endpoint, addresses=(address,), lease=lease, default_route=kept)
    if not kept:
        younger = {each.id for each in dropwhile(lambda each: each.id != endpoint.id, theirs)}
        endpoint = way_out.take(tx, network, endpoint, others, taken=taken, younger=younger)
    where = {"network": network.name, "address": lease.address, "server": lease.server}
    endpoint = replace(endpoint, revision=tx.event(Kind.ENDPOINT, "lease", endpoint.id, endpoint.name, **where))
    tx.endpoints.update(endpoint)
    return endpoint, way_out.demoted(tx, endpoint, others)


def _prolong(tx: Transaction, endpoint_id: str, lease: Lease) -> None:
    tx.endpoints.update(replace(tx.endpoints.require(endpoint_id), lease=lease))


def _lose(tx: Transaction, endpoint_id: str) -> tuple[Endpoint, tuple[Endpoint, Network] | None]:
    """Take the address of a lease that ended from an endpoint; returns also who has the default route instead."""
    endpoint = tx.endpoints.require(endpoint_id)
    _tell(tx, endpoint, "lease-lost")
    endpoint, heir = planning.without_lease(tx, endpoint), None
    if endpoint.default_route:
        others = [each for each in tx.endpoints.all("sandbox_id = ?", endpoint.sandbox_id) if each.id != endpoint.id]
        heir = way_out.pass_on(tx, others)
        endpoint = replace(endpoint, default_route=heir is None)
    tx.endpoints.update(endpoint)
    return endpoint, heir


def _tell(tx: Transaction, endpoint: Endpoint, action: str) -> None:
    address = endpoint.lease.address if endpoint.lease else ""
    tx.event(Kind.ENDPOINT, action, endpoint.id, endpoint.name, address=address)
