"""Scenarios of the client of etcd, run on the wire by `Etcd3.worker`: python etcd_worker.py SCENARIO JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from netstore.errors import Conflict, NetstoreError, Unavailable
from netstore.model import Node
from netstore.networks.cluster import claims
from netstore.networks.cluster.members import Members
from netstore.networks.cluster.records import CLAIMS, ENDPOINTS, NETWORKS, NODES, EndpointRecord
from netstore.store import etcd
from netstore.store.etcd import Changes, Etcd, Snapshot

PREFIX = f"/worker/{os.getpid()}/"


class Lab:
    """What the test gave: clients, and members to kill."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.endpoints: list[str] = given["endpoints"]
        self.leader: int = given["leader"]
        self._pids: list[int] = given["pids"]
        self._certificates: str = given["certificates"]

    def client(self, endpoints: list[str] | None = None, cert: str = "node") -> Etcd:
        place = self._certificates
        files = {"ca": f"{place}/ca.pem", "cert": f"{place}/{cert}.pem", "key": f"{place}/{cert}.key"}
        return Etcd(endpoints or self.endpoints, **files)

    def kill(self, *indexes: int) -> None:
        for index in indexes:
            os.kill(self._pids[index], signal.SIGKILL)


async def transactions(lab: Lab) -> None:
    """Create-if-absent has one winner, a loser learns the holder; values compare; prefixes go at once."""
    client = lab.client()
    key = PREFIX + "addresses/net/10.0.0.2"
    tries = [client.transact([etcd.absent(key)], [etcd.put(key, b"%d" % i)], [etcd.get(key)]) for i in range(20)]
    results = await asyncio.gather(*tries)
    winners = [index for index, result in enumerate(results) if result.succeeded]
    assert len(winners) == 1
    assert {result.found[0][0].value for result in results if not result.succeeded} == {b"%d" % winners[0]}
    held = await client.read(key)
    assert held is not None
    assert not (await client.transact([etcd.unchanged(key, held.revision - 1)], [etcd.delete(key)])).succeeded
    assert (await client.transact([etcd.holds(key, held.value)], [etcd.put(key, b"mine")])).succeeded
    for start in range(0, 5000, 100):
        await client.transact([], [etcd.put(f"{PREFIX}many/{start + i:05}", b"x" * 50) for i in range(100)])
    found = await client.snapshot(PREFIX + "many/")
    assert [item.key for item in found.items] == [f"{PREFIX}many/{number:05}" for number in range(5000)]
    await client.transact([], [etcd.delete_below(PREFIX)])
    assert not (await client.snapshot(PREFIX)).items
    await client.close()


async def _until(condition: Callable[[], bool]) -> None:
    """Wait for a condition for at most ten seconds; the caller asserts."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)


async def _collect(source: AsyncIterator[Snapshot | Changes], seen: list[int], snapshots: list[int]) -> None:
    async for each in source:
        if isinstance(each, Snapshot):
            snapshots.append(each.revision)
            seen += [int(item.value) for item in each.items]
        else:
            seen += [int(item.value) for put, item in each.events if put]


async def watch_survives_members(lab: Lab) -> None:
    """Every change is seen once and in order while the leader, and the member that the watch is at, is killed."""
    watcher, writer = lab.client(lab.endpoints[lab.leader :] + lab.endpoints[: lab.leader]), lab.client()
    seen: list[int] = []
    snapshots: list[int] = []
    watching = asyncio.create_task(_collect(watcher.follow(PREFIX), seen, snapshots))
    longest = 0.0
    for number in range(300):
        if number == 100:
            lab.kill(lab.leader)
        before = time.monotonic()
        await writer.transact([], [etcd.put(f"{PREFIX}{number}", b"%d" % number)])
        longest = max(longest, time.monotonic() - before)
        await asyncio.sleep(0.005)
    await _until(lambda: set(seen) >= set(range(300)))
    watching.cancel()
    unique = list(dict.fromkeys(seen))
    assert unique == list(range(300)), sorted(set(range(300)) - set(seen))
    assert len(snapshots) == 1, "a member that went costs no new listing"
    assert longest < 4.0, longest
    print(f"longest write over the leader's end: {longest:.2f} s")


async def _compact(client: Etcd, revision: int) -> None:
    compact = client._channel().unary_unary(
        "/etcdserverpb.KV/Compact",
        request_serializer=etcd.pb.LeaseGrantRequest.SerializeToString,  # field 1 is the revision
        response_deserializer=etcd.pb.PutResponse.FromString,
    )
    await compact(etcd.pb.LeaseGrantRequest(TTL=revision))


async def compaction_between_pages(lab: Lab) -> None:
    """A listing whose revision is compacted before its last page begins anew, and says so when it never gets there."""
    client, keys = lab.client(), [f"{PREFIX}pages/{number}" for number in range(5)]
    await client.transact([], [etcd.put(key, b"1") for key in keys])
    etcd._PAGE = 2  # type: ignore[misc]
    ranged, pages, spoiled = client._range, list[int](), 1

    async def compacted(request: Any, doing: str) -> Any:
        answer = await ranged(request, doing)
        pages.append(request.revision)
        if request.revision == 0 and pages.count(0) <= spoiled:
            now = await client.transact([], [etcd.put(keys[-1], b"2")])
            await _compact(client, now.revision)
        return answer

    client._range = compacted  # type: ignore[method-assign]
    found = await client.snapshot(PREFIX + "pages/")
    assert [item.key for item in found.items] == keys
    assert found.items[-1].value == b"2", "it is all of one revision, the later one"
    assert pages.count(0) == 2
    pages, spoiled = [], 1000
    with contextlib.suppress(Unavailable):
        await client.snapshot(PREFIX + "pages/")
        raise AssertionError("what was compacted was listed")
    await client.close()


async def removal(lab: Lab) -> None:
    """A node is removed while it still gives back an address, which another has at once; and while it starts again."""
    client, network = lab.client(), "5e" * 32
    members = Members(client, Path(__file__))
    nodes = [Node(id=letter * 64, name=letter, address=f"192.0.2.{ord(letter)}", version="") for letter in "ab"]
    for node in nodes:
        await members.register(node, await client.grant(60))
    await client.transact([], [etcd.put(f"{NETWORKS}{network}", b"{}")])

    def record(node: Node, address: str) -> EndpointRecord:
        return EndpointRecord(
            id=f"{node.name}{address[-1]}" * 32, network_id=network, node_id=node.id, vtep=node.address,
            mac=f"02:00:00:00:00:0{address[-1]}", addresses=(address,),
        )  # fmt: skip

    moved, kept, got = record(nodes[0], "10.0.0.2"), record(nodes[0], "10.0.0.3"), record(nodes[1], "10.0.0.2")
    assert not await claims.hold(client, moved, new=True)
    assert not await claims.hold(client, kept, new=True)
    listed = client.snapshot

    async def moves(prefix: str) -> Snapshot:
        found = await listed(prefix)
        if prefix == ENDPOINTS:
            await claims.release(client, moved)
            assert not await claims.hold(client, got, new=True)
        return found

    client.snapshot = moves  # type: ignore[method-assign]
    await members.remove(nodes[0], force=True)
    for key in (*got.claims, claims.key_of(got)):
        assert await client.read(key), f"{key} is another node's"
    for key in (*(each for each in kept.claims), claims.key_of(kept), f"{NODES}{nodes[0].id}"):
        assert await client.read(key) is None, key

    async def joins(prefix: str) -> Snapshot:
        found = await listed(prefix)
        if prefix == ENDPOINTS:
            await Members(client, Path(__file__)).register(nodes[1], await client.grant(60))
        return found

    client.snapshot = joins  # type: ignore[method-assign]
    with contextlib.suppress(Conflict):
        await members.remove(nodes[1], force=True)
        raise AssertionError("a node that is back was removed")
    for key in (*got.claims, claims.key_of(got), f"{NODES}{nodes[1].id}", f"{CLAIMS}names/nodes/b"):
        assert await client.read(key), f"{key} of a node that is back"
    client.snapshot = listed  # type: ignore[method-assign]
    await members.remove(nodes[1], force=True)
    await client.transact([], [etcd.delete(f"{NETWORKS}{network}")])
    assert not [item for item in (await listed(ENDPOINTS)).items if network in item.key]
    await client.close()


async def compaction(lab: Lab) -> None:
    """A watch that starts before the history is told so; `follow` lists anew by itself."""
    client = lab.client()
    for number in range(20):
        last = await client.transact([], [etcd.put(PREFIX + "a", b"%d" % number)])
    await _compact(client, last.revision)
    try:
        async for _ in client.watch(PREFIX, last.revision - 10):
            raise AssertionError("history that is gone was shown")
    except etcd.Compacted:
        pass
    snapshots: list[int] = []
    original, calls = client.watch, []

    def behind(prefix: str, revision: int) -> AsyncIterator[Changes]:
        calls.append(revision)
        return original(prefix, revision if len(calls) > 1 else last.revision - 10)

    client.watch = behind  # type: ignore[method-assign]
    seen: list[int] = []
    watching = asyncio.create_task(_collect(client.follow(PREFIX), seen, snapshots))
    await _until(lambda: len(snapshots) == 2)
    await client.transact([], [etcd.put(PREFIX + "a", b"77")])
    await _until(lambda: 77 in seen)
    watching.cancel()
    assert (len(snapshots), seen[-1]) == (2, 77)
    await client.close()


async def leases(lab: Lab) -> None:
    """A key goes with its lease, at its end or when it is revoked; one that is kept alive stays, over a leader's end."""
    client = lab.client()
    kept, left, ended = [await client.grant(2) for _ in range(3)]
    puts = [etcd.put(PREFIX + name, b"", lease) for name, lease in (("kept", kept), ("left", left), ("ended", ended))]
    await client.transact([], puts)
    await client.revoke(ended)
    await client.revoke(ended)
    assert await client.read(PREFIX + "ended") is None
    lab.kill(lab.leader)
    end = time.monotonic() + 12
    while await client.read(PREFIX + "left") and time.monotonic() < end:
        assert await client.keep_alive(kept)
        await asyncio.sleep(0.3)
    assert await client.read(PREFIX + "left") is None
    assert await client.read(PREFIX + "kept") is not None
    assert not await client.keep_alive(left)


async def without_a_majority(lab: Lab) -> None:
    """With one member of three left every call says UNAVAILABLE in time; with none at once; a watch ends."""
    client = lab.client()
    await client.transact([], [etcd.put(PREFIX + "a", b"1")])
    lab.kill(*(index for index in range(3) if index != 0))
    began = time.monotonic()
    with contextlib.suppress(Unavailable):
        await client.transact([], [etcd.put(PREFIX + "a", b"2")])
        raise AssertionError("a minority wrote")
    assert time.monotonic() - began < 6
    lab.kill(0)
    for _ in range(2):
        began = time.monotonic()
        try:
            await client.read(PREFIX + "a")
            raise AssertionError("nobody answered")
        except Unavailable as error:
            assert error.reason == "CLUSTER_UNAVAILABLE"
            assert "198.51.100.21:2379" in error.hint
    assert time.monotonic() - began < 2, "refused connections are not waited for"
    try:
        async for _ in client.watch(PREFIX, 1):
            pass
    except Unavailable:
        pass


async def strangers(lab: Lab) -> None:
    """Without a certificate of the authority nobody is heard, and a file that is missing is named."""
    with contextlib.suppress(NetstoreError):
        lab.client(cert="nobody")
        raise AssertionError("a file that is missing was read")
    stranger = Etcd(lab.endpoints, **{key: f"{lab._certificates}/{name}" for key, name in
                                      (("ca", "ca.pem"), ("cert", "stranger.pem"), ("key", "stranger.key"))})  # fmt: skip
    try:
        await stranger.read(PREFIX)
        raise AssertionError("a stranger was heard")
    except Unavailable:
        pass


if __name__ == "__main__":
    asyncio.run(globals()[sys.argv[1]](Lab(json.loads(sys.argv[2]))))
