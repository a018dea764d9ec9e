"""What nodes hold in etcd, when answers are lost: nothing is left behind, and nobody is robbed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from netstore.config import ClusterConfig
from netstore.errors import Conflict, InvalidArgument, Unavailable
from netstore.model import (
    Address,
    Endpoint,
    EndpointSpec,
    Network,
    NetworkSpec,
    Node,
    Pool,
    PortMapping,
    Sandbox,
)
from netstore.networks import ipam, planning
from netstore.networks.cluster import claims
from netstore.networks.cluster.cluster import Cluster, State
from netstore.networks.cluster.members import Members, member_key
from netstore.networks.cluster.publication import Publication
from netstore.networks.cluster.records import ENDPOINTS, NETWORKS, NODES, PORTS, EndpointRecord, encode
from netstore.networks.cluster.spanning import Spanning
from netstore.networks.context import KeyedLocks
from netstore.store import Store, Transaction
from netstore.store.etcd import Compare, KeyValue, Op, Snapshot, TxnResult

RECORD = EndpointRecord(
    id="e" * 64, network_id="net", node_id="node", vtep="198.51.100.1", mac="02:00:00:00:00:02",
    addresses=("10.0.0.2",), ports=(PortMapping(container_port=80, host_port=8080, mesh=True),),
)  # fmt: skip
OTHER = "f" * 64


class Memory:
    """The store of a cluster as our client shows it, in this process; `before` is called ahead of every request."""

    def __init__(self) -> None:
        self.keys: dict[str, tuple[bytes, int]] = {member_key("node"): (b"", 1), f"{NETWORKS}net": (b"", 1)}
        self.revision, self.requests = 1, 0
        self.before: Callable[[int], Any] = lambda number: None

    async def _begin(self) -> None:
        self.requests += 1
        done = self.before(self.requests)
        if asyncio.iscoroutine(done):
            await done

    async def read(self, key: str) -> KeyValue | None:
        await self._begin()
        return self._get(key)

    def _get(self, key: str) -> KeyValue | None:
        return KeyValue(key, *self.keys[key]) if key in self.keys else None

    async def snapshot(self, prefix: str) -> Snapshot:
        await self._begin()
        return Snapshot(self.revision, [KeyValue(k, *v) for k, v in self.keys.items() if k.startswith(prefix)])

    def _holds(self, each: Any) -> bool:
        found = self._get(each.key.decode())
        if each.target == Compare.VALUE:
            return found is not None and found.value == each.value
        if each.target == Compare.MOD:
            return (found.revision if found else 0) == each.mod_revision
        return (found is not None) == (each.target == Compare.VERSION)

    async def transact(self, conditions: Sequence[Any], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        await self._begin()
        succeeded = all(map(self._holds, conditions))
        self.revision += 1
        found = []
        for op in then if succeeded else otherwise:
            if op.HasField("request_range"):
                there = self._get(op.request_range.key.decode())
                found.append([there] if there else [])
            elif op.HasField("request_put"):
                self.keys[op.request_put.key.decode()] = op.request_put.value, self.revision
            else:
                self.keys.pop(op.request_delete_range.key.decode(), None)
        return TxnResult(succeeded, self.revision, found)

    def held(self) -> set[str]:
        return self.keys.keys() - {member_key("node"), f"{NETWORKS}net"}


@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
async def test_what_arrives_late_leaves_no_claim_without_a_record(step: int, already: bool) -> None:
    """The caller was told UNAVAILABLE, and gives back; what it had asked for happens before any step of that."""
    memory, late = Memory(), Memory()
    late.keys = memory.keys

    async def arrive(number: int) -> None:
        if number == step:
            late.revision = memory.revision + 100
            await claims.hold(late, RECORD, new=True)
            memory.revision = late.revision

    if already:
        await claims.hold(memory, RECORD, new=True)
        memory.requests = 0
    memory.before = arrive
    await claims.release(memory, RECORD)
    if memory.requests < step:
        await arrive(step)
    if f"{ENDPOINTS}net/{RECORD.id}" in memory.keys:  # the watch shows it: a stray
        await claims.release(memory, RECORD)
    assert memory.held() == set()


async def test_a_removed_nodes_port_stays_with_who_took_it_over(tmp_path: Path) -> None:
    memory = Memory()
    await claims.hold(memory, RECORD, new=True)
    key = f"{PORTS}tcp/8080"
    assert await claims.take_over(memory, key, RECORD.id, "node")
    await memory.transact([], [Op(request_put={"key": key.encode(), "value": OTHER.encode()})])
    await Members(memory, tmp_path).remove(Node(id="node", name="n", address="198.51.100.1"), force=True)
    assert memory.keys[key][0] == OTHER.encode()
    assert not [each for each in memory.keys if RECORD.id in each or "addresses" in each]


async def add(store: Store) -> tuple[Endpoint, Sandbox]:
    """Write the rows of an endpoint whose attachment was committed here, and not yet claimed."""
    pool = Pool(subnet="10.0.0.0/29", gateway="10.0.0.1")
    network = Network(id="net", name="app", spec=NetworkSpec(driver="overlay"), pools=(pool,))
    sandbox = Sandbox(id="s", path="/run/netns/a", inode=7)
    endpoint = Endpoint(
        id=RECORD.id, network_id="net", sandbox_id="s", spec=EndpointSpec(), mac_address=RECORD.mac, attached=True,
        addresses=(Address(address="10.0.0.2", prefix=29),),
    )  # fmt: skip

    def write(tx: Transaction) -> None:
        tx.networks.insert(network)
        tx.execute("INSERT INTO global_networks VALUES ('net', 4096)")
        tx.sandboxes.insert(sandbox)
        tx.endpoints.insert(endpoint)

    await store.write(write)
    return endpoint, sandbox


async def test_nobody_is_evicted_before_it_is_answered(tmp_path: Path) -> None:
    """Another node has the address: an attachment that is under way asks for another one by itself."""
    store, memory, locks = Store(tmp_path / "netstore.db"), Memory(), KeyedLocks()
    cluster = SimpleNamespace(etcd=memory, state=State.JOINED, node=Node(id="node", name="n", address="198.51.100.1"))
    publication, evicted = Publication(store, cluster, locks), list[str]()

    async def evict(endpoint_id: str) -> None:
        evicted.append(endpoint_id)

    publication.evict = evict
    endpoint, sandbox = await add(store)
    moved = replace(endpoint, addresses=(Address(address="10.0.0.3", prefix=29),))
    first, second = RECORD.claims[0], f"{RECORD.claims[0][:-1]}3"
    memory.keys[first] = OTHER.encode(), 1
    async with locks.hold(sandbox.key):
        await publication.tell(endpoint.id)
    assert evicted == []

    looks = memory.requests

    def move(number: int) -> Any:
        return store.write(lambda tx: tx.endpoints.update(moved)) if number == looks + 1 else None

    memory.before = move  # it is answered just now, with another address
    await publication.tell(endpoint.id)
    assert evicted == []
    assert memory.keys[second][0] == endpoint.id.encode()

    memory.keys[second] = OTHER.encode(), memory.revision
    await store.write(lambda tx: tx.endpoints.update(moved))
    await publication.tell(endpoint.id)
    assert evicted == [endpoint.id]
    await store.close()


async def test_the_nodes_own_address_is_given_back_when_etcd_does_not_answer(tmp_path: Path) -> None:
    store, memory = Store(tmp_path / "netstore.db"), Memory()
    await add(store)
    network = await store.read(lambda tx: tx.networks.require("net"))

    async def ready() -> None:
        return

    async def ask(question: Any) -> Any:
        return await question

    def fail(number: int) -> None:
        if number > 1:  # the first looks what there is
            raise Unavailable("etcd does not answer")

    async def apply(work: Any) -> Any:
        return SimpleNamespace(mtu=1500)

    node = Node(id="node", name="n", address="198.51.100.1")
    cluster = SimpleNamespace(etcd=memory, node=node, ready=ready, ask=ask)
    spanning = Spanning(SimpleNamespace(store=store, apply=apply), cluster, SimpleNamespace())
    memory.before = fail
    for _ in range(10):  # more often than there are addresses
        memory.requests = 0
        with pytest.raises(Unavailable):
            await spanning._take_addresses(SimpleNamespace(), network)
    assert await store.read(lambda tx: tx.rows("SELECT * FROM addresses WHERE endpoint_id IS NULL")) == []
    await store.close()


def _cluster(memory: Memory) -> Any:
    async def ready() -> None:
        return

    async def ask(question: Any) -> Any:
        return await question

    node = Node(id="node", name="n", address="198.51.100.1")
    return SimpleNamespace(etcd=memory, state=State.JOINED, node=node, ready=ready, ask=ask)


_UNOWNED = "SELECT count(*) FROM addresses WHERE endpoint_id IS NULL"


async def test_an_address_that_another_had_for_a_moment_is_given_again(tmp_path: Path) -> None:
    """Its holder may go before its row comes here: nothing would take a note of it away."""
    store, memory = Store(tmp_path / "netstore.db"), Memory()
    endpoint, _ = await add(store)
    network = await store.read(lambda tx: tx.networks.require("net"))
    pools = tuple(Pool(subnet=each, gateway="") for each in ("10.0.0.0/29", "fd00::/64"))
    network = replace(network, pools=pools)

    def both(tx: Transaction) -> None:
        tx.networks.update(network)
        for pool in pools:
            ipam.reserve_pool(tx, network, pool)

    await store.write(both)
    publication = Publication(store, _cluster(memory), KeyedLocks())
    for number in (2, 3):
        memory.keys[f"{RECORD.claims[0][:-1]}{number}"] = OTHER.encode(), 1
    before = await store.read(lambda tx: tx.rows(_UNOWNED))
    claimed = await publication.claim(endpoint, network)
    assert not {each.address for each in claimed.addresses} & {"10.0.0.2", "10.0.0.3"}
    assert await store.read(lambda tx: tx.rows(_UNOWNED)) == before

    async def apply(work: Any) -> Any:
        return SimpleNamespace(mtu=1500)

    spanning = Spanning(SimpleNamespace(store=store, apply=apply), _cluster(memory), SimpleNamespace())
    for number in range(1, 7):
        key = f"{RECORD.claims[0][:-1]}{number}"
        if memory.keys.get(key, (b"",))[0] != RECORD.id.encode() and number != 6:
            memory.keys[key] = OTHER.encode(), 1
    taken = await spanning._take_addresses(SimpleNamespace(validate=lambda network: network), network)
    now = await store.read(lambda tx: tx.rows(_UNOWNED))
    assert now == [(before[0][0] + len(taken.host_addresses),)]
    await store.close()


async def test_only_etcd_that_does_not_answer_sends_a_node_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "netstore.db")
    monkeypatch.setattr("netstore.networks.cluster.cluster.Etcd", lambda *_, **__: SimpleNamespace())
    config = ClusterConfig(endpoints=[], name="n", advertise="198.51.100.1", ca="", cert="", key="")
    cluster = Cluster(config, store, "node", lambda network: network)
    await cluster._set(State.JOINED, "")

    async def fail(reason: str) -> None:
        raise Unavailable("others change it at the same time", reason=reason)

    with pytest.raises(Unavailable):
        await cluster.ask(fail(""))
    await cluster.ready()
    with pytest.raises(Unavailable):
        await cluster.ask(fail("CLUSTER_UNAVAILABLE"))
    assert cluster.state is State.AWAY
    await store.close()


async def test_who_changed_a_node_himself_is_in_no_conflict(tmp_path: Path) -> None:
    """The answer was lost: the same transaction is made again, and finds what it did."""
    memory, node = Memory(), Node(id="node", name="n", address="198.51.100.1")
    memory.keys[f"{NODES}node"] = encode(node), 1
    once = memory.transact

    async def twice(*of: Any) -> TxnResult:
        await once(*of)
        return await once(*of)

    memory.transact = twice  # type: ignore[method-assign]
    changed = await Members(memory, tmp_path).drain(node, "1", drained=True)
    assert changed.drained
    assert str(changed.revision) == str(memory.keys[f"{NODES}node"][1])
    with pytest.raises(Conflict):
        await Members(memory, tmp_path).drain(node, "1", drained=False)


async def test_more_ports_of_every_node_than_etcd_takes_at_once_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "netstore.db")
    endpoint, _ = await add(store)
    await store.write(lambda tx: tx.networks.update(replace(tx.networks.require("net"), vni=4096)))
    ports = [PortMapping(container_port=80, host_port=41000 + each, mesh=True) for each in range(125)]
    with pytest.raises(InvalidArgument, match="125 ports"):
        await store.write(lambda tx: planning.publish(tx, endpoint.id, ports))
    await store.write(lambda tx: planning.publish(tx, endpoint.id, ports[:60]))
    with pytest.raises(InvalidArgument, match="61 ports"):
        await store.write(lambda tx: planning.publish(tx, endpoint.id, ports[60:61]))
    await store.close()
