"""Policies: create, find, change, remove; and how the kernel is made to enforce what the store says."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias, TypeVar

from netstore.drivers.base import Driver
from netstore.errors import AlreadyExists, Conflict, FailedPrecondition
from netstore.kernel.firewall import Element, Firewall
from netstore.kernel.policing import counter_name, selects
from netstore.model import (
    Endpoint,
    Kind,
    Network,
    Policy,
    PolicyPort,
    PolicySpec,
    RemoteEndpoint,
    Scope,
    Selector,
    new_id,
)
from netstore.networks import planning
from netstore.networks.cluster import cache
from netstore.networks.cluster.members import no_cluster
from netstore.networks.context import Context
from netstore.networks.planning import changes_of_labels
from netstore.store import Transaction

__all__ = ["Policies", "PolicyView", "refuse_unpoliced"]

T = TypeVar("T")
_Anywhere: TypeAlias = Endpoint | RemoteEndpoint


class Share(Protocol):
    """See `Spanning.change_policies`."""

    async def __call__(self, network: Network, edit: Callable[[Transaction], T]) -> T: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyView:
    """A policy with its network, what it counted, and how many endpoints it selects."""

    policy: Policy
    network: Network
    packets: int = 0
    size_bytes: int = 0
    sources: int = 0
    destinations: int = 0


class Policies:
    """The policies of a node."""

    def __init__(self, context: Context, firewall: Firewall) -> None:
        self._context = context
        self._store = context.store
        self._firewall = firewall
        self.share: Share | None = None
        """Makes an edit of the policies of a network that spans nodes every node's."""

    async def start(self) -> None:
        """Take the store's policies as those to enforce; the firewall's skeleton, made next, has them then."""
        networks, policies = await self._store.read(lambda tx: (tx.networks.all(), tx.policies.all()))
        for network in networks:
            if self._context.driver(network.spec.driver).has_policies:
                theirs = [policy for policy in policies if policy.spec.network_id == network.id]
                self._firewall.policing.put(network, theirs)

    async def create(
        self, name: str, network: str, spec: PolicySpec, *, labels: Mapping[str, str], request_id: str = ""
    ) -> PolicyView:
        """Make a policy, or return the one of the same name and spec.

        Raises:
            AlreadyExists: the name is taken by another spec.
            NotFound: no such network.
            FailedPrecondition: the network cannot have policies.
        """
        found = await self._store.read(lambda tx: tx.networks.find(network))
        refuse_unpoliced(found, self._context.driver(found.spec.driver))
        policy = Policy(
            id=new_id(), name=name, spec=replace(spec, network_id=found.id), labels=dict(labels),
            create_time=time.time(),
        )  # fmt: skip
        if found.scope is Scope.GLOBAL:
            policy, _ = await self._shared(found, lambda tx: _insert(tx, policy, found, ""))
            await self._store.write(lambda tx: tx.answer(request_id, "CreatePolicy", [policy.id]))
            return await self._view(policy)
        async with self._hold(found):
            policy, made = await self._store.write(lambda tx: _insert(tx, policy, found, request_id))
            if made:
                await self._enforced(found, lambda tx: _delete(tx, policy))
        return await self._view(policy)

    async def get(self, reference: str) -> PolicyView:
        """Return a policy by name, id or id prefix."""
        return await self._view(await self._store.read(lambda tx: tx.policies.find(reference)))

    async def all(self) -> list[PolicyView]:
        """Return every policy, oldest first."""
        policies = await self._store.read(lambda tx: tx.policies.all())
        return await self._views(policies)

    async def update(
        self, reference: str, etag: str, *, labels: Mapping[str, str] | None, change: Callable[[PolicySpec], PolicySpec]
    ) -> PolicyView:
        """Change a policy; `change` returns its new spec, None keeps the labels.

        Raises:
            Conflict: the etag is not the current one.
            KernelError: the kernel refused; all is as it was.
        """
        found = await self._store.read(lambda tx: tx.policies.find(reference))

        def write(tx: Transaction) -> tuple[Policy, Policy, Network]:
            old = tx.policies.require(found.id)
            if etag and etag != str(old.revision):
                raise Conflict(f"policy {old.name} has changed", hint="read it again, then change it again")
            revision = tx.event(Kind.POLICY, "update", old.id, old.name)
            new = replace(
                old, spec=change(old.spec), labels=old.labels if labels is None else dict(labels), revision=revision
            )
            tx.policies.update(new)
            return old, new, tx.networks.require(old.spec.network_id)

        network = await self._store.read(lambda tx: tx.networks.require(found.spec.network_id))
        if network.scope is Scope.GLOBAL:
            await self._shared(network, write)
            return await self.get(found.id)
        async with self._context.locks.hold(f"policy {found.spec.network_id}"):  # as _hold
            old, new, network = await self._store.write(write)
            if old.spec != new.spec:
                await self._enforced(network, lambda tx: tx.policies.update(old))
        return await self._view(new)

    async def delete(self, reference: str) -> None:
        """Remove a policy.

        Raises:
            NotFound: there is none.
            KernelError: the kernel refused; it is still there.
        """
        found = await self._store.read(lambda tx: tx.policies.find(reference))
        network = await self._store.read(lambda tx: tx.networks.get(found.spec.network_id))
        if network is None:  # it went with its network
            return
        if network.scope is Scope.GLOBAL:
            await self._shared(network, lambda tx: _delete(tx, found))
            return
        async with self._hold(network):
            policy = await self._store.write(lambda tx: _delete(tx, found))
            if policy:
                await self._enforced(network, lambda tx: tx.policies.insert(policy))

    async def _shared(self, network: Network, edit: Callable[[Transaction], T]) -> T:
        if self.share is None:
            raise no_cluster()
        return await self.share(network, edit)

    async def follow(self, network: Network) -> None:
        """Make the kernel follow a change of a network's defaults.

        Raises:
            KernelError: the kernel refused; it enforces what it did.
        """
        async with self._hold(network):
            await self._enforce(network)

    async def forget(self, network: Network) -> None:
        """Stop policing a network that is removed."""
        await self._context.remove(self._police, network, None, [])

    async def relabel(
        self, network: Network, endpoint_id: str, change: Callable[[Transaction], planning.Joined]
    ) -> planning.Joined:
        """Change an endpoint, its labels among it, by a function of the store's; and who it is for the policies.

        Raises:
            KernelError: the kernel refused; its labels are as they were.
        """
        async with self._hold(network):
            before = await self._store.read(lambda tx: tx.endpoints.require(endpoint_id))
            joined = await self._store.write(change)
            after = joined[0]
            if after.attached:
                try:
                    await self._context.apply(self._exchange, network, before, after)
                    present = await self._store.read(lambda tx: tx.endpoints.get(endpoint_id))
                    if present is None or not present.attached:  # detached meanwhile
                        await self._context.apply(self._catch_up, network, [after], [])
                except BaseException:
                    await self._store.write(lambda tx: tx.endpoints.update(replace(after, labels=before.labels)))
                    raise
        return joined

    async def exchange_remotes(
        self, network: Network, before: Sequence[RemoteEndpoint], after: Sequence[RemoteEndpoint]
    ) -> None:
        """Change who endpoints of other nodes are for the policies.

        Raises:
            KernelError: the kernel refused; the reconciler will try again.
        """
        if self._firewall.policing.get(network.id):
            await self._context.apply(self._catch_up, network, before, after)

    def _hold(self, network: Network) -> AbstractAsyncContextManager[None]:
        return self._context.locks.hold(f"policy {network.id}")

    async def _enforced(self, network: Network, undo: Callable[[Transaction], object]) -> None:
        try:
            await self._enforce(network)
        except BaseException:
            await self._store.write(undo)
            raise

    async def _enforce(self, network: Network) -> None:
        """Police a network as the store says. Endpoints come and go meanwhile: who did so is looked at afterwards."""
        policies = await self._store.read(lambda tx: tx.policies.all("network_id = ?", network.id))
        endpoints = await self._attached(network)
        await self._context.apply(self._police, network, policies, endpoints)
        before, now = endpoints, await self._attached(network)
        while [_id(each) for each in now] != [_id(each) for each in before]:
            await self._context.apply(self._catch_up, network, before, now)
            before, now = now, await self._attached(network)

    async def _attached(self, network: Network) -> list[_Anywhere]:
        return await self._store.read(lambda tx: _reachable(tx, network.id))

    def _police(self, network: Network, policies: Sequence[Policy] | None, endpoints: Sequence[_Anywhere]) -> None:
        policing = self._firewall.policing

        def change() -> None:
            if policies is None:
                policing.restore(network.id)
            else:
                policing.put(network, policies)

        self._firewall.police(network.id, change, lambda: self._elements(network, endpoints))

    def _elements(self, network: Network, endpoints: Sequence[_Anywhere]) -> set[Element]:
        policing = self._firewall.policing
        if not self._context.driver(network.spec.driver).is_here(network):
            return set()
        found = set(policing.network_elements(network))
        for each in endpoints:
            remote = isinstance(each, RemoteEndpoint)
            found.update((policing.remote_elements if remote else policing.endpoint_elements)(network, each))  # type: ignore[arg-type]
        return found

    def _catch_up(self, network: Network, before: Sequence[_Anywhere], now: Sequence[_Anywhere]) -> None:
        with self._firewall.steady:
            old, new = self._elements(network, before), self._elements(network, now)
            self._firewall.remove(sorted(old - new))
            self._firewall.add(sorted(new))

    def _exchange(self, network: Network, before: Endpoint, after: Endpoint) -> None:
        with self._firewall.steady:
            old, new = self._elements(network, [before]), self._elements(network, [after])
            self._firewall.add(sorted(new - old))
            self._firewall.remove(sorted(old - new))

    async def _view(self, policy: Policy) -> PolicyView:
        return (await self._views([policy]))[0]

    async def _views(self, policies: Sequence[Policy]) -> list[PolicyView]:
        if not policies:
            return []
        counted = await self._context.apply(self._firewall.counters)

        def look(tx: Transaction) -> list[PolicyView]:
            ids = {policy.spec.network_id for policy in policies}
            attached = {each: _reachable(tx, each) for each in ids}
            return [
                PolicyView(
                    policy=policy,
                    network=tx.networks.require(policy.spec.network_id),
                    packets=counted.get(counter_name(policy.id), (0, 0))[0],
                    size_bytes=counted.get(counter_name(policy.id), (0, 0))[1],
                    sources=_selected(policy.spec.sources, attached[policy.spec.network_id]),
                    destinations=_selected(policy.spec.destinations, attached[policy.spec.network_id]),
                )
                for policy in policies
            ]

        return await self._store.read(look)


def refuse_unpoliced(network: Network, driver: Driver) -> None:
    """Refuse a network that cannot be policed.

    Raises:
        FailedPrecondition: saying why.
    """
    if not driver.has_policies:
        raise FailedPrecondition(
            f"network {network.name} ({network.spec.driver}) has no policies", hint="use a bridge network"
        )
    if network.spec.ipam_driver == "null":
        raise FailedPrecondition(
            f"network {network.name} has no addresses (ipam_driver null), by which policies know endpoints",
            hint="use a network with addresses",
        )


def _reachable(tx: Transaction, network_id: str) -> list[_Anywhere]:
    """Return the endpoints of a network that packets can go to, here and on other nodes."""
    here = [each for each in tx.endpoints.all("network_id = ?", network_id) if each.attached]
    return [*here, *cache.remotes(tx, network_id)]


def _id(endpoint: _Anywhere) -> str:
    return endpoint.endpoint_id if isinstance(endpoint, RemoteEndpoint) else endpoint.id


def _selected(selectors: Sequence[Selector], endpoints: Sequence[_Anywhere]) -> int:
    return sum(any(selects(selector, endpoint) for selector in selectors) for endpoint in endpoints)


def _insert(tx: Transaction, policy: Policy, network: Network, request_id: str) -> tuple[Policy, bool]:
    for made in tx.answered(request_id, "CreatePolicy"):
        return tx.policies.require(made), False
    for present in tx.policies.all("name = ?", policy.name):
        difference = _difference(policy, present)
        if difference:
            raise AlreadyExists(
                f"policy {policy.name} exists and differs: {difference}",
                hint="choose another name, or remove the policy first", difference=difference,
            )  # fmt: skip
        return present, False
    tx.networks.require(network.id)
    revision = tx.event(Kind.POLICY, "create", policy.id, policy.name, network=network.name)
    policy = replace(policy, revision=revision)
    tx.policies.insert(policy)
    tx.answer(request_id, "CreatePolicy", [policy.id])
    return policy, True


def _difference(asked: Policy, present: Policy) -> str:
    """Say in what two policies differ, in the words of the command; "" when in nothing."""
    wanted, there = _words(asked.spec), _words(present.spec)
    differing = [f"{key} is {there[key]}, asked for {wanted[key]}" for key in wanted if wanted[key] != there[key]]
    return ", ".join(differing) or changes_of_labels(asked.labels, present.labels)


def _words(spec: PolicySpec) -> dict[str, str]:
    def who(selectors: Sequence[Selector]) -> str:
        return " or ".join(each.cidr or ",".join(each.labels) for each in selectors) or "any"

    def what(port: PolicyPort) -> str:
        last = f"-{port.last}" if port.last > port.first else ""
        return f"{port.first}{last}/{port.protocol}" if port.first else port.protocol

    ports = " or ".join(what(port) for port in spec.ports) or "any"
    return {
        "network": spec.network_id[:12], "sources": who(spec.sources), "destinations": who(spec.destinations),
        "ports": ports, "action": spec.action.value,
    }  # fmt: skip


def _delete(tx: Transaction, policy: Policy) -> Policy | None:
    present = tx.policies.get(policy.id)
    if present:
        tx.event(Kind.POLICY, "remove", present.id, present.name)
        tx.policies.delete(present.id)
    return present
