"""Whether a network is in order, node by node: each compares what it holds with its store, and probes all others.

Who is asked puts a request into etcd, which every node sees in its watch; each answers beside it. So it needs no way
between nodes but the one that they have, and tells a node that is cut off from its peers from one that is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import structlog

from netstore.errors import NetstoreError
from netstore.kernel.echo import OVERHEAD, echo
from netstore.model import Finding, Network, NodeCheck, Probe, new_id
from netstore.networks.cluster import cache
from netstore.networks.cluster.cluster import Cluster, State
from netstore.networks.cluster.records import CHECKS, REPORTS, CheckRequest, decode_check, encode
from netstore.networks.context import Context
from netstore.store.etcd import Changes, put

__all__ = ["Checks", "told"]

log = structlog.get_logger(__name__)

_WAIT_SECONDS = 6.0
_LEASE_SECONDS = 30
_ECHO_SECONDS = 1.0
_ECHOES = 5
_STEPS = (64, 8)
"""In these steps it is found out what passes where full packets do not: few at once, lest they be lost for that."""


class Checks:
    """Asks all nodes, and answers. `examine` compares a network's kernel objects here with the store."""

    def __init__(
        self, context: Context, cluster: Cluster, examine: Callable[[Network], Awaitable[Sequence[Finding]]]
    ) -> None:
        self._context = context
        self._cluster = cluster
        self._examine = examine

    async def ask(self, network: Network) -> list[NodeCheck]:
        """Return every node's findings, by name; of one that does not answer, why. Without etcd, this node's."""
        nodes = [node for node in await self._cluster.nodes() if node.id != self._cluster.node.id]
        found = {node.id: NodeCheck(node_id=node.id, error=self._silence(up=node.up)) for node in nodes}
        own = asyncio.ensure_future(self.look(network))
        try:
            if self._cluster.state is State.JOINED:
                waited = {node.id for node in nodes if node.up}
                async with asyncio.timeout(_WAIT_SECONDS):
                    await self._collect(network, found, waited)
        except TimeoutError:
            pass
        except NetstoreError as error:
            why = f"not asked: {error.what}"
            found |= {each: NodeCheck(node_id=each, error=why) for each in waited if found[each].error}
        finally:
            found[self._cluster.node.id] = await own
        names = {node.id: node.name for node in (*nodes, self._cluster.node)}
        return [found[each] for each in sorted(found, key=names.__getitem__)]

    def _silence(self, *, up: bool) -> str:
        if self._cluster.state is not State.JOINED:
            return f"not asked: {self._cluster.reason}"
        if up:
            return f"no answer in {_WAIT_SECONDS:.0f} s: its netstored stopped just now, hangs, or is cut off from etcd"
        return "down: its netstored does not run, or is cut off from etcd"

    async def _collect(self, network: Network, found: dict[str, NodeCheck], waited: set[str]) -> None:
        etcd = self._cluster.etcd
        lease = await etcd.grant(_LEASE_SECONDS)
        request = CheckRequest(id=new_id(), network_id=network.id, lease=lease)
        try:
            await etcd.transact([], [put(f"{CHECKS}{request.id}", encode(request), lease)])
            async for each in etcd.follow(f"{REPORTS}{request.id}/"):
                items = [item for put_, item in each.events if put_] if isinstance(each, Changes) else each.items
                for report in (decode_check(item.value) for item in items):
                    found[report.node_id] = report
                    waited = waited - {report.node_id}
                if not waited:
                    return
        finally:
            await etcd.revoke(lease)

    async def answer(self, request: CheckRequest) -> None:
        """Report what another node asked for."""
        network = await self._context.store.read(lambda tx: tx.networks.get(request.network_id))
        node_id = self._cluster.node.id
        if network is None:
            why = self._cluster.refused.get(request.network_id, "it was removed meanwhile")
            report = NodeCheck(node_id=node_id, error=f"the network is not on this node: {why}")
        else:
            report = await self.look(network)
        key = f"{REPORTS}{request.id}/{node_id}"
        try:
            await self._cluster.etcd.transact([], [put(key, encode(report), request.lease)])
        except NetstoreError as error:  # whoever asked has gone, and the lease with it; the session goes on
            log.info("an answer came too late", network=request.network_id, reason=str(error))

    async def look(self, network: Network) -> NodeCheck:
        """Return what differs here, and what comes back from every other node that uses the network."""
        present = await self._context.store.read(lambda tx: tx.networks.require(network.id))
        used = self._context.driver(present.spec.driver).is_here(present)
        findings = await self._examine(present)
        hosts = await self._context.store.read(lambda tx: cache.hosts(tx, network.id)) if used else []
        probes = await asyncio.gather(*(_probe(each.node_id, each.addresses[0], present.mtu) for each in hosts))
        return NodeCheck(
            node_id=self._cluster.node.id, used=used, mtu=present.mtu if used else 0, probes=tuple(probes),
            findings=told(network, findings),
        )  # fmt: skip


def told(network: Network, findings: Sequence[Finding]) -> tuple[str, ...]:
    """Return what was found of a network, as text; whose it is is said where it is not the network itself."""
    return tuple(each.detail if each.name == network.name else f"{each.name}: {each.detail}" for each in findings)


async def _probe(node_id: str, address: str, mtu: int) -> Probe:
    small = OVERHEAD[6 if ":" in address else 4] + 56
    answered = [each for each in await echo(address, [small] * _ECHOES, seconds=_ECHO_SECONDS) if each is not None]
    passed = await _largest(address, small, mtu) if answered else 0
    return Probe(
        node_id=node_id, address=address, sent=_ECHOES, received=len(answered), mtu=passed,
        latency=min(answered, default=0.0),
    )  # fmt: skip


async def _largest(address: str, small: int, mtu: int) -> int:
    """Return the size of the largest packet that is answered; small ones are."""
    if (await echo(address, [mtu], seconds=_ECHO_SECONDS))[0] is not None:
        return mtu
    end = mtu
    for step in _STEPS:
        sizes = range(small, end, step)
        times = await echo(address, sizes, seconds=_ECHO_SECONDS)
        small = max([size for size, time in zip(sizes, times, strict=True) if time is not None], default=small)
        end = min(small + step, mtu)
    return small
