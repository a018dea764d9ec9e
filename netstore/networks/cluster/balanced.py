"""Services of networks that span nodes: each change is one transaction, which every node takes up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from netstore.errors import InvalidArgument, Unavailable
from netstore.model import Service
from netstore.networks.cluster import claims
from netstore.networks.cluster.cluster import Cluster
from netstore.networks.cluster.members import member_key
from netstore.networks.cluster.records import CLAIMS, NETWORKS, RECOVERING, SERVICES, encode
from netstore.networks.cluster.spanning import rehearse
from netstore.store import Store, Transaction
from netstore.store.etcd import OPERATIONS, TxnResult, absent, delete, exists, get, holds, put

__all__ = ["Balanced", "Change"]

_TRIES = 20

Change = tuple[Service | None, Service | None]
"""How a service was, and is to be; None where there is none. Twice the same: nothing is to be done."""


class Balanced:
    """The services of the cluster."""

    def __init__(self, store: Store, cluster: Cluster) -> None:
        self._store = store
        self._cluster = cluster

    @property
    def node_name(self) -> str:
        """This node's name."""
        return self._cluster.node.name

    async def commit(self, plan: Callable[[Transaction], Change]) -> Change:
        """Make a change on every node, and return it; this one has it then.

        `plan` runs several times, and all that it writes is taken back: what there is in the end is what etcd has.

        Raises:
            Unavailable: etcd does not answer, or this node is not in the cluster.
        """
        for _ in range(_TRIES):
            await self._cluster.ready()
            old, new = await rehearse(self._store, plan)
            if old == new:
                return old, new
            result = await self._cluster.ask(self._transact(old, new))
            await self._cluster.caught_up(result.revision)
            if result.succeeded or (new and result.shows(_shared(new))):
                return old, new
        raise Unavailable("others change services at the same time", hint="try again")

    async def _transact(self, old: Service | None, new: Service | None) -> TxnResult:
        """Try a change; it does not succeed when others were faster."""
        service = new or old
        assert service
        key, mine = f"{SERVICES}{service.spec.network_id}/{service.id}", service.id.encode()
        held, wanted = _claims(old), _claims(new)
        conditions = [holds(key, _shared(old)) if old else absent(key), *(absent(each) for each in wanted - held)]
        if new:
            conditions += [exists(member_key(self._cluster.node.id)), exists(f"{NETWORKS}{service.spec.network_id}")]
        if not old:
            conditions.append(absent(RECOVERING))
        then = [*(delete(each) for each in held - wanted), *(put(each, mine) for each in wanted - held)]
        then.append(put(key, _shared(new)) if new else delete(key))
        if len(then) > OPERATIONS:
            changed = f"{len(held ^ wanted)} ports that change"
            raise InvalidArgument(
                "spec.ports", changed, f"at most {OPERATIONS - 1} at once: first some, then the others"
            )
        result = await self._cluster.etcd.transact(conditions, then, [get(key), get(RECOVERING)])
        if not result.succeeded and not old and result.found[1]:
            raise claims.recovers()
        return result


def _shared(service: Service) -> bytes:
    return encode(replace(service, revision=0))


def _claims(service: Service | None) -> set[str]:
    if service is None:
        return set()
    addresses = {f"{CLAIMS}addresses/{service.spec.network_id}/{each}" for each in service.addresses}
    ports = {f"{CLAIMS}ports/{each.protocol}/{each.published_port}" for each in service.spec.ports}
    return addresses | ports | {f"{CLAIMS}names/services/{service.name}"}
