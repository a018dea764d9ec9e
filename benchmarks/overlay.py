"""Overlay networks: three netstored and three etcd with TLS, each on a machine of its own, all on this one.

Attach on n1 until it answers, and until n2's kernel has the entry; 10,000 endpoints of another node that come at once,
to a node that restarts, and to one that joins; attach beside them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

from common import measure, show

from netstore.api.v1 import endpoint_pb2
from netstore.client import BlockingClient as Client

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cluster.lab import Etcd3, Underlay, make_certificates, restart, start_etcd, start_node, stop_nodes
from conftest import Node, wait_until

COUNT = 10_000
VTEP = "198.51.100.30"
FLOOD = """
import asyncio, sys
from netstore.model import Node, stable_mac
from netstore.networks.cluster.records import ALIVE, ENDPOINTS, NODES, EndpointRecord, encode
from netstore.store.etcd import Etcd, put
async def main(network, count, vtep, place, *endpoints):
    client = Etcd(endpoints, ca=f"{place}/ca.pem", cert=f"{place}/node.pem", key=f"{place}/node.key")
    node = Node(id="f" * 64, name="big", address=vtep, create_time=1.0)
    await client.transact([], [put(NODES + node.id, encode(node)), put(ALIVE + node.id, b"")])
    for start in range(0, int(count), 100):
        records = [EndpointRecord(id=f"{n:064x}", network_id=network, node_id=node.id, vtep=vtep, name=f"c{n}",
                                  names=(f"c{n}",), mac=stable_mac(str(n)), addresses=(f"10.70.{n // 256}.{n % 256}",))
                   for n in range(start, start + 100)]
        await client.transact([], [put(f"{ENDPOINTS}{network}/{each.id}", encode(each)) for each in records])
asyncio.run(main(*sys.argv[1:]))
"""


class Bench:
    """The nodes, and n1's sandboxes."""

    def __init__(self, etcd: Etcd3, nodes: list[Node]) -> None:
        self.etcd, self.nodes = etcd, nodes
        one, two, _ = nodes
        self.network = one.out("network", "create", "-d", "overlay", "--subnet", "10.64.0.0/12", "app")
        one.cli("network", "create", "--subnet", "10.200.0.0/16", "local")
        wait_until(lambda: "app" in two.out("network", "ls"))
        two.cli("network", "connect", "app", "--netns", two.host.netns("b"))
        self.paths = [one.host.netns(f"s{number}") for number in range(50)]
        self.client = Client(one.address)
        self.seen: dict[str, float] = {}

    def attach(self, network: str, index: int) -> endpoint_pb2.Endpoint:
        sandbox = {"netns_path": self.paths[index]}
        spec = endpoint_pb2.EndpointSpec(network=network, sandbox=sandbox)
        request = endpoint_pb2.AttachEndpointRequest(endpoint=endpoint_pb2.Endpoint(spec=spec))
        return self.client.endpoints.AttachEndpoint(request).endpoint

    def series(self, name: str, network: str) -> None:
        made = []
        show(name, measure(lambda index: made.append(self.attach(network, index)), len(self.paths)))
        for endpoint in made:
            self.client.endpoints.DetachEndpoint(endpoint_pb2.DetachEndpointRequest(endpoint=endpoint.id))

    def propagation(self) -> None:
        """Measure from the begin of an attach on n1 to the entry on n2."""
        command = self.nodes[1].host.command("stdbuf", "-oL", "bridge", "monitor", "fdb")
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as monitor:
            threading.Thread(target=self._read, args=(monitor.stdout,), daemon=True).start()
            time.sleep(0.3)
            began, made = [], []
            for index in range(len(self.paths)):
                began.append(time.perf_counter())
                made.append(self.attach("app", index))
                time.sleep(0.03)
            wait_until(lambda: all(each.status.mac_address in self.seen for each in made))
            times = [(self.seen[e.status.mac_address] - t) * 1e3 for t, e in zip(began, made, strict=True)]
            show("overlay: attach on n1 to entry on n2", times, "to hold: 12 ms p50")
            monitor.kill()
        for endpoint in made:
            self.client.endpoints.DetachEndpoint(endpoint_pb2.DetachEndpointRequest(endpoint=endpoint.id))

    def _read(self, lines: object) -> None:
        for line in lines:  # type: ignore[attr-defined]
            if " dst " in line:
                self.seen.setdefault(line.split()[0], time.perf_counter())

    def flood(self) -> None:
        given = [self.network, str(COUNT), VTEP, str(self.etcd.certificates), *self.etcd.endpoints]
        self.etcd.underlay.host.run(sys.executable, "-c", FLOOD, *given, timeout=60)

    def entries(self, node: Node) -> int:
        return int(node.host.sh(f"bridge fdb | grep -c 'dst {VTEP}' || true"))


def joined(node: Node) -> bool:
    found = json.loads(node.out("system", "info", "--format", "json"))
    return str(found["cluster"]["state"]).endswith("JOINED")


def seconds(name: str, began: float, note: str = "") -> None:
    print(f"{name:<52}{time.perf_counter() - began:>9.2f} s                 {note}", flush=True)


def memory(node: Node) -> str:
    assert node.daemon
    lines = Path(f"/proc/{node.daemon.pid}/status").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("VmRSS"))


def run(bench: Bench) -> None:
    """Print the figures."""
    _, two, three = bench.nodes
    print(f"{'':<52}{'p50':>9}{'least':>9}{'p95':>9}  ms")
    for network in ("local", "app", "local", "app"):
        bench.series(f"attach, {'overlay' if network == 'app' else 'bridge'}", network)
    bench.propagation()
    three.kill()
    began = time.perf_counter()
    bench.flood()
    seconds(f"{COUNT} endpoints written to etcd", began)
    wait_until(lambda: bench.entries(two) == COUNT, seconds=60)
    seconds("and programmed on n2", began, memory(two))
    began = time.perf_counter()
    restart(three)
    wait_until(lambda: joined(three), seconds=60)
    seconds("a node starts, joins and knows all", began, "to hold: 3 s")
    path = three.host.netns("c")
    began = time.perf_counter()
    three.cli("network", "connect", "app", "--netns", path)
    assert bench.entries(three) == COUNT
    seconds("its first attach, with all programmed", began, f"{memory(three)}; to hold: 150 MB")
    bench.series(f"attach, overlay, beside {COUNT} remote ones", "app")


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
