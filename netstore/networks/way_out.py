"""Which endpoint of a sandbox is its way out: whose gateway its default route is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from netstore.model import Endpoint, Network
from netstore.store import Transaction

__all__ = ["demoted", "leads_out", "pass_on", "take"]


def take(
    tx: Transaction,
    network: Network,
    endpoint: Endpoint,
    others: Sequence[Endpoint],
    *,
    taken: bool = False,
    younger: Collection[str] = (),
) -> Endpoint:
    """Give the endpoint the default route, if its priority is above the present holder's, or there is none. `taken`: an
    interface that is not ours has it, whose priority is 0. `younger` are ids of those of the others that came later.

    Ties stay with who came first: connecting a network never changes the way out (complaint 13).
    """
    holder = next((other for other in others if other.default_route), None)
    present = 0 if taken else None
    if holder and any(address.gateway for address in holder.addresses):  # else it waits for another lease
        present = holder.spec.gateway_priority - (holder.id in younger)
    if not leads_out(network, endpoint) or (present is not None and present >= endpoint.spec.gateway_priority):
        return endpoint
    if holder:
        tx.endpoints.update(replace(holder, default_route=False))
    return replace(endpoint, default_route=True)


def pass_on(tx: Transaction, others: Sequence[Endpoint]) -> tuple[Endpoint, Network] | None:
    """Give one of the others the default route, which its holder lost; returns who has it now."""
    pairs = [(other, tx.networks.require(other.network_id)) for other in others]
    heirs = [(other, network) for other, network in pairs if leads_out(network, other)]
    if not heirs:
        return None
    heir, network = max(heirs, key=lambda pair: pair[0].spec.gateway_priority)
    heir = replace(heir, default_route=True)
    tx.endpoints.update(heir)
    return heir, network


def demoted(tx: Transaction, endpoint: Endpoint, others: Sequence[Endpoint]) -> tuple[Network, Endpoint] | None:
    """Return who of the others, as they were, had the default route that the endpoint was given just now."""
    holder = next((each for each in others if each.default_route), None)
    if holder is None or not endpoint.default_route or not holder.attached:
        return None
    return tx.networks.require(holder.network_id), replace(holder, default_route=False)


def leads_out(network: Network, endpoint: Endpoint) -> bool:
    """Say whether an endpoint has a gateway."""
    return not network.spec.internal and any(address.gateway for address in endpoint.addresses)
