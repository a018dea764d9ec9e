"""Endpoints: attach, detach, publish; and the reservations of containers that do not run.

Attaching is one durable commit (what should be), then one call into the kernel's executor (what is). If the kernel
refuses, the commit is undone and nothing is left.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

import structlog

from netstore.drivers.base import Driver
from netstore.errors import AddressTaken, AlreadyExists, Conflict, FailedPrecondition, NetstoreError, NotFound
from netstore.kernel.sandboxes import open_resolver
from netstore.model import (
    Endpoint,
    EndpointSpec,
    Kind,
    Network,
    PortMapping,
    Sandbox,
    SandboxRef,
    new_id,
    stable_mac,
)
from netstore.networks import ipam, ports
from netstore.networks.context import Context
from netstore.networks.networks import changes
from netstore.networks.sandboxes import OpenSandbox, Sandboxes, container_sandbox, known_sandbox
from netstore.store import Transaction

__all__ = ["AttachRequest", "Endpoints", "reserve"]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachRequest:
    """One attachment that a caller asks for."""

    network: str
    sandbox: SandboxRef
    spec: EndpointSpec
    labels: Mapping[str, str] = field(default_factory=dict)


class Endpoints:
    """The endpoints of a node."""

    def __init__(self, context: Context, sandboxes: Sandboxes) -> None:
        self._context = context
        self._store = context.store
        self._sandboxes = sandboxes

    async def attach(
        self, requests: Sequence[AttachRequest], *, request_id: str = ""
    ) -> list[tuple[Endpoint, Network, Sandbox]]:
        """Attach sandboxes to networks, all or none.

        Raises:
            NotFound, InvalidArgument, AlreadyExists, AddressTaken, Exhausted, KernelError: see the contract.
        """
        async with AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(self._sandboxes.open(each.sandbox)) for each in requests]
            for inode in sorted({each.sandbox.inode for each in opened}):
                await stack.enter_async_context(self._context.locks.hold(f"sandbox {inode}"))
            pairs = list(zip(requests, opened, strict=True))
            planned = await self._store.write(lambda tx: _plan(tx, pairs, request_id))
            await self._make(planned)
            return [(plan.endpoint, plan.network, plan.opened.sandbox) for plan in planned]

    async def _make(self, planned: Sequence[_Plan]) -> None:
        """Make what was planned; when the kernel refuses, undo all of it and raise."""
        fresh = [plan for plan in planned if plan.fresh]
        done: list[_Plan] = []
        try:
            for plan in fresh:
                await self._wait_for(plan.network)
                done.append(plan)
                await self._apply(plan)
        except BaseException:
            await self._store.write(lambda tx: _each(tx, _forget, fresh))
            for plan in done:
                await self._context.remove(self._driver(plan.network).remove_endpoint, plan.network, plan.endpoint)
            raise

    async def _apply(self, plan: _Plan) -> None:
        """Make one endpoint and, at the same time, the resolver of its sandbox."""
        driver, namespace = self._driver(plan.network), plan.opened.namespace
        attaching = self._context.apply(driver.apply_endpoint, plan.network, plan.endpoint, namespace)
        if plan.network.predefined or namespace is None or not self._sandboxes.wants_names(plan.opened):
            await attaching
            return
        outcomes = await asyncio.gather(
            attaching, self._context.apply(open_resolver, namespace), return_exceptions=True
        )
        if not isinstance(outcomes[1], BaseException):
            await self._sandboxes.add_resolver(plan.opened, outcomes[1])
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _wait_for(self, network: Network) -> None:
        """Wait while the network itself is being made or repaired."""
        async with self._context.locks.hold(network.id):
            pass

    def _driver(self, network: Network) -> Driver:
        return self._context.driver(network.spec.driver)

    async def get(self, reference: str) -> tuple[Endpoint, Network, Sandbox]:
        """Return an endpoint by id or id prefix, with its network and sandbox."""
        return await self._store.read(lambda tx: _joined(tx, tx.endpoints.find(reference, by_name=False)))

    async def all(self, where: str = "1", *values: object) -> list[tuple[Endpoint, Network, Sandbox]]:
        """Return endpoints that an SQL condition of the table selects, oldest first."""
        return await self._store.read(lambda tx: [_joined(tx, each) for each in tx.endpoints.all(where, *values)])

    async def find(self, network: str, ref: SandboxRef) -> Endpoint:
        """Return the endpoint of a sandbox on a network.

        Raises:
            NotFound: the sandbox is not attached to it.
        """
        if ref.container:
            sandbox = await self._store.read(lambda tx: container_sandbox(tx, ref.container))
        else:
            async with self._sandboxes.open(ref) as opened:
                sandbox = opened.sandbox
        return await self._store.read(lambda tx: _on(tx, network, known_sandbox(tx, sandbox) or sandbox))

    async def detach(self, endpoint_id: str) -> None:
        """Take an endpoint's interface away and free its address and ports. One that is gone is a success."""
        found = await self._store.read(lambda tx: _joined_or_none(tx, endpoint_id))
        if found is None:
            return
        endpoint, network, sandbox = found
        async with self._context.locks.hold(f"sandbox {sandbox.inode}"):
            promoted, last = await self._store.write(lambda tx: _detach(tx, endpoint_id))
            removal = self._context.remove(self._driver(network).remove_endpoint, network, endpoint)
            if last and not sandbox.container_id:  # both wait for grace periods of the kernel's: side by side
                await asyncio.gather(removal, self._leave(sandbox))
            else:
                await removal
            if promoted:
                await self._reroute(sandbox, *promoted)

    async def _leave(self, sandbox: Sandbox) -> None:
        """Take everything of ours out of a namespace that lives on, or ended before us."""
        try:
            async with self._sandboxes.reopen(sandbox) as opened:
                await self._sandboxes.stop_names(opened)
        except NetstoreError as error:
            log.info("sandbox is gone", sandbox=sandbox.path, reason=error.what)
            await self._context.resolver.remove(sandbox.id)

    async def _reroute(self, sandbox: Sandbox, endpoint: Endpoint, network: Network) -> None:
        async with self._sandboxes.reopen(sandbox) as opened:
            if opened.namespace is not None and endpoint.attached:
                driver = self._driver(network)
                await self._context.apply(driver.default_route, network, endpoint, opened.namespace)

    async def activate(self, sandbox: Sandbox, wanted: Mapping[str, Sequence[PortMapping]]) -> None:
        """Attach every reserved endpoint of a container's sandbox, with these ports by endpoint id.

        Raises:
            AddressTaken: a host port has a holder; the reservations stay as they were.
        """
        async with self._context.locks.hold(f"sandbox {sandbox.inode}"), self._sandboxes.reopen(sandbox) as opened:
            planned = await self._store.write(lambda tx: _activate(tx, opened, wanted))
            try:
                for plan in planned:
                    await self._apply(plan)
            except BaseException:
                await self._deactivate(planned)
                raise

    async def deactivate(self, sandbox: Sandbox) -> None:
        """Detach every endpoint of a container's sandbox; addresses stay reserved, ports are freed."""
        async with self._context.locks.hold(f"sandbox {sandbox.inode}"):
            opened = OpenSandbox(sandbox, None, frozenset())
            attached = await self._store.read(
                lambda tx: [
                    _Plan(endpoint, tx.networks.require(endpoint.network_id), opened)
                    for endpoint in tx.endpoints.all("sandbox_id = ?", sandbox.id)
                    if endpoint.attached
                ]
            )
            await self._deactivate(attached)

    async def _deactivate(self, planned: Sequence[_Plan]) -> None:
        await self._store.write(lambda tx: _each(tx, _park, planned))
        for plan in planned:
            await self._context.remove(self._driver(plan.network).remove_endpoint, plan.network, plan.endpoint)

    async def publish(self, endpoint_id: str, wanted: Sequence[PortMapping]) -> tuple[Endpoint, Network, Sandbox]:
        """Publish ports of a live endpoint; those published already stay.

        Raises:
            AddressTaken: a host port has a holder.
            FailedPrecondition: the driver publishes none, or the endpoint is not attached.
        """

        def claim(tx: Transaction) -> tuple[Endpoint, Network, Sandbox, tuple[PortMapping, ...]]:
            endpoint, network, sandbox = _joined(tx, tx.endpoints.require(endpoint_id))
            _refuse_unpublishable(network, endpoint)
            bound = _bound_to_default(network, wanted)
            new = ports.claim(tx, endpoint.id, [port for port in bound if port not in endpoint.ports])
            revision = tx.event(Kind.ENDPOINT, "publish", endpoint.id, endpoint.name, network=network.name)
            endpoint = replace(endpoint, ports=(*endpoint.ports, *new), revision=revision)
            tx.endpoints.update(endpoint)
            return endpoint, network, sandbox, new

        endpoint, network, sandbox, new = await self._store.write(claim)
        try:
            await self._context.apply(self._driver(network).apply_ports, network, endpoint, add=new, remove=())
        except BaseException:
            await self._store.write(lambda tx: _unpublish(tx, endpoint_id, new))
            raise
        return endpoint, network, sandbox

    async def unpublish(self, endpoint_id: str, unwanted: Sequence[PortMapping]) -> tuple[Endpoint, Network, Sandbox]:
        """Take published ports back; those that are not published are ignored."""
        endpoint, network, sandbox, gone = await self._store.write(lambda tx: _unpublish(tx, endpoint_id, unwanted))
        await self._context.apply(self._driver(network).apply_ports, network, endpoint, add=(), remove=gone)
        return endpoint, network, sandbox

    async def update(
        self, endpoint_id: str, etag: str, *, labels: Mapping[str, str] | None, aliases: Sequence[str] | None
    ) -> tuple[Endpoint, Network, Sandbox]:
        """Replace an endpoint's labels or aliases; None keeps them.

        Raises:
            Conflict: the etag is not the current one.
        """

        def change(tx: Transaction) -> tuple[Endpoint, Network, Sandbox]:
            endpoint, network, sandbox = _joined(tx, tx.endpoints.require(endpoint_id))
            if etag and etag != str(endpoint.revision):
                raise Conflict(f"endpoint {endpoint.id[:12]} has changed", hint="read it again, then change it again")
            spec = endpoint.spec if aliases is None else replace(endpoint.spec, aliases=tuple(aliases))
            revision = tx.event(Kind.ENDPOINT, "update", endpoint.id, endpoint.name, network=network.name)
            endpoint = replace(
                endpoint, spec=spec, labels=endpoint.labels if labels is None else dict(labels), revision=revision
            )
            tx.endpoints.update(endpoint)
            _register_names(tx, network, endpoint, sandbox)
            return endpoint, network, sandbox

        return await self._store.write(change)


@dataclass(frozen=True, slots=True)
class _Plan:
    """An endpoint as committed, and where it goes. `fresh` is false for one that was attached before."""

    endpoint: Endpoint
    network: Network
    opened: OpenSandbox
    fresh: bool = True


def reserve(
    tx: Transaction, network: Network, sandbox: Sandbox, spec: EndpointSpec, *, taken: frozenset[str] = frozenset(),
    name: str = "", labels: Mapping[str, str] | None = None, attached: bool,
) -> Endpoint:  # fmt: skip
    """Add an endpoint's row and take its addresses; ports too when it is to be attached at once.

    Raises:
        AddressTaken, Exhausted, InvalidArgument: see the contract.
    """
    endpoint = Endpoint(
        id=new_id(), network_id=network.id, sandbox_id=sandbox.id, spec=spec, name=spec.name or name,
        labels=dict(labels or {}), create_time=time.time(), attached=attached,
    )  # fmt: skip
    where = {"network": network.name} | ({"container": sandbox.container_id} if sandbox.container_id else {})
    revision = tx.event(Kind.ENDPOINT, "connect" if attached else "reserve", endpoint.id, endpoint.name, **where)
    endpoint = replace(endpoint, revision=revision)
    if network.pools:
        others = tx.endpoints.all("sandbox_id = ?", sandbox.id)
        endpoint = replace(
            endpoint,
            mac_address=spec.mac_address or stable_mac(endpoint.id),
            interface_name=spec.interface_name or _free_interface(taken, others, _interface_prefix(network)),
        )
        _refuse_twins(tx, endpoint, network)
        tx.endpoints.insert(endpoint)
        address = ipam.allocate(tx, network, endpoint.id, spec.ipv4_address, field="spec.ipv4_address")
        endpoint = replace(endpoint, addresses=(address,))
        if attached and spec.ports:
            _refuse_unpublishable(network, endpoint)
            claimed = ports.claim(tx, endpoint.id, _bound_to_default(network, spec.ports))
            endpoint = replace(endpoint, ports=claimed)
        endpoint = _take_default_route(tx, network, endpoint, others)
        tx.endpoints.update(endpoint)
        _register_names(tx, network, endpoint, sandbox)
    else:
        tx.endpoints.insert(endpoint)
    return endpoint


def _plan(tx: Transaction, pairs: Sequence[tuple[AttachRequest, OpenSandbox]], request_id: str) -> list[_Plan]:
    answered = tx.answered(request_id, "AttachEndpoints")
    if answered:
        joined = [_joined(tx, tx.endpoints.require(made)) for made in answered]
        return [_Plan(e, n, OpenSandbox(s, None, frozenset()), fresh=False) for e, n, s in joined]
    planned: list[_Plan] = []
    for index, (request, opened) in enumerate(pairs):
        try:
            planned.append(_plan_one(tx, request, opened))
        except NetstoreError as error:
            error.metadata.setdefault("index", str(index))
            raise
    tx.answer(request_id, "AttachEndpoints", [plan.endpoint.id for plan in planned])
    return planned


def _plan_one(tx: Transaction, request: AttachRequest, opened: OpenSandbox) -> _Plan:
    network = tx.networks.find(request.network)
    if network.predefined and not network.pools:
        raise FailedPrecondition(
            f"network {network.name} cannot be attached to a sandbox that exists",
            hint="give `--network host` or `--network none` when the container is created",
        )
    known = known_sandbox(tx, opened.sandbox)
    if known is None:
        _replace_stale(tx, opened.sandbox)
        tx.sandboxes.insert(opened.sandbox)
    opened = replace(opened, sandbox=known or opened.sandbox)
    sandbox = opened.sandbox
    for present in tx.endpoints.all("network_id = ? AND sandbox_id = ?", network.id, sandbox.id):
        difference = changes(request.spec, present.spec)
        if difference:
            raise AlreadyExists(
                f"the sandbox is attached to network {network.name} already, and differs: {difference}",
                hint="detach it first (`netstore network disconnect`)", difference=difference,
            )  # fmt: skip
        return _Plan(present, network, opened, fresh=False)
    name, live = "", True
    if sandbox.container_id:
        container = tx.containers.require(sandbox.container_id)
        name, live = container.name, _is_live(tx, sandbox)
    endpoint = reserve(
        tx, network, sandbox, request.spec, taken=opened.interfaces, name=name, labels=request.labels, attached=live
    )
    return _Plan(endpoint, network, opened, fresh=live)


def _is_live(tx: Transaction, sandbox: Sandbox) -> bool:
    """Say whether a container runs in the sandbox: until then its endpoints are reservations."""
    condition = "sandbox_id = ? AND json_extract(body, '$.state') = 'running'"
    return bool(tx.containers.count(condition, sandbox.id))


def _replace_stale(tx: Transaction, sandbox: Sandbox) -> None:
    """Forget a namespace that was at the same path before and ended: its endpoints ended with it."""
    for stale in tx.sandboxes.all("path = ?", sandbox.path):
        for endpoint in tx.endpoints.all("sandbox_id = ?", stale.id):
            _forget(tx, endpoint)


def _interface_prefix(network: Network) -> str:
    return network.spec.options.get("com.docker.network.container_iface_prefix", "eth")


def _free_interface(taken: frozenset[str], others: Sequence[Endpoint], prefix: str) -> str:
    used = taken | {endpoint.interface_name for endpoint in others}
    return next(name for number in range(len(used) + 1) if (name := f"{prefix}{number}") not in used)


def _refuse_twins(tx: Transaction, endpoint: Endpoint, network: Network) -> None:
    """Name the holder of a MAC or an interface name before the keys refuse it without a name."""
    for present in tx.endpoints.all("network_id = ? AND mac = ?", network.id, endpoint.mac_address):
        holder = present.name or present.id[:12]
        raise AddressTaken(
            f"spec.mac_address: {endpoint.mac_address} of network {network.name} is taken by endpoint {holder}",
            hint="choose another MAC address, or none", holder=holder,
        )  # fmt: skip
    condition = "sandbox_id = ? AND interface_name = ?"
    for present in tx.endpoints.all(condition, endpoint.sandbox_id, endpoint.interface_name):
        raise AddressTaken(
            f"spec.interface_name: {endpoint.interface_name} is taken by another endpoint of the sandbox",
            hint="choose another interface name, or none", holder=present.id,
        )  # fmt: skip


def _take_default_route(tx: Transaction, network: Network, endpoint: Endpoint, others: Sequence[Endpoint]) -> Endpoint:
    """Give the endpoint the default route, if its priority is above the present holder's, or there is none.

    Ties stay with who came first: connecting a network never changes the way out (complaint 13).
    """
    holder = next((other for other in others if other.default_route), None)
    if network.spec.internal or (holder and holder.spec.gateway_priority >= endpoint.spec.gateway_priority):
        return endpoint
    if holder:
        tx.endpoints.update(replace(holder, default_route=False))
    return replace(endpoint, default_route=True)


def _register_names(tx: Transaction, network: Network, endpoint: Endpoint, sandbox: Sandbox) -> None:
    """Write what netstore-resolver answers. On the default network nothing is resolved, as Docker."""
    tx.execute("DELETE FROM names WHERE endpoint_id = ?", endpoint.id)
    if network.predefined:
        return
    names = {endpoint.name, *endpoint.spec.aliases, sandbox.container_id[:12]} - {""}
    for name in {name.lower() for name in names}:
        tx.execute("INSERT INTO names VALUES (?, ?, ?)", network.id, name, endpoint.id)


def _refuse_unpublishable(network: Network, endpoint: Endpoint) -> None:
    if network.spec.internal:
        raise FailedPrecondition(
            f"network {network.name} is internal: its ports cannot be published",
            hint="use a network that is not internal",
        )
    if not endpoint.attached:
        raise FailedPrecondition(f"endpoint {endpoint.id[:12]} is not attached", hint="start its container first")


def _bound_to_default(network: Network, wanted: Sequence[PortMapping]) -> list[PortMapping]:
    """Fill in the network's default host address where a port names none."""
    default = network.spec.options.get("com.docker.network.bridge.host_binding_ipv4", "")
    default = "" if default == "0.0.0.0" else default
    return [replace(port, host_ip=default) if not port.host_ip and default else port for port in wanted]


def _activate(tx: Transaction, opened: OpenSandbox, wanted: Mapping[str, Sequence[PortMapping]]) -> list[_Plan]:
    planned = []
    for endpoint in tx.endpoints.all("sandbox_id = ?", opened.sandbox.id):
        if endpoint.attached:
            continue
        network = tx.networks.require(endpoint.network_id)
        endpoint = replace(endpoint, attached=True)
        if wanted.get(endpoint.id):
            _refuse_unpublishable(network, endpoint)
            claimed = ports.claim(tx, endpoint.id, _bound_to_default(network, wanted[endpoint.id]))
            endpoint = replace(endpoint, ports=claimed)
        where = {"network": network.name, "container": opened.sandbox.container_id}
        revision = tx.event(Kind.ENDPOINT, "connect", endpoint.id, endpoint.name, **where)
        endpoint = replace(endpoint, revision=revision)
        tx.endpoints.update(endpoint)
        planned.append(_Plan(endpoint, network, opened))
    return planned


def _park(tx: Transaction, endpoint: Endpoint) -> None:
    ports.release(tx, endpoint.id)
    revision = tx.event(Kind.ENDPOINT, "disconnect", endpoint.id, endpoint.name)
    tx.endpoints.update(replace(endpoint, attached=False, ports=(), revision=revision))


def _unpublish(
    tx: Transaction, endpoint_id: str, unwanted: Sequence[PortMapping]
) -> tuple[Endpoint, Network, Sandbox, list[PortMapping]]:
    endpoint, network, sandbox = _joined(tx, tx.endpoints.require(endpoint_id))
    gone = [port for port in _bound_to_default(network, unwanted) if port in endpoint.ports]
    ports.release(tx, endpoint_id, gone)
    revision = tx.event(Kind.ENDPOINT, "unpublish", endpoint.id, endpoint.name, network=network.name)
    endpoint = replace(endpoint, ports=tuple(p for p in endpoint.ports if p not in gone), revision=revision)
    tx.endpoints.update(endpoint)
    return endpoint, network, sandbox, gone


def _detach(tx: Transaction, endpoint_id: str) -> tuple[tuple[Endpoint, Network] | None, bool]:
    """Forget an endpoint; returns who gets the default route instead, and whether it was the sandbox's last."""
    endpoint = tx.endpoints.get(endpoint_id)
    if endpoint is None:
        return None, False
    _forget(tx, endpoint)
    others = tx.endpoints.all("sandbox_id = ?", endpoint.sandbox_id)
    if not endpoint.default_route:
        return None, not others
    joined = [(other, tx.networks.require(other.network_id)) for other in others]
    heirs = [(other, network) for other, network in joined if network.pools and not network.spec.internal]
    if not heirs:
        return None, not others
    heir, network = max(heirs, key=lambda pair: pair[0].spec.gateway_priority)
    heir = replace(heir, default_route=True)
    tx.endpoints.update(heir)
    return (heir, network), False


def _forget(tx: Transaction, endpoint: Endpoint) -> None:
    """Remove an endpoint's row, and that of a sandbox that an engine named when it was the last."""
    tx.event(Kind.ENDPOINT, "disconnect", endpoint.id, endpoint.name)
    tx.endpoints.delete(endpoint.id)
    sandbox = tx.sandboxes.get(endpoint.sandbox_id)
    if sandbox and not sandbox.container_id and not tx.endpoints.count("sandbox_id = ?", sandbox.id):
        tx.sandboxes.delete(sandbox.id)


def _each(tx: Transaction, change: Callable[[Transaction, Endpoint], None], plans: Sequence[_Plan]) -> None:
    for plan in plans:
        change(tx, plan.endpoint)


def _joined(tx: Transaction, endpoint: Endpoint) -> tuple[Endpoint, Network, Sandbox]:
    return endpoint, tx.networks.require(endpoint.network_id), tx.sandboxes.require(endpoint.sandbox_id)


def _joined_or_none(tx: Transaction, endpoint_id: str) -> tuple[Endpoint, Network, Sandbox] | None:
    endpoint = tx.endpoints.get(endpoint_id)
    return _joined(tx, endpoint) if endpoint else None


def _on(tx: Transaction, reference: str, sandbox: Sandbox) -> Endpoint:
    network = tx.networks.find(reference)
    for endpoint in tx.endpoints.all("network_id = ? AND sandbox_id = ?", network.id, sandbox.id):
        return endpoint
    raise NotFound("endpoint", f"of {sandbox.path} on network {network.name}", hint="it is not attached")
