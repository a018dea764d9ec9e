"""Nodes of a cluster without kernels, many in one process: netstore's own session with etcd, each with its own store.

Real are lease, registration, snapshot, watch and claims (netstore/networks/cluster, netstore/store/etcd.py), and the
picture in SQLite. What the driver would be told is counted, and timed; nothing is programmed. Reads commands from
standard input and answers each, a line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from netstore.config import ClusterConfig
from netstore.errors import NetstoreError
from netstore.model import BRIDGE_PREFIX, Network, kernel_name, new_id, stable_mac
from netstore.networks.cluster import claims, cluster
from netstore.networks.cluster.cache import Effect
from netstore.networks.cluster.cluster import Cluster, State, Work
from netstore.networks.cluster.records import ENDPOINTS, HOSTS, EndpointRecord, encode
from netstore.store import Store
from netstore.store.etcd import Etcd, Op, put

AT_ONCE = 40  # records in a transaction, each with its claims: etcd's limit is 128 operations
LEASE_SECONDS = 30  # not 9: so many nodes share one process, and what keeps it from running
LOADING = 3  # nodes of a process that load at the same time
LOSSES = "SELECT count(*) FROM events WHERE kind = 'node' AND action = 'down'"
SENT = "sent"  # label with CLOCK_MONOTONIC of when its claim began


async def for_ever() -> None:
    await asyncio.Event().wait()


@dataclass(eq=False)
class Simulated:
    """One node."""

    cluster: Cluster
    sessions: int = 0
    seconds: float = 0.0
    joined: asyncio.Event = field(default_factory=asyncio.Event)
    told: list[float] = field(default_factory=list)
    """How long after their claims began endpoints were known here, committed."""

    def start(self) -> None:
        self.cluster.start(Work(self.follow, self.nothing, self.publish, for_ever, self.nothing, self.nothing))

    async def nothing(self, *_: object) -> None:
        pass

    async def publish(self) -> None:
        self.sessions += 1
        self.joined.set()
        await for_ever()

    async def follow(self, effect: Effect) -> None:
        now = time.monotonic()
        for endpoints in effect.add.values():
            self.told += [now - float(each.labels[SENT]) for each in endpoints if SENT in each.labels]

    async def join(self, gate: asyncio.Semaphore) -> None:
        async with gate:
            began = time.monotonic()
            self.start()
            await self.joined.wait()
            self.seconds = time.monotonic() - began


def localise(network: Network) -> Network:
    """Return a network as the driver would have it here, as far as rows go."""
    return replace(network, interface=kernel_name(BRIDGE_PREFIX, network.id), mtu=1450)


class Process:
    """The nodes of this process. `first` is the number of the first, of all processes' nodes."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given, self.networks = given, given["networks"]
        self.numbers = range(given["first"], given["first"] + given["nodes"])
        files = {name: f"{given['certificates']}/{file}"
                 for name, file in (("ca", "ca.pem"), ("cert", "node.pem"), ("key", "node.key"))}  # fmt: skip
        self.etcd = Etcd(given["endpoints"], **files)
        self.nodes = []
        for number in self.numbers:
            config = ClusterConfig(
                endpoints=given["endpoints"], **files, advertise=self.vtep(number), name=f"s{number}"
            )
            store = Store(Path(given["place"]) / f"{number}.db")
            self.nodes.append(Simulated(Cluster(config, store, self.node_id(number), localise)))
        self.made: list[EndpointRecord] = []
        self.count = self.lease = 0

    def vtep(self, number: int) -> str:
        return f"192.0.{number // 250}.{number % 250 + 1}"

    def node_id(self, number: int) -> str:
        return f"{number + 1:04x}" * 16

    def record(self, number: int, serial: int, labels: dict[str, str] | None = None) -> EndpointRecord:
        """Return the endpoint of a serial number, which is unique among all processes; its network follows from it."""
        network = serial % len(self.networks)
        host = serial // len(self.networks) + 1000
        return EndpointRecord(
            id=new_id(), network_id=self.networks[network], node_id=self.node_id(number), vtep=self.vtep(number),
            name=f"e{serial}", names=(f"e{serial}",), mac=stable_mac(f"endpoint {serial}"), labels=labels or {},
            addresses=(f"10.{100 + network}.{host // 256}.{host % 256}",),
        )  # fmt: skip

    async def fill(self) -> dict[str, object]:
        """Write what the nodes have, as if all had been there before: a node that comes up concerns all of its endpoints."""
        self.lease = await self.etcd.grant(LEASE_SECONDS * 60)
        for node in self.nodes:
            await node.cluster.members.register(node.cluster.node, self.lease)
        records = [self.record(number, number * self.given["each"] + index)
                   for number in self.numbers for index in range(self.given["each"])]  # fmt: skip
        for start in range(0, len(records), AT_ONCE):
            await self.etcd.transact([], [op for each in records[start : start + AT_ONCE] for op in _puts(each)])
        for number in self.numbers:
            own = [replace(self.record(number, index), id=network[:32] + self.node_id(number)[:32], names=(), name="",
                           mac=stable_mac(f"host {number} {index}"), addresses=(f"10.{100 + index}.0.{number + 10}",))
                   for index, network in enumerate(self.networks)]  # fmt: skip
            await self.etcd.transact([], [op for each in own for op in _puts(each, host=True)])
        return {"records": len(records)}

    async def join(self) -> dict[str, object]:
        """Let all join, a few at a time: on machines of their own they would not take each other's time."""
        gate, began = asyncio.Semaphore(LOADING), time.process_time()
        await asyncio.gather(*(node.join(gate) for node in self.nodes))
        await self.etcd.revoke(self.lease)  # each has one of its own now
        return {"cpu": time.process_time() - began, "seconds": [node.seconds for node in self.nodes]}

    async def churn(self) -> dict[str, object]:
        """Attach and detach in turn, so many a second, on any node."""
        rate, seconds, began = self.given["rate"], self.given["seconds"], time.process_time()
        for node in self.nodes:
            node.told.clear()
        macs: dict[str, float] = {}
        claimed: list[float] = []
        failures: list[str] = []

        async def attach() -> None:
            number = random.choice(self.numbers)
            self.count += 1
            serial = 40_000 * len(self.networks) + self.count * self.given["processes"] + self.given["process"]
            sent = time.monotonic()
            record = self.record(number, serial, {SENT: repr(sent)})
            etcd = self.nodes[number - self.numbers.start].cluster.etcd
            if await claims.hold(etcd, record, new=True):
                raise NetstoreError(f"{record.addresses} is taken")
            claimed.append(time.monotonic() - sent)
            macs[record.mac] = sent
            self.made.append(record)

        async def event(index: int) -> None:
            try:
                if index % 2 and self.made:
                    record = self.made.pop(0)
                    await claims.release(self.nodes[0].cluster.etcd, record)
                else:
                    await attach()
            except NetstoreError as error:
                failures.append(str(error))

        start, tasks = time.monotonic(), []
        for index in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, start + index / rate - time.monotonic()))
            tasks.append(asyncio.create_task(event(index)))
        await asyncio.gather(*tasks)
        took = time.monotonic() - start
        due = (
            len(macs) * self.given["processes"] * len(self.nodes) * 0.97
        )  # all processes attach as many; a node's own are not told it
        for _ in range(20 * seconds):
            if sum(len(node.told) for node in self.nodes) < due:
                await asyncio.sleep(0.1)
        return {"took": took, "drained": time.monotonic() - start, "macs": macs, "claimed": claimed, "failures": failures[:3],
                "failed": len(failures), "cpu": time.process_time() - began, "told": await self._settle()}  # fmt: skip

    async def _settle(self) -> list[float]:
        """Return how long each telling took, a sample of at most 20,000, once nothing comes any more."""
        before = -1
        while (count := sum(len(node.told) for node in self.nodes)) != before:
            before = count
            await asyncio.sleep(0.5)
        told = [each for node in self.nodes for each in node.told]
        return random.sample(told, min(len(told), 20_000))

    async def state(self) -> dict[str, object]:
        """Return how the nodes stand: how many are in their first session, and how many losses of nodes they have seen."""
        lost = 0
        for node in self.nodes:
            lost += (await node.cluster._store.read(lambda tx: tx.rows(LOSSES)))[0][0]
        joined = sum(node.cluster.state is State.JOINED for node in self.nodes)
        return {"joined": joined, "anew": sum(node.sessions - 1 for node in self.nodes), "lost": lost}

    async def close(self) -> dict[str, object]:
        await asyncio.gather(*(node.cluster.close() for node in self.nodes))
        return {}


def _puts(record: EndpointRecord, *, host: bool = False) -> list[Op]:
    key = f"{HOSTS}{record.network_id}/{record.node_id}" if host else f"{ENDPOINTS}{record.network_id}/{record.id}"
    return [put(key, encode(record)), *(put(claim, record.id.encode()) for claim in record.claims)]


async def main() -> None:
    cluster.LEASE_SECONDS = LEASE_SECONDS
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(30), logger_factory=structlog.PrintLoggerFactory(sys.stderr)
    )
    sys.setswitchinterval(0.0002)  # as netstored has it
    process: Process | None = None
    while line := await asyncio.to_thread(sys.stdin.readline):
        given = json.loads(line)
        if process is None:
            process = Process(given)
            answer: dict[str, object] = {}
        else:
            process.given.update(given)
            answer = await getattr(process, given["do"])()
        print(json.dumps(answer), flush=True)


asyncio.run(main())
