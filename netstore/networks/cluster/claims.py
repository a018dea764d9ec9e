"""Holding names, addresses, MACs and numbers: create-if-absent transactions, which may be repeated.

A key that is held says in its value who holds it. So a transaction whose answer was lost, and which is made again,
finds that it succeeded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from netstore.errors import NotFound, Unavailable
from netstore.networks.cluster.members import member_key
from netstore.networks.cluster.records import (
    ALIVE,
    ENDPOINTS,
    HOSTS,
    NETWORKS,
    RECOVERING,
    EndpointRecord,
    decode_endpoint,
    encode,
)
from netstore.store.etcd import Etcd, absent, delete, exists, get, holds, put, unchanged

__all__ = ["RECOVERY_SECONDS", "Recovering", "hold", "key_of", "recovers", "release", "take_over"]

_TRIES = 20
RECOVERY_SECONDS = 10
"""Enough for every node to notice, and to put back what it holds."""


def key_of(record: EndpointRecord, *, host: bool = False) -> str:
    """Return the key of an endpoint's record, or of a node's own addresses on a network."""
    return f"{HOSTS}{record.network_id}/{record.node_id}" if host else f"{ENDPOINTS}{record.network_id}/{record.id}"


async def hold(etcd: Etcd, record: EndpointRecord, *, host: bool = False, new: bool = False) -> dict[str, str]:
    """Hold all that a record claims, and publish it; what is so already costs no write. What is `new` waits until
    every node has put back what it holds, when etcd has lost it; until then nothing is taken for another's, either: a
    backup knows holders that are no more.

    Returns:
        Keys that others hold, and their endpoint ids; {} when all of it is held now, else nothing was changed.

    Raises:
        NotFound: the network was removed.
        Unavailable: etcd does not answer, or the node was removed.
        Recovering: what another has may be what a backup knows.
    """
    key, value, mine = key_of(record, host=host), encode(record), record.id.encode()
    needed = [member_key(record.node_id), f"{NETWORKS}{record.network_id}"]
    looks = [RECOVERING, *needed, key, *record.claims]
    held: set[str] = set()
    stale: list[str] = []  # what it claims no more
    published = not new  # what is new is not there yet: one question less
    for _ in range(_TRIES):
        conditions = [holds(claim, mine) if claim in held else absent(claim) for claim in record.claims]
        questions = [get(each) for each in (*looks, *stale)]
        if published:
            same = [holds(key, value), *(holds(claim, mine) for claim in record.claims)]
            result = await etcd.transact(same, [], questions)
        else:
            conditions += [*(exists(each) for each in needed), *([absent(RECOVERING)] if new else [])]
            conditions += [holds(claim, mine) for claim in stale]
            then = [put(key, value), *(put(claim, mine) for claim in record.claims if claim not in held)]
            result = await etcd.transact(conditions, [*then, *(delete(claim) for claim in stale)], questions)
        published = False
        if result.succeeded:
            return {}
        found = {each[0].key: each[0].value for each in result.found if each}
        others = {claim: found[claim].decode() for claim in record.claims if found.get(claim, mine) != mine}
        _refuse_absent(record, found, needed, new=new or bool(others))
        if others:
            return others
        held = {claim for claim in record.claims if claim in found}
        if key in found:  # of what it claims no more others may have some by now, which the next look tells
            left = set(decode_endpoint(found[key]).claims) - set(record.claims)
            stale = sorted(claim for claim in left if claim not in stale or found.get(claim) == mine)
    raise Unavailable(f"endpoint {record.name or record.id[:12]}: others change the cluster at the same time")


def _refuse_absent(record: EndpointRecord, found: Mapping[str, bytes], needed: Sequence[str], *, new: bool) -> None:
    member, network = needed
    if RECOVERING in found and (new or network not in found):
        raise recovers()
    if member not in found:
        raise Unavailable(
            "the cluster does not know this node", hint="was it removed? `netstore system info` says how it stands",
            reason="CLUSTER_UNAVAILABLE",
        )  # fmt: skip
    if network not in found:
        raise NotFound("network", record.network_id[:12], hint="it was removed from the cluster meanwhile")


class Recovering(Unavailable):
    """Nodes put back what etcd has lost."""


def recovers() -> Recovering:
    """Return what is said meanwhile."""
    return Recovering(
        "etcd has lost what it knew (a backup was restored?), and the nodes put it back", reason="CLUSTER_RECOVERING",
        hint=f"try again in {RECOVERY_SECONDS} s",
    )  # fmt: skip


async def release(etcd: Etcd, record: EndpointRecord, *, host: bool = False) -> None:
    """Give back what a record claims, as far as it is its own, and take the record away: all of it at once, so that a
    `hold` which is still under way (its caller gave up) leaves both or none. A record that comes so is a stray.

    Raises:
        Unavailable: etcd does not answer.
    """
    key, mine = key_of(record, host=host), record.id.encode()
    for _ in range(_TRIES):
        present = await etcd.read(key)
        wanted = sorted({*record.claims, *(decode_endpoint(present.value).claims if present else ())})
        found = [next(iter(items), None) for items in (await etcd.transact([], [get(each) for each in wanted])).found]
        seen = [(key, present), *zip(wanted, found, strict=True)]
        conditions = [unchanged(each, there.revision if there else 0) for each, there in seen]
        held = [there.key for there in found if there and there.value == mine]
        if (await etcd.transact(conditions, [delete(each) for each in (key, *held)])).succeeded:
            return
    raise Unavailable(f"endpoint {record.name or record.id[:12]}: others change the cluster at the same time")


async def take_over(etcd: Etcd, claim: str, holder: str, node_id: str) -> bool:
    """Free what an endpoint of a node holds that is lost: False when the node is up, or another has it."""
    held = [holds(claim, holder.encode()), absent(f"{ALIVE}{node_id}")]
    return (await etcd.transact(held, [delete(claim)])).succeeded
