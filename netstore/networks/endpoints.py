"""Endpoints: attach, detach, publish; and the reservations of containers that do not run.

Attaching is one durable commit (what should be) and then the kernel's objects (what is), both in one thread: every
handover between threads costs more than most of the system calls. If the kernel refuses, the commit is undone and
nothing is left.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace

import structlog

from netstore.drivers.base import Driver
from netstore.drivers.options import ENDPOINT_OPTIONS, refuse_changes
from netstore.errors import Conflict, KernelError, NetstoreError, Unavailable
from netstore.kernel.sandboxes import open_resolver
from netstore.model import Endpoint, Kind, Network, PortMapping, Sandbox, SandboxRef, Scope
from netstore.networks import planning
from netstore.networks.cluster.members import no_cluster
from netstore.networks.cluster.span import Span
from netstore.networks.context import Context
from netstore.networks.leases import Leases, is_leased
from netstore.networks.planning import AttachRequest, Plan
from netstore.networks.policies import Policies
from netstore.networks.sandboxes import OpenSandbox, Sandboxes, container_sandbox, known_sandbox
from netstore.store import Transaction

__all__ = ["Endpoints"]

log = structlog.get_logger(__name__)

_Change = Callable[[Transaction, Endpoint], None]
_Resolver = tuple[OpenSandbox, tuple[socket.socket, socket.socket]]


class Endpoints:
    """The endpoints of a node."""

    def __init__(
        self, context: Context, sandboxes: Sandboxes, policies: Policies, leases: Leases, span: Span | None,
        touch: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`touch` is told of the network of every endpoint that changed."""
        self._context = context
        self._store = context.store
        self._sandboxes = sandboxes
        self._policies = policies
        self._leases = leases
        self._span = span
        self._touch = touch
        self.changed: Callable[[Sandbox], Awaitable[None]] | None = None
        """Told of a container's sandbox whose endpoints were attached or detached while it runs."""

    async def attach(
        self, requests: Sequence[AttachRequest], *, request_id: str = ""
    ) -> list[tuple[Endpoint, Network, Sandbox]]:
        """Attach sandboxes to networks, all or none.

        Raises:
            NotFound, InvalidArgument, AlreadyExists, AddressTaken, Exhausted, KernelError: see the contract.
        """
        async with AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(self._sandboxes.open(each.sandbox)) for each in requests]
            for key in sorted({each.sandbox.key for each in opened}):
                await stack.enter_async_context(self._context.locks.hold(key))
            pairs = list(zip(requests, opened, strict=True))

            heirs: dict[str, tuple[Sandbox, Endpoint, Network]] = {}

            def undo(tx: Transaction, endpoint: Endpoint) -> None:
                heirs.pop(endpoint.id, None)
                heir, _ = planning.detach(tx, endpoint.id)
                if heir:
                    heirs[heir[0].id] = tx.sandboxes.require(heir[0].sandbox_id), *heir
                tx.unanswer(request_id)

            try:
                planned = await self._carry_out(lambda tx: planning.attach(tx, pairs, request_id), undo)
            except BaseException:
                for heir in heirs.values():
                    await self._reroute(*heir)
                raise
            for plan in planned:
                await self._tell(plan.opened.sandbox)
            return [(plan.endpoint, plan.network, plan.opened.sandbox) for plan in planned]

    async def _tell(self, sandbox: Sandbox) -> None:
        if self.changed and sandbox.container_id:
            await self.changed(sandbox)

    async def _carry_out(self, plan: Callable[[Transaction], list[Plan]], undo: _Change) -> list[Plan]:
        """Commit a plan and make what it says, in one thread; when the kernel refuses, undo all of it and raise."""
        planned, resolvers = await self._context.apply(self._commit_and_make, plan, undo)
        if resolvers is None:  # a network is being made or repaired meanwhile
            for network_id in sorted({each.network.id for each in planned}):
                async with self._context.locks.hold(network_id):
                    pass
            planned = await self._share(planned, undo)
            resolvers = await self._context.apply(self._make, planned, undo)
        if any(is_leased(plan.network) for plan in planned):
            planned = await self._lease(planned, undo, resolvers)
        for opened, sockets in resolvers:
            await self._sandboxes.add_resolver(opened, sockets)
        for each in planned:
            self._touch(each.network.id)
        return planned

    def _commit_and_make(
        self, plan: Callable[[Transaction], list[Plan]], undo: _Change
    ) -> tuple[list[Plan], list[_Resolver] | None]:
        planned = self._store.write_here(plan)
        if any(self._context.locks.held(each.network.id) or self._spans(each.network) for each in planned):
            return planned, None
        return planned, self._make(planned, undo)

    def _make(self, planned: Sequence[Plan], undo: _Change) -> list[_Resolver]:
        """Make each fresh endpoint and, where it is missing, the resolver of its sandbox, which is returned."""
        fresh = [plan for plan in planned if plan.fresh]
        done: list[Plan] = []
        resolvers: dict[str, _Resolver] = {}
        try:
            for plan in fresh:
                done.append(plan)
                sandbox_id, namespace = plan.opened.sandbox.id, plan.opened.namespace
                self._driver(plan.network).apply_endpoint(plan.network, plan.endpoint, namespace)
                if plan.demoted:
                    self._driver(plan.demoted[0]).lose_default_route(*plan.demoted)
                if namespace is None or plan.network.predefined or sandbox_id in resolvers:
                    continue
                if self._sandboxes.wants_names(plan.opened):
                    resolvers[sandbox_id] = plan.opened, open_resolver(namespace)
        except BaseException:
            self._unmake(done, fresh, undo, list(resolvers.values()))
            raise
        return list(resolvers.values())

    def _unmake(
        self, done: Sequence[Plan], fresh: Sequence[Plan], undo: _Change, resolvers: Sequence[_Resolver]
    ) -> None:
        """Take back what was made of fresh endpoints, and their rows."""
        for plan in done:
            try:
                self._driver(plan.network).remove_endpoint(plan.network, plan.endpoint, plan.opened.namespace)
            except NetstoreError as error:  # the caller is told what failed first; the reconciler takes the rest
                log.warning("taking back an endpoint failed", endpoint=plan.endpoint.id, error=str(error))
        self._store.write_here(lambda tx: planning.each(tx, undo, fresh))
        for opened, sockets in resolvers:
            self._sandboxes.discard_resolver(opened, sockets)

    async def _lease(self, planned: list[Plan], undo: _Change, resolvers: Sequence[_Resolver]) -> list[Plan]:
        """Get leases for new endpoints whose addresses a server lends, or undo the plan and raise."""
        fresh = [plan for plan in planned if plan.fresh]
        try:
            return [
                await self._leases.bind(plan) if plan.fresh and is_leased(plan.network) else plan for plan in planned
            ]
        except BaseException:
            for plan in fresh:
                await self._leases.give_back(plan.endpoint.id, plan.network, plan.opened.sandbox)
            await self._context.remove(self._unmake, fresh, fresh, undo, resolvers)
            raise

    def _spans(self, network: Network) -> bool:
        return self._driver(network).scope is Scope.GLOBAL

    async def _share(self, planned: list[Plan], undo: _Change) -> list[Plan]:
        """Hold in the cluster what new endpoints on networks that span nodes have, or undo the plan and raise."""
        try:
            return [await self._shared(plan) if self._spans(plan.network) else plan for plan in planned]
        except BaseException:
            new = [plan for plan in planned if plan.fresh or plan.made]
            await self._store.write(lambda tx: planning.each(tx, undo, new))
            for plan in new:
                self._poke(plan.network)
            raise

    async def _shared(self, plan: Plan) -> Plan:
        span = self._required_span()
        if plan.made:
            plan = replace(plan, endpoint=await span.publication.claim(plan.endpoint, plan.network))
        if plan.fresh and not self._driver(plan.network).is_here(plan.network):
            async with self._context.locks.hold(plan.network.id):
                plan = replace(plan, network=await span.networks.open(plan.network))
        if plan.fresh and not plan.made:
            if any(port.mesh for port in plan.endpoint.ports):
                try:
                    await span.publication.hold_ports(plan.endpoint)
                except Unavailable as error:  # what is reserved may run; a port that others get meanwhile is taken back
                    log.warning(
                        "ports are every node's once etcd is back", endpoint=plan.endpoint.id, reason=error.what
                    )
            self._poke(plan.network, plan.endpoint.id)
        return plan

    def _required_span(self) -> Span:
        if self._span is None:
            raise no_cluster()
        return self._span

    def _poke(self, network: Network, *endpoint_ids: str) -> None:
        """Let the cluster hear soon of what changed on a network that spans nodes."""
        if self._span and self._spans(network):
            self._span.publication.poke(endpoint_ids)

    async def claim(self, sandbox: Sandbox, networks: Iterable[Network]) -> None:
        """Hold in the cluster what a container's new reservations have on those of its networks that span nodes.

        Raises:
            AddressTaken, FailedPrecondition, Unavailable: see `Publication.claim`; the caller undoes the reservations.
        """
        spanning = {network.id: network for network in networks if self._spans(network)}
        for endpoint in await self.of(sandbox) if spanning else ():
            if endpoint.network_id in spanning:
                await self._required_span().publication.claim(endpoint, spanning[endpoint.network_id])

    def alone(self, sandbox: Sandbox) -> AbstractAsyncContextManager[None]:
        """Return the context in which nobody else changes what a sandbox has, as while its first endpoints are made."""
        return self._context.locks.hold(sandbox.key)

    async def of(self, sandbox: Sandbox) -> list[Endpoint]:
        """Return the endpoints of a sandbox."""
        return await self._store.read(lambda tx: tx.endpoints.all("sandbox_id = ?", sandbox.id))

    def _driver(self, network: Network) -> Driver:
        return self._context.driver(network.spec.driver)

    async def get(self, reference: str) -> tuple[Endpoint, Network, Sandbox]:
        """Return an endpoint by id or id prefix, with its network and sandbox."""
        return await self._store.read(lambda tx: planning.joined(tx, tx.endpoints.find(reference, by_name=False)))

    async def all(self, where: str = "1", *values: object) -> list[tuple[Endpoint, Network, Sandbox]]:
        """Return endpoints that an SQL condition of the table selects, oldest first."""
        return await self._store.read(lambda tx: planning.all_joined(tx, where, *values))

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
        return await self._store.read(
            lambda tx: planning.endpoint_on(tx, network, known_sandbox(tx, sandbox) or sandbox)
        )

    async def detach(self, endpoint_id: str) -> None:
        """Take an endpoint's interface away and free its address and ports. One that is gone is a success."""
        found = await self._store.read(lambda tx: planning.joined_or_none(tx, endpoint_id))
        if found is None:
            return
        endpoint, network, sandbox = found
        async with self._context.locks.hold(sandbox.key):
            await self._take_out(network, endpoint, sandbox)
            present, (promoted, last) = await self._store.write(
                lambda tx: (tx.endpoints.get(endpoint_id), planning.detach(tx, endpoint_id))
            )
            self._touch(network.id)
            endpoint = present or endpoint  # its labels, by which policies know it, may have changed
            removal = self._context.remove(self._driver(network).remove_endpoint, network, endpoint)
            # All wait, for grace periods of the kernel's and for etcd: side by side.
            leaving = [self._leave(sandbox)] if last and not sandbox.container_id else []
            telling = [self._span.publication.tell(endpoint_id)] if self._span and self._spans(network) else []
            if leaving or telling:
                await asyncio.gather(removal, *leaving, *telling)
            else:
                await removal
            if promoted:
                await self._reroute(sandbox, *promoted)
        await self._tell(sandbox)

    async def _take_out(self, network: Network, endpoint: Endpoint, sandbox: Sandbox) -> None:
        """Remove an interface that is in its namespace alone, before its row: without it nobody would find it."""
        driver = self._driver(network)
        if not driver.ends_inside or not endpoint.attached:
            return
        if is_leased(network):
            await self._leases.give_back(endpoint.id, network, sandbox)
        try:
            async with self._sandboxes.reopen(sandbox) as opened:
                await self._context.remove(driver.remove_endpoint, network, endpoint, opened.namespace)
        except KernelError as error:
            if error.errno != errno.ENOENT:  # it went with its namespace
                raise

    async def _leave(self, sandbox: Sandbox) -> None:
        """Take everything of ours out of a namespace that lives on, or ended before us."""
        try:
            async with self._sandboxes.reopen(sandbox) as opened:
                await self._sandboxes.stop_names(opened)
        except NetstoreError as error:
            log.info("sandbox is gone", sandbox=sandbox.path, reason=error.what)
            await self._context.resolver.remove(sandbox.id)

    async def _reroute(self, sandbox: Sandbox, endpoint: Endpoint, network: Network) -> None:
        try:
            async with self._sandboxes.reopen(sandbox) as opened:
                if opened.namespace is not None and endpoint.attached:
                    driver = self._driver(network)
                    await self._context.apply(driver.default_route, network, endpoint, opened.namespace)
        except KernelError as error:
            if error.errno != errno.ENOENT:  # its routes went with the namespace
                raise

    async def activate(self, sandbox: Sandbox, wanted: Mapping[str, Sequence[PortMapping]]) -> None:
        """Attach every reserved endpoint of a container's sandbox, with these ports by endpoint id.

        Raises:
            AddressTaken: a host port has a holder; the reservations stay as they were.
        """
        async with self._context.locks.hold(sandbox.key), self._sandboxes.reopen(sandbox) as opened:
            await self._carry_out(lambda tx: planning.activate(tx, opened, wanted), planning.park)

    async def deactivate(self, sandbox: Sandbox) -> None:
        """Detach every endpoint of a container's sandbox; addresses stay reserved, ports are freed."""
        async with self._context.locks.hold(sandbox.key):
            opened = OpenSandbox(sandbox, None)
            attached = await self._store.read(
                lambda tx: [
                    Plan(endpoint, tx.networks.require(endpoint.network_id), opened)
                    for endpoint in tx.endpoints.all("sandbox_id = ?", sandbox.id)
                    if endpoint.attached
                ]
            )
            for plan in attached:
                await self._take_out(plan.network, plan.endpoint, sandbox)
            await self._store.write(lambda tx: planning.each(tx, planning.park, attached))
            for plan in attached:
                self._touch(plan.network.id)
                self._poke(plan.network, plan.endpoint.id)
            for plan in attached:
                await self._context.remove(self._driver(plan.network).remove_endpoint, plan.network, plan.endpoint)

    async def publish(
        self, reference: str, wanted: Sequence[PortMapping], *, keeper: str = ""
    ) -> tuple[Endpoint, Network, Sandbox]:
        """Publish ports of a live endpoint, given by id or id prefix; those published already stay. `keeper`: see
        AttachRequest.port_keeper.

        Raises:
            AddressTaken: a host port has a holder.
            FailedPrecondition: the driver publishes none, or the endpoint is not attached.
        """
        if any(port.mesh for port in wanted):
            return await self._publish_everywhere(reference, wanted, keeper)
        return await self._context.apply(self._publish, reference, wanted, keeper)

    async def _publish_everywhere(
        self, reference: str, wanted: Sequence[PortMapping], keeper: str
    ) -> tuple[Endpoint, Network, Sandbox]:
        endpoint, network, sandbox, new = await self._store.write(
            lambda tx: planning.publish(tx, reference, wanted, keeper=keeper)
        )
        try:
            await self._required_span().publication.hold_ports(endpoint)
        except BaseException:
            await self._store.write(lambda tx: planning.unpublish(tx, endpoint.id, new))
            self._poke(network, endpoint.id)
            raise
        await self._context.apply(self._make_ports, network, endpoint, new)
        return endpoint, network, sandbox

    def _publish(self, reference: str, wanted: Sequence[PortMapping], keeper: str) -> tuple[Endpoint, Network, Sandbox]:
        endpoint, network, sandbox, new = self._store.write_here(
            lambda tx: planning.publish(tx, reference, wanted, keeper=keeper)
        )
        self._make_ports(network, endpoint, new)
        return endpoint, network, sandbox

    def _make_ports(self, network: Network, endpoint: Endpoint, new: Sequence[PortMapping]) -> None:
        try:
            self._driver(network).apply_ports(network, endpoint, add=new, remove=())
        except BaseException:
            self._store.write_here(lambda tx: planning.unpublish(tx, endpoint.id, new))
            raise

    async def unpublish(self, reference: str, unwanted: Sequence[PortMapping]) -> tuple[Endpoint, Network, Sandbox]:
        """Take published ports back; those that are not published are ignored."""
        endpoint, network, sandbox = await self._context.apply(self._unpublish, reference, unwanted)
        self._poke(network, endpoint.id)
        return endpoint, network, sandbox

    def _unpublish(self, reference: str, unwanted: Sequence[PortMapping]) -> tuple[Endpoint, Network, Sandbox]:
        endpoint, network, sandbox, gone = self._store.write_here(
            lambda tx: planning.unpublish(tx, reference, unwanted)
        )
        self._driver(network).apply_ports(network, endpoint, add=(), remove=gone)
        return endpoint, network, sandbox

    async def update(
        self, endpoint_id: str, etag: str, *, labels: Mapping[str, str] | None, aliases: Sequence[str] | None,
        options: Mapping[str, str] | None = None,
    ) -> tuple[Endpoint, Network, Sandbox]:  # fmt: skip
        """Replace an endpoint's labels, aliases or options; None keeps them.

        Raises:
            Conflict: the etag is not the current one.
            Immutable: an option that is not live would change.
            KernelError: the kernel refused; all is as it was.
        """
        before, network, _ = await self._store.read(lambda tx: planning.joined(tx, tx.endpoints.require(endpoint_id)))

        def change(tx: Transaction) -> tuple[Endpoint, Network, Sandbox]:
            endpoint, network, sandbox = planning.joined(tx, tx.endpoints.require(endpoint_id))
            if etag and etag != str(endpoint.revision):
                raise Conflict(f"endpoint {endpoint.id[:12]} has changed", hint="read it again, then change it again")
            spec = endpoint.spec if aliases is None else replace(endpoint.spec, aliases=tuple(aliases))
            if options is not None:
                refuse_changes(ENDPOINT_OPTIONS, spec.options, options)
                spec = replace(spec, options=dict(options))
            revision = tx.event(Kind.ENDPOINT, "update", endpoint.id, endpoint.name, network=network.name)
            endpoint = replace(
                endpoint, spec=spec, labels=endpoint.labels if labels is None else dict(labels), revision=revision
            )
            tx.endpoints.update(endpoint)
            planning.register_names(tx, network, endpoint, sandbox)
            return endpoint, network, sandbox

        if labels is None or dict(labels) == dict(before.labels):
            joined = await self._store.write(change)
        else:
            joined = await self._policies.relabel(network, endpoint_id, change)
            self._touch(network.id)
        self._poke(network, endpoint_id)
        if joined[0].spec.options != before.spec.options and joined[0].attached:
            await self._follow(*joined, before)
        return joined

    async def _follow(self, endpoint: Endpoint, network: Network, sandbox: Sandbox, before: Endpoint) -> None:
        """Make the kernel follow an endpoint's options; when it refuses, go back to what they were."""
        async with self._sandboxes.reopen(sandbox) as opened:
            if opened.namespace is None:
                return
            driver = self._driver(network)
            try:
                await self._context.apply(driver.update_endpoint, network, endpoint, opened.namespace)
            except BaseException:
                await self._store.write(lambda tx: tx.endpoints.update(replace(endpoint, spec=before.spec)))
                await self._context.apply(driver.update_endpoint, network, before, opened.namespace)
                raise
