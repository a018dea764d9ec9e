"""Overlay networks: netstored and three etcd with TLS, each on a machine of its own, all on this one.

Attach on n1 until it answers and until n2's kernel has the entries; attach beside 10 and 10,000 endpoints of another
node, in turns; a node that joins 10,000 endpoints, and what it holds in memory; bytes through the tunnel beside one made
by hand; packets lost while a daemon is killed and starts again.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from common import figure, measure, percentile, resident, show
from traffic import losses, throughput

from netstore.api.v1 import endpoint_pb2
from netstore.client import BlockingClient as Client

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cluster.lab import Etcd3, Underlay, known, make_certificates, new_node, restart, start_etcd, start_node, stop_nodes
from conftest import Node, wait_until

PROGRAMS = Path(__file__).parent / "programs"
SAMPLES = 500
GAP_SECONDS = 0.01  # between two attaches: each is measured alone
FEW, MANY = 10, 10_000
ROUNDS, A_ROUND = 3, 40
VTEP = "198.51.100.30"


class Bench:
    """The nodes, and n1's sandboxes."""

    def __init__(self, etcd: Etcd3, nodes: list[Node]) -> None:
        self.etcd, self.nodes = etcd, nodes
        one, two, three = nodes
        self.network = one.out("network", "create", "-d", "overlay", "--subnet", "10.64.0.0/12", "app")
        one.cli("network", "create", "--subnet", "10.200.0.0/16", "local")
        known(nodes, "app")
        for node in (two, three):
            node.cli("network", "connect", "app", "--netns", node.host.netns("there"))
        one.host.sh(f"for i in $(seq 0 {SAMPLES - 1}); do echo netns add s$i; done | ip -batch -")
        self.client = Client(one.address)
        self.seen: dict[str, float] = {}

    def attach(self, network: str, index: int) -> endpoint_pb2.Endpoint:
        spec = endpoint_pb2.EndpointSpec(network=network, sandbox={"netns_path": f"/run/netns/s{index}"})
        request = endpoint_pb2.AttachEndpointRequest(endpoint=endpoint_pb2.Endpoint(spec=spec))
        return self.client.endpoints.AttachEndpoint(request).endpoint

    def detach(self, made: list[endpoint_pb2.Endpoint]) -> None:
        request = endpoint_pb2.DetachEndpointRequest
        calls = [self.client.endpoints.DetachEndpoint.future(request(endpoint=each.id)) for each in made]
        for call in calls:
            call.result()

    def series(self, network: str, count: int) -> list[float]:
        """Return how long attaches took, in milliseconds."""
        made: list[endpoint_pb2.Endpoint] = []
        times = measure(lambda index: made.append(self.attach(network, index)), count)
        self.detach(made)
        return times

    def propagation(self) -> None:
        """Measure from the begin of an attach on n1 to the entries on n2."""
        command = self.nodes[1].host.command(sys.executable, str(PROGRAMS / "entries.py"))
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as monitor:
            assert monitor.stdout
            assert monitor.stdout.readline() == "ready\n"
            threading.Thread(target=self._read, args=(monitor.stdout,), daemon=True).start()
            began, ended, made = [], [], []
            for index in range(SAMPLES):
                began.append(time.monotonic())
                made.append(self.attach("app", index))
                ended.append(time.monotonic())
                time.sleep(GAP_SECONDS)
            wait_until(lambda: all(each.status.mac_address in self.seen for each in made))
            monitor.kill()
        there = [self.seen[each.status.mac_address] for each in made]
        times = [(at - start) * 1e3 for at, start in zip(there, began, strict=True)]
        after = [(at - end) * 1e3 for at, end in zip(there, ended, strict=True)]
        name = f"attach on n1 begins, entries on n2 ({SAMPLES})"
        figure(f"{name}, p50", statistics.median(times), "ms", most=12, note=f"least {min(times):.1f}")
        figure(f"{name}, p99", percentile(times, 0.99), "ms", most=40, note=f"worst {max(times):.0f}")
        figure(
            "attach answered, entries on n2, p50", statistics.median(after), "ms", note="negative: before the answer"
        )
        self.detach(made)

    def _read(self, lines: object) -> None:
        for line in lines:  # type: ignore[attr-defined]
            mac, at = line.split()
            self.seen[mac] = float(at)

    def flood(self, verb: str, first: int, last: int) -> None:
        given = [verb, self.network, str(first), str(last), VTEP, str(self.etcd.certificates), *self.etcd.endpoints]
        self.etcd.underlay.host.run(sys.executable, str(PROGRAMS / "flood.py"), *given, timeout=60)

    def flat(self) -> None:
        """Attach beside few and beside many remote endpoints, in turns."""
        times: dict[int, list[float]] = {FEW: [], MANY: []}
        written, programmed = [], []
        self.flood("put", 0, FEW)
        for _ in range(ROUNDS):
            settled(self.nodes, FEW)
            times[FEW] += self.series("app", A_ROUND)
            began = time.monotonic()
            self.flood("put", FEW, MANY)
            written.append(time.monotonic() - began)
            wait_until(lambda: entries(self.nodes[1]) == MANY, seconds=60)
            programmed.append(time.monotonic() - began)
            settled(self.nodes, MANY)
            times[MANY] += self.series("app", A_ROUND)
            self.flood("delete", FEW, MANY)
        few, many = (statistics.median(times[count]) for count in (FEW, MANY))
        figure(f"attach beside {FEW} remote endpoints, p50", few, "ms", note=f"least {min(times[FEW]):.1f}")
        figure(f"attach beside {MANY} remote endpoints, p50", many, "ms", note=f"least {min(times[MANY]):.1f}")
        figure("attach: many to few", many / few, "times", most=1.3)
        note = f"written to etcd in {min(written):.1f} s"
        figure(f"{MANY} written at once, programmed on n2", statistics.median(programmed), "s", note=note)
        settled(self.nodes, FEW)

    def join(self) -> Node:
        """Let a new node join many endpoints and use their network; and one start again that uses it, and lacks them."""
        three, four = self.nodes[2], new_node(self.etcd, 4)
        three.kill()
        self.flood("put", FEW, MANY)
        settled(self.nodes[:2], MANY)
        four.start_resolver()
        path = four.host.netns("there")
        began = time.monotonic()
        restart(four)
        self.nodes.append(four)
        ready = time.monotonic() - began
        wait_until(lambda: joined(four), seconds=60)
        known_after = time.monotonic() - began
        four.cli("network", "connect", "app", "--netns", path)
        total = time.monotonic() - began
        assert entries(four) == MANY
        note = f"serves after {ready:.1f} s, knows all after {known_after:.1f} s"
        figure(f"a new node starts, knows and has programmed {MANY}", total, "s", most=3, note=note)
        began = time.monotonic()
        restart(three)
        wait_until(lambda: entries(three) == MANY, seconds=60)
        figure(f"a node starts again and lacks {MANY}: all programmed", time.monotonic() - began, "s", most=3)
        wait_until(lambda: joined(three))
        three.kill()
        began = time.monotonic()
        restart(three)
        wait_until(lambda: joined(three), seconds=60)
        figure(f"a node starts again that has all {MANY}: joined", time.monotonic() - began, "s", most=3)
        return four

    def memory(self) -> None:
        """Print what netstored holds beside many endpoints, all of them programmed."""
        for node in self.nodes[1:]:
            assert node.daemon
            name = f"memory of {node.place.name}'s netstored, {entries(node)} programmed"
            figure(name, resident(node.daemon.pid), "MB", most=150)


def entries(node: Node) -> int:
    """Return how many of the flood's endpoints a node's tunnel knows."""
    return int(node.host.sh(f"bridge fdb | grep -c 'dst {VTEP}' || true"))


def settled(nodes: list[Node], count: int) -> None:
    """Wait until the nodes that use the network have programmed so many of the flood, and then a moment."""
    wait_until(lambda: all(entries(node) == count for node in nodes[1:]), seconds=60)
    time.sleep(1.0)


def joined(node: Node) -> bool:
    found = json.loads(node.out("system", "info", "--format", "json"))
    return str(found["cluster"]["state"]).endswith("JOINED")


def run(bench: Bench) -> None:
    """Print the figures."""
    print(f"{'':<52}{'p50':>9}{'least':>9}{'p95':>9}  ms")
    for network in ("local", "app", "local", "app"):
        show(f"attach, {'overlay' if network == 'app' else 'bridge'}", bench.series(network, 50))
    bench.propagation()
    throughput(bench.etcd, bench.nodes)
    losses(bench.nodes, joined)
    bench.flat()
    bench.join()
    bench.memory()


def main() -> None:
    """Bring the machines up, measure, take them down."""
    place = Path(sys.argv[1])
    (place / "certificates").mkdir()
    underlay = Underlay(place)
    etcd = start_etcd(underlay, make_certificates(place / "certificates"))
    nodes = [start_node(etcd, number) for number in (1, 2, 3)]
    try:
        wait_until(lambda: all(map(joined, nodes)))
        run(Bench(etcd, nodes))
    finally:
        stop_nodes(nodes)
        etcd.close()
        underlay.close()


if __name__ == "__main__":
    main()
