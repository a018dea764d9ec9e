"""Never two holders: a history of concurrent clients on three nodes, with etcd's leader killed and nodes cut off.

A client notes when a call began and ended. From the end of a call that took something to the begin of the call that gave
it back its client holds it for certain; two such times of one address, name or number must not overlap.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
from conftest import Node, wait_until

from cluster.lab import Etcd3, known, states
from netstore.api.v1 import endpoint_pb2, network_pb2, service_pb2
from netstore.client import BlockingClient as Client

SECONDS = 15
CLIENTS = 3  # on each node
NAMES = ("blue", "green", "red")
REFUSALS = (
    grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED,
)  # fmt: skip


@dataclass
class History:
    """Who held what from when to when, and how calls ended."""

    holds: dict[str, list[tuple[float, float, str]]] = field(default_factory=lambda: defaultdict(list))
    results: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    problems: list[str] = field(default_factory=list)
    longest: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def call(self, work: Callable[[], object]) -> object | None:
        """Run a call; None when it was refused."""
        began = time.monotonic()
        try:
            answer, result = work(), "ok"
        except grpc.RpcError as error:
            answer, result = None, error.code().name
            if error.code() not in REFUSALS:
                self.problems.append(f"{error.code()}: {error.details()}")
        with self.lock:
            self.results[result] += 1
            self.longest = max(self.longest, time.monotonic() - began)
        return answer

    def held(self, what: str, since: float, until: float, who: str) -> None:
        with self.lock:
            self.holds[what].append((since, until, who))

    def check(self) -> list[str]:
        """Return every pair of holders of one thing at one time."""
        found = []
        for what, times in self.holds.items():
            for (since, until, who), (later, _, other) in itertools.combinations(sorted(times), 2):
                if later < until and who != other:
                    found.append(f"{what}: {who} from {since:.3f} to {until:.3f}, and {other} from {later:.3f}")
        return found


class User(threading.Thread):
    """A client of one node with a namespace of its own."""

    def __init__(self, node: Node, number: int, history: History, stop: threading.Event) -> None:
        super().__init__()
        self.client = Client(node.address)
        self.name = f"{node.place.name}-{number}"
        self.path = node.host.netns(f"u{number}")
        self.random = random.Random(self.name)
        self.history, self.stop = history, stop

    def run(self) -> None:
        while not self.stop.is_set():
            self.random.choices((self.attach, self.make_network, self.make_service), (70, 15, 15))[0]()
        self.client.channel.close()

    def attach(self) -> None:
        address = f"10.77.0.{self.random.randint(2, 12)}" if self.random.random() < 0.5 else ""
        spec = endpoint_pb2.EndpointSpec(
            network="shared", sandbox={"netns_path": self.path}, ipv4_address=address, name=self.name
        )
        request = endpoint_pb2.AttachEndpointRequest(endpoint=endpoint_pb2.Endpoint(spec=spec))
        answer = self.history.call(lambda: self.client.endpoints.AttachEndpoint(request, timeout=30))
        since = time.monotonic()
        if answer is None:
            time.sleep(0.05)
            return
        endpoint = answer.endpoint
        time.sleep(self.random.random() * 0.1)
        until = time.monotonic()
        for each in endpoint.status.addresses:
            self.history.held(f"address {each}", since, until, endpoint.id)
        self.history.held(f"MAC {endpoint.status.mac_address}", since, until, endpoint.id)
        gone = endpoint_pb2.DetachEndpointRequest(endpoint=endpoint.id)
        assert self.history.call(lambda: self.client.endpoints.DetachEndpoint(gone, timeout=30)) is not None

    def make_network(self) -> None:
        name = self.random.choice(NAMES)
        network = network_pb2.Network(name=name, spec={"driver": "spanning", "options": {}}, labels={"by": self.name})
        request = network_pb2.CreateNetworkRequest(network=network)
        answer = self.history.call(lambda: self.client.networks.CreateNetwork(request, timeout=30))
        since = time.monotonic()
        if answer is None:
            return
        made = answer.network
        time.sleep(self.random.random() * 0.1)
        until = time.monotonic()
        for what in (f"name {name}", f"VNI {made.status.vni}", f"subnet {made.status.ipam[0].subnet}"):
            self.history.held(what, since, until, made.id)
        gone = network_pb2.DeleteNetworkRequest(network=made.id, allow_missing=True)
        self.history.call(lambda: self.client.networks.DeleteNetwork(gone, timeout=30))

    def make_service(self) -> None:
        name, port = self.random.choice(NAMES), self.random.randint(8080, 8082)
        spec = service_pb2.ServiceSpec(
            network="shared", selector=["tier"], ports=[{"published_port": port, "target_port": 80}]
        )
        request = service_pb2.CreateServiceRequest(service={"name": name, "spec": spec, "labels": {"by": self.name}})
        answer = self.history.call(lambda: self.client.services.CreateService(request, timeout=30))
        since = time.monotonic()
        if answer is None:
            return
        made = answer.service
        time.sleep(self.random.random() * 0.1)
        until = time.monotonic()
        for what in (f"service {name}", f"port {port}", *(f"address {each}" for each in made.status.addresses)):
            self.history.held(what, since, until, made.id)
        gone = service_pb2.DeleteServiceRequest(service=made.id, allow_missing=True)
        while self.history.call(lambda: self.client.services.DeleteService(gone, timeout=30)) is None:
            time.sleep(0.1)


def disturb(etcd: Etcd3) -> None:
    """Do what goes wrong, one after the other."""
    time.sleep(1)
    leader = etcd.leader()
    etcd.kill(leader)
    time.sleep(2)
    etcd.start(leader)
    time.sleep(1)
    etcd.underlay.cut(2)
    time.sleep(4)
    etcd.underlay.heal()
    time.sleep(1)
    etcd.underlay.cut_between([21, 22, 23], [3])  # what n3 asks arrives, and it hears no answer
    time.sleep(4)
    etcd.underlay.heal()


def endpoints_of(nodes: list[Node]) -> dict[str, str]:
    """Return the addresses of all nodes' endpoints on the network, and whose they are."""
    found: dict[str, str] = {}
    for node in nodes:
        lines = node.out("endpoint", "ls", "--filter", "network=shared", "--format", "json").splitlines()
        for each in itertools.chain.from_iterable(_objects(line) for line in lines):
            for address in each["status"]["addresses"]:
                found[address.split("/")[0]] = each["id"]
    return found


def _objects(text: str) -> list[dict]:
    found = json.loads(text)
    return found if isinstance(found, list) else [found]


def claims_of(etcd: Etcd3, network_id: str) -> dict[str, str]:
    """Return the addresses that etcd says are held, without the nodes' own."""
    text = etcd.ctl("get", "--prefix", f"/netstore/1/claims/addresses/{network_id}/")
    keys, values = text.splitlines()[::2], text.splitlines()[1::2]
    pairs = {key.rsplit("/", 1)[1]: value for key, value in zip(keys, values, strict=True)}
    return {address: holder for address, holder in pairs.items() if not holder.startswith(network_id[:32])}


def evicted(events: str) -> list[str]:
    """Return the endpoints that were taken from who had been told of them; not those whose attach was still asking etcd
    when its connection broke, and which then got another address, or an error.
    """
    connected, found = set(), []
    for line in events.splitlines():
        _, _, kind, action, name, *_ = line.split(" ")
        if kind == "endpoint" and action == "connect":
            connected.add(name)
        elif kind == "endpoint" and action == "disconnect":
            connected.discard(name)
        elif kind == "endpoint" and action == "evict" and name in connected:
            found.append(line)
    return found


def test_never_two_holders(etcd3: Etcd3, nodes3: list[Node]) -> None:
    network_id = nodes3[0].out("network", "create", "-d", "spanning", "--subnet", "10.77.0.0/28", "shared")
    known(nodes3, "shared")
    history, stop = History(), threading.Event()
    users = [User(node, number, history, stop) for node in nodes3 for number in range(CLIENTS)]
    for user in users:
        user.start()
    began = time.monotonic()
    disturb(etcd3)
    stop.wait(max(0.0, SECONDS - (time.monotonic() - began)))
    stop.set()
    for user in users:
        user.join()
    print(dict(history.results), f"{len(history.holds)} things, longest call {history.longest:.1f} s")
    assert history.problems == []
    assert history.check() == []
    assert history.results["ok"] > 50
    for what in ("name blue", "service blue", "port 8080"):
        assert len(history.holds[what]) > 1
    wait_until(lambda: set(states(nodes3[0]).values()) == {"up"}, seconds=15, what="all nodes again")
    for each in nodes3[0].out("service", "ls", "-q").split():  # made by a call whose answer was lost
        nodes3[0].cli("service", "rm", each)
    wait_until(lambda: claims_of(etcd3, network_id) == endpoints_of(nodes3), seconds=15, what="etcd to be what is")
    for node in nodes3:
        assert evicted(node.out("system", "events", "--since", "0", "--until-now")) == []
