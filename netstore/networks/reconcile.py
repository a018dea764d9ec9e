"""Makes the kernel match the store: after a crash, when something drifted, and on demand."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from netstore.drivers.base import Driver, Observed
from netstore.errors import NetstoreError
from netstore.kernel.conntrack import forget_strays
from netstore.kernel.firewall import Element, Firewall, relay_elements
from netstore.kernel.foreign import DOCKER_USER, Foreign
from netstore.kernel.links import host_socket
from netstore.kernel.namespaces import open_pinned, remove
from netstore.kernel.sandboxes import interface_names, is_redirected, lacking
from netstore.model import Endpoint, Finding, Kind, Network, RemoteEndpoint, Sandbox, Scope
from netstore.networks.cluster import cache
from netstore.networks.cluster.span import Span
from netstore.networks.context import Context
from netstore.networks.endpoints import Endpoints
from netstore.networks.sandboxes import Sandboxes
from netstore.networks.services import Services
from netstore.networks.uplink import overlaps, read_uplink
from netstore.store import Transaction

__all__ = ["Reconciler"]

_GRACE_SECONDS = 10.0
"""A namespace without an owner is garbage after this; at the start of netstored at once, because nobody makes one."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Desired:
    networks: list[Network]
    endpoints: list[Endpoint]
    sandboxes: list[Sandbox]

    def attached(self, network: Network) -> list[Endpoint]:
        return [each for each in self.endpoints if each.network_id == network.id and each.attached]

    def inside(self, sandbox: Sandbox) -> list[Endpoint]:
        return [each for each in self.endpoints if each.sandbox_id == sandbox.id]


class Reconciler:
    """Compares, and repairs when asked to. Each difference is a `Finding`."""

    def __init__(
        self, context: Context, firewall: Firewall, endpoints: Endpoints, sandboxes: Sandboxes, services: Services,
        span: Span | None, *, docker_user: bool,
    ) -> None:  # fmt: skip
        self._context = context
        self._span = span
        self._neighbours = Foreign()
        self._docker_user = docker_user
        self._firewall = firewall
        self._endpoints = endpoints
        self._sandboxes = sandboxes
        self._services = services
        self._lock = asyncio.Lock()
        self._grace = 0.0

    async def check(self, *, repair: bool) -> list[Finding]:
        """Compare kernel and store, and repair what differs when `repair` is set."""
        async with self._lock:
            desired = await self._context.store.read(
                lambda tx: _Desired(tx.networks.all(), tx.endpoints.all(), tx.sandboxes.all())
            )
            findings: list[Finding] = []
            for step in (
                self._namespaces, self._networks, self._elements, self._names, self._routes, self._foreign,
                self._garbage,
            ):  # fmt: skip
                findings += await step(desired, repair=repair)
            if any(finding.repaired for finding in findings):
                await self._context.store.write(lambda tx: _record(tx, findings))
            for finding in findings:
                log.warning("kernel differs from store", name=finding.name, detail=finding.detail,
                            repaired=finding.repaired, error=finding.error)  # fmt: skip
            return findings

    async def examine(self, network: Network) -> list[Finding]:
        """Compare what the kernel holds of one network with the store; nothing is repaired."""
        async with self._lock:
            desired = await self._context.store.read(
                lambda tx: _Desired([network], tx.endpoints.all("network_id = ?", network.id), tx.sandboxes.all())
            )
            driver = self._context.driver(network.spec.driver)
            findings = await self._networks(desired, repair=False)
            if driver.is_here(network):
                remotes = await self._context.store.read(lambda tx: cache.remotes(tx, network.id))
                wanted = driver.node_elements() | self._of_network(network, desired, remotes)
                present = await self._context.apply(self._firewall.elements) or set()
                if wanted - present:
                    findings.append(_listed(wanted - present, "is missing"))
            return findings

    async def stale(self) -> bool:
        """Say whether a sandbox's namespace is gone."""
        sandboxes = await self._context.store.read(lambda tx: tx.sandboxes.all())
        return bool(await self._context.apply(_gone, sandboxes))

    async def _namespaces(self, desired: _Desired, *, repair: bool) -> list[Finding]:
        """Find sandboxes whose namespace is gone: ours are made anew, an engine's took its endpoints with it."""
        findings = []
        for sandbox in await self._context.apply(_gone, desired.sandboxes):
            finding = Finding(
                kind=Kind.SANDBOX, resource_id=sandbox.id, name=sandbox.path, detail="its network namespace is gone"
            )
            findings.append(_repaired(finding, partial(self._replace, sandbox, desired), repair=repair))
        return await asyncio.gather(*findings)  # a machine's worth at once, when an engine crashed

    async def _replace(self, sandbox: Sandbox, desired: _Desired) -> None:
        if sandbox.container_id:
            restored = await self._sandboxes.restore(sandbox)
            desired.sandboxes[desired.sandboxes.index(sandbox)] = restored
            return
        theirs = desired.inside(sandbox)
        desired.sandboxes.remove(sandbox)
        for endpoint in theirs:
            desired.endpoints.remove(endpoint)
            await self._endpoints.detach(endpoint.id)

    async def _networks(self, desired: _Desired, *, repair: bool) -> list[Finding]:
        findings = []
        sandboxes = {sandbox.id: sandbox for sandbox in desired.sandboxes}
        for network in desired.networks:
            driver = self._context.driver(network.spec.driver)
            if not driver.is_here(network):
                continue
            observed = await self._context.apply(driver.observe, network)
            if not observed.interface:
                finding = Finding(kind=Kind.NETWORK, resource_id=network.id, name=network.name,
                                  detail=f"interface {network.interface} is missing")  # fmt: skip
                findings.append(await _repaired(finding, partial(self._apply_network, network), repair=repair))
                observed = await self._context.apply(driver.observe, network)
            findings += await self._virtual(network, observed, repair=repair)
            if self._span and driver.scope is Scope.GLOBAL:
                async with self._context.locks.hold(network.id):
                    findings += await self._span.data_plane.check(network, repair=repair)
            held = {each.address for endpoint in desired.attached(network) for each in endpoint.every_address}
            if unknown := sorted(observed.neighbours - held):
                finding = Finding(kind=Kind.NETWORK, resource_id=network.id, name=network.name,
                                  detail=f"neighbours that no endpoint is: {', '.join(unknown[:5])}")  # fmt: skip
                work = partial(self._context.apply, driver.forget_neighbours, network, unknown)
                findings.append(await _repaired(finding, work, repair=repair))
            for endpoint in desired.attached(network):
                sandbox = sandboxes[endpoint.sandbox_id]
                if await self._is_there(driver, observed, network, endpoint, sandbox):
                    findings += await self._unfinished(network, endpoint, sandbox, repair=repair)
                    continue
                missing = endpoint.interface_name if driver.ends_inside else endpoint.host_interface
                finding = Finding(kind=Kind.ENDPOINT, resource_id=endpoint.id, name=endpoint.name or endpoint.id[:12],
                                  detail=f"interface {missing} is missing")  # fmt: skip
                work = partial(self._apply_endpoint, network, endpoint, sandbox)
                findings.append(await _repaired(finding, work, repair=repair))
        return findings

    async def _virtual(self, network: Network, observed: Observed, *, repair: bool) -> list[Finding]:
        """Find virtual addresses of services that the network's interface lacks, or has for nobody."""
        differing = observed.single ^ self._context.driver(network.spec.driver).single(network)
        if not differing or not observed.interface:
            return []
        finding = Finding(kind=Kind.NETWORK, resource_id=network.id, name=network.name,
                          detail=f"virtual addresses differ: {', '.join(sorted(differing)[:5])}")  # fmt: skip
        return [await _repaired(finding, partial(self._services.repair, network), repair=repair)]

    async def _is_there(
        self, driver: Driver, observed: Observed, network: Network, endpoint: Endpoint, sandbox: Sandbox
    ) -> bool:
        if not driver.has_interfaces or endpoint.host_interface in observed.endpoints:
            return True
        if not driver.ends_inside:
            return False
        try:
            async with self._sandboxes.reopen(sandbox) as opened:
                namespace = opened.namespace
                return namespace is None or await self._context.apply(driver.is_inside, network, endpoint, namespace)
        except NetstoreError:  # its namespace is gone: a finding of its own
            return True

    async def _unfinished(
        self, network: Network, endpoint: Endpoint, sandbox: Sandbox, *, repair: bool
    ) -> list[Finding]:
        """At the start, find an endpoint whose pair was made when netstored was killed, and nothing inside. Later what
        is inside is the container's own to change.
        """
        if self._grace or not sandbox.path or not (gone := await self._lacking(endpoint, sandbox)):
            return []
        finding = Finding(kind=Kind.ENDPOINT, resource_id=endpoint.id, name=endpoint.name or endpoint.id[:12],
                          detail=f"address {', '.join(gone)} is missing inside")  # fmt: skip
        return [await _repaired(finding, partial(self._finish, network, endpoint, sandbox), repair=repair)]

    async def _finish(self, network: Network, endpoint: Endpoint, sandbox: Sandbox) -> None:
        driver = self._context.driver(network.spec.driver)
        async with self._sandboxes.reopen(sandbox) as opened:
            await self._context.apply(driver.apply_endpoint, network, endpoint, opened.namespace)

    async def _lacking(self, endpoint: Endpoint, sandbox: Sandbox) -> list[str]:
        """Return those of an endpoint's addresses that its namespace does not have."""
        addresses = [each.address for each in endpoint.addresses]
        try:
            async with self._sandboxes.reopen(sandbox) as opened:
                return await self._context.apply(lacking, opened.namespace, addresses) if opened.namespace else []
        except NetstoreError:  # its namespace is gone: a finding of its own
            return []

    async def missing(self, endpoint: Endpoint, network: Network, sandbox: Sandbox) -> str:
        """Say what the kernel lacks of an attached endpoint in a namespace, "" for nothing.

        Raises:
            KernelError: its namespace is gone.
        """
        driver = self._context.driver(network.spec.driver)
        observed = await self._context.apply(driver.observe, network)
        if not observed.interface:
            return f"interface {network.interface} of network {network.name} is missing"
        if not await self._is_there(driver, observed, network, endpoint, sandbox):
            return f"interface {endpoint.host_interface} is missing"
        async with self._sandboxes.reopen(sandbox) as opened:
            assert opened.namespace is not None
            there = await self._context.apply(interface_names, opened.namespace)
        if endpoint.interface_name not in there:
            return f"interface {endpoint.interface_name} is missing in {sandbox.path}"
        if gone := await self._lacking(endpoint, sandbox):
            return f"address {', '.join(gone)} is missing in {sandbox.path}"
        return ""

    async def _apply_network(self, network: Network) -> None:
        async with self._context.locks.hold(network.id):
            driver = self._context.driver(network.spec.driver)
            await self._context.apply(driver.apply_network, network)

    async def _apply_endpoint(self, network: Network, endpoint: Endpoint, sandbox: Sandbox) -> None:
        """Make an endpoint anew, if it is still missing once whoever attaches or detaches it is done."""
        driver = self._context.driver(network.spec.driver)
        async with self._context.locks.hold(sandbox.key), self._sandboxes.reopen(sandbox) as opened:
            now = await self._context.store.read(lambda tx: tx.endpoints.get(endpoint.id))
            observed = await self._context.apply(driver.observe, network)
            if now is None or not now.attached or endpoint.host_interface in observed.endpoints:
                return
            await self._context.remove(driver.remove_endpoint, network, replace(now, ports=()), opened.namespace)
            await self._context.apply(driver.apply_endpoint, network, now, opened.namespace)

    async def _elements(self, desired: _Desired, *, repair: bool) -> list[Finding]:
        findings = []
        if await self._context.apply(self._firewall.elements) is None:
            finding = Finding(name="nftables", detail="the firewall's skeleton is missing or not whole")
            findings.append(
                await _repaired(finding, partial(self._context.apply, self._firewall.ensure), repair=repair)
            )
        extra, missing = await self._differences()
        if extra or missing:  # endpoints that come or go at this moment differ once, not twice
            again = await self._differences()
            extra, missing = extra & again[0], missing & again[1]
        for elements, detail, change in (
            (extra, "is there and should not be", self._firewall.remove),
            (missing, "is missing", self._firewall.add),
        ):
            if elements:
                work = partial(self._context.apply, change, sorted(elements))
                findings.append(await _repaired(_listed(elements, detail), work, repair=repair))
        strays = await self._context.apply(self._firewall.sweep, dry_run=not repair)
        if strays:
            finding = Finding(name="nftables", detail=f"nothing uses {', '.join(strays[:5])}", repaired=repair)
            findings.append(finding)
        if repair and missing:  # flows that began meanwhile passed the maps by
            ports = [port for endpoint in desired.endpoints for port in endpoint.ports]
            await self._context.apply(forget_strays, ports)
        return findings

    async def _differences(self) -> tuple[set[Element], set[Element]]:
        """Return elements that are there and should not be, and those that are missing.

        What there is is read first: what the store gets afterwards is at most missing, never taken away.
        """
        present = await self._context.apply(self._firewall.elements) or set()
        networks, endpoints, remotes = await self._context.store.read(
            lambda tx: (tx.networks.all(), tx.endpoints.all(), _remotes(tx))
        )
        desired, wanted = _Desired(networks, endpoints, []), set(relay_elements(self._context.resolver.relay_port()))
        for driver in self._context.drivers.values():
            wanted |= driver.node_elements()
        for network in networks:
            driver = self._context.driver(network.spec.driver)
            if driver.is_here(network):
                wanted |= self._of_network(network, desired, remotes.get(network.id, ()))
        wanted |= await self._services.elements(networks)
        return present - wanted, wanted - present

    def _of_network(self, network: Network, desired: _Desired, remotes: Sequence[RemoteEndpoint]) -> set[Element]:
        driver, policing = self._context.driver(network.spec.driver), self._firewall.policing
        found = driver.elements(network, desired.attached(network))
        found = found.union(*(policing.remote_elements(network, each) for each in remotes))
        return found.union(*(driver.remote_elements(network, each) for each in remotes))

    async def _names(self, desired: _Desired, *, repair: bool) -> list[Finding]:
        """Find sandboxes whose names nobody answers, or lead nowhere: who is inside may have flushed its firewall."""
        named = {network.id for network in desired.networks if not network.predefined}
        served = {e.sandbox_id for e in desired.endpoints if e.attached and e.network_id in named}
        wanted = [each for each in desired.sandboxes if each.id in served and each.resolver]
        held = self._context.resolver.held()
        led = await self._context.apply(
            lambda: {each.id for each in wanted if each.id in held and is_redirected(each.path, each.inode)}
        )
        suspects = [each for each in wanted if each.id not in led]
        return [found for each in suspects for found in await self._lost(each, named, repair=repair)]

    async def _lost(self, sandbox: Sandbox, named: set[str], *, repair: bool) -> list[Finding]:
        """Look again at a sandbox whose names seem lost, while nobody attaches it or detaches it."""
        async with self._context.locks.hold(sandbox.key):
            held = self._context.resolver.holds(sandbox.id)
            if held and await self._context.apply(is_redirected, sandbox.path, sandbox.inode):
                return []
            endpoints = await self._context.store.read(lambda tx: tx.endpoints.all("sandbox_id = ?", sandbox.id))
            if not any(each.attached and each.network_id in named for each in endpoints):
                return []
            detail = "names lead nowhere inside" if held else "nobody answers its names"
            finding = Finding(kind=Kind.SANDBOX, resource_id=sandbox.id, name=sandbox.path, detail=detail)
            return [await _repaired(finding, partial(self._serve, sandbox), repair=repair)]

    async def _serve(self, sandbox: Sandbox) -> None:
        async with self._sandboxes.reopen(sandbox) as opened:
            await self._context.resolver.remove(sandbox.id)
            await self._sandboxes.serve_names(opened)

    async def _routes(self, desired: _Desired, *, repair: bool) -> list[Finding]:
        """Find routes of the host that came after a network and overlap it: which goes is not ours to say."""
        uplink = await self._context.apply(read_uplink)
        error = "remove the route or the network: netstored cannot know which one is meant" if repair else ""
        return [
            Finding(kind=Kind.NETWORK, resource_id=network.id, name=network.name, detail=text, error=error)
            for network, text in overlaps(desired.networks, uplink.routes)
        ]

    async def _foreign(self, desired: _Desired, *, repair: bool) -> list[Finding]:
        """Find chains of others that drop what our networks forward; only Docker's place for that is ever changed."""
        interfaces = {network.interface for network in desired.networks} - {""}
        ipv6 = any(":" in pool.subnet for network in desired.networks for pool in network.pools)
        findings = []
        for each in await self._context.apply(self._neighbours.blocked, interfaces, ipv6=ipv6):
            detail = "it drops by default, and no rule of it lets our networks through"
            if self._docker_user and each.place.endswith(DOCKER_USER):
                finding = Finding(name=f"chain {each.chain}", detail=f"{detail}: accepted in {DOCKER_USER}")
                work = partial(self._context.apply, self._neighbours.admit, each)
                findings.append(await _repaired(finding, work, repair=repair))
            else:
                command = f"nft '{'; '.join(each.commands)}'"
                error = "it is not ours to change, unless [firewall] docker-user is set for Docker's" if repair else ""
                detail = f"{detail}; if they are meant to pass: {command}"
                findings.append(Finding(name=f"chain {each.chain}", detail=detail, error=error))
        return findings

    async def _garbage(self, desired: _Desired, *, repair: bool) -> list[Finding]:
        """Find what carries our mark and has no row. What there is is read first: rows come before what they name."""
        links = await self._context.apply(_marked_links)
        namespaces = await self._context.apply(_settled, self._context.netns_dir, self._grace)
        held = self._context.resolver.held()
        known, pinned = await self._context.store.read(_owners)
        findings = []
        for name, owner in links:
            if owner not in known:
                finding = Finding(name=name, detail="an interface that nothing owns")
                delete = next(iter(self._context.drivers.values())).host.deletions.delete
                work = partial(self._context.remove, delete, name)
                findings.append(await _repaired(finding, work, repair=repair))
        for path in namespaces:
            if str(path) not in pinned:
                finding = Finding(name=str(path), detail="a namespace that nothing owns")
                work = partial(self._context.remove, remove, path)
                findings.append(await _repaired(finding, work, repair=repair))
        for orphan in held - known:
            await self._context.resolver.remove(orphan)
        self._grace = _GRACE_SECONDS
        return findings


def _remotes(tx: Transaction) -> dict[str, list[RemoteEndpoint]]:
    """Return the endpoints of other nodes, by network."""
    return {each: cache.remotes(tx, each) for (each,) in tx.rows("SELECT network_id FROM global_networks")}


def _listed(elements: set[Element], detail: str) -> Finding:
    shown = ", ".join(f"{name} {{ {text} }}" for name, text in sorted(elements)[:5])
    return Finding(name="nftables", detail=f"{len(elements)} element(s): {shown} {detail}")


def _owners(tx: Transaction) -> tuple[set[str], set[str]]:
    """Return the ids of all that may own something in the kernel, and where namespaces are pinned."""
    sandboxes = tx.sandboxes.all()
    rows = tx.rows("SELECT id FROM networks UNION ALL SELECT id FROM endpoints")
    return {row[0] for row in rows} | {each.id for each in sandboxes}, {each.path for each in sandboxes}


def _settled(place: Path, grace: float) -> list[Path]:
    """Return where namespaces are pinned, without those so young that their container's row may still come."""
    found = []
    for path in sorted(place.glob("*")):
        with suppress(FileNotFoundError):
            if not 0 <= time.time() - path.stat().st_mtime < grace:  # below 0 the clock went back
                found.append(path)
    return found


def _record(tx: Transaction, findings: list[Finding]) -> None:
    """Make an event of every repair, so that whoever watches learns that something meddled."""
    for finding in findings:
        if finding.repaired:
            kind = finding.kind or Kind.NODE
            tx.event(kind, "repair", finding.resource_id, finding.name, detail=finding.detail[:500])


async def _repaired(finding: Finding, work: Callable[[], Coroutine[Any, Any, None]], *, repair: bool) -> Finding:
    if not repair:
        return finding
    try:
        await work()
    except NetstoreError as error:
        return replace(finding, error=str(error))
    return replace(finding, repaired=True)


def _gone(sandboxes: Sequence[Sandbox]) -> list[Sandbox]:
    """Return sandboxes whose path does not lead to their namespace any more.

    The path is the engine's lease: what other processes hold of the namespace, netstore-resolver's sockets among them,
    does not count.
    """
    found = []
    for sandbox in sandboxes:
        namespace = open_pinned(sandbox.path, sandbox.inode) if sandbox.path else None
        if namespace is not None:
            os.close(namespace)
        elif sandbox.path:
            found.append(sandbox)
    return found


def _marked_links() -> list[tuple[str, str]]:
    """Return interfaces that carry our mark, an alias naming their owner, and the owner's id."""
    found = []
    for link in host_socket().links():
        if link.alias.startswith(("netstore network ", "netstore endpoint ")):
            found.append((link.name, link.alias.rsplit(" ", 1)[1]))
    return found
