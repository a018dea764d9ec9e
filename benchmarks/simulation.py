"""A large cluster on one machine: 200 nodes and 20,000 endpoints against one etcd, and what breaks first.

The nodes are netstore's own sessions without kernels, 50 in a process (programs/nodes.py); beside them two real daemons,
each on a machine of its own, program theirs: n1 uses every network, n2 one. Endpoints then come and go, faster and
faster, until what one node says is late at the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import figure, percentile, resident

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cluster.lab import Etcd3, Underlay, known, make_certificates, start_node, stop_nodes
from conftest import Node, wait_until

PROGRAMS = Path(__file__).parent / "programs"
NODES = int(os.environ.get("NETSTORE_BENCH_NODES", "200"))
EACH = int(os.environ.get("NETSTORE_BENCH_EACH", "100"))  # endpoints of a node
NETWORKS, PROCESSES = 10, 4
RATES, SECONDS = (4, 8, 16, 32, 64, 128, 256, 512), 8
LATE_SECONDS = 2.0  # where 1 in 100 is told of so late, it is broken
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Workers:
    """The processes of simulated nodes."""

    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)

    def start(self, etcd: Etcd3, networks: list[str], place: Path) -> None:
        nodes = NODES // PROCESSES
        for number in range(PROCESSES):
            command = etcd.underlay.host.command(sys.executable, str(PROGRAMS / "nodes.py"))
            self.logs.append(etcd.underlay.place / f"nodes-{number}.log")
            with self.logs[-1].open("w") as log:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
                self.processes.append(subprocess.Popen(command, **pipes, text=True))
        given = {"networks": networks, "nodes": nodes, "each": EACH, "endpoints": etcd.endpoints, "place": str(place),
                 "certificates": str(etcd.certificates), "processes": PROCESSES}  # fmt: skip
        self._ask([{**given, "first": number * nodes, "process": number} for number in range(PROCESSES)])

    def ask(self, do: str, **given: object) -> list[dict[str, Any]]:
        """Let all do one thing; returns their answers."""
        return self._ask([{"do": do, **given}] * len(self.processes))

    def _ask(self, given: list[dict[str, object]]) -> list[dict[str, Any]]:
        for process, each in zip(self.processes, given, strict=True):
            assert process.stdin
            process.stdin.write(json.dumps(each) + "\n")
            process.stdin.flush()
        lines = [process.stdout.readline() for process in self.processes if process.stdout]
        if not all(lines):
            sys.exit("".join(log.read_text()[-1500:] for log in self.logs if log.stat().st_size))
        return [json.loads(line) for line in lines]

    def tell(self) -> None:
        """Print what the nodes complained of."""
        for line in {line for log in self.logs for line in log.read_text().splitlines()[:2]}:
            print(f"said by a node: {line[:200]}")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@dataclass
class Usage:
    """Seconds of CPU that processes have used, and the machine."""

    etcd: float
    real: list[float]
    busy: float
    all: float

    @classmethod
    def now(cls, etcd: Etcd3, nodes: list[Node]) -> Usage:
        member = etcd.processes[0]
        assert member
        fields = [int(each) for each in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        idle = fields[3] + fields[4]
        real = [_cpu(node.daemon.pid) for node in nodes if node.daemon]
        return cls(_cpu(member.pid), real, (sum(fields) - idle) / TICKS, sum(fields) / TICKS)


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextmanager
def entries(node: Node) -> Iterator[dict[str, float]]:
    """Yield when a node's kernel had the entries of endpoints, by their MACs."""
    seen: dict[str, float] = {}
    command = node.host.command(sys.executable, str(PROGRAMS / "entries.py"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as monitor:
        assert monitor.stdout
        lines = monitor.stdout
        assert lines.readline() == "ready\n"

        def read() -> None:
            for line in lines:
                mac, at = line.split()
                seen.setdefault(mac, float(at))

        threading.Thread(target=read, daemon=True).start()
        try:
            yield seen
        finally:
            monitor.kill()


class Simulation:
    """The cluster: `etcd`, the real nodes and the simulated ones."""

    def __init__(self, etcd: Etcd3, nodes: list[Node], workers: Workers) -> None:
        self.etcd, self.nodes, self.workers = etcd, nodes, workers

    def load(self) -> None:
        """Let the cluster come to its size."""
        one, two = self.nodes
        networks = [one.out("network", "create", "-d", "overlay", "--subnet", f"10.{100 + number}.0.0/16", f"net{number}")
                    for number in range(NETWORKS)]  # fmt: skip
        known(self.nodes, f"net{NETWORKS - 1}")
        place = self.etcd.underlay.place / "nodes"
        place.mkdir()
        self.etcd.underlay.host.run("mount", "-t", "tmpfs", "nodes", str(place))  # else 200 nodes would share one disk
        self.workers.start(self.etcd, networks, place)
        began = time.monotonic()
        self.workers.ask("fill")
        figure(f"{NODES * EACH} endpoints written to etcd", time.monotonic() - began, "s")
        before, began = Usage.now(self.etcd, self.nodes), time.monotonic()
        joined = self.workers.ask("join")
        wall, after = time.monotonic() - began, Usage.now(self.etcd, self.nodes)
        seconds = [each for answer in joined for each in answer["seconds"]]
        figure(f"{NODES} nodes have loaded all of it, 12 at a time", wall, "s")
        figure("one of them, p50", percentile(seconds, 0.5), "s", note=f"worst {max(seconds):.1f}")
        figure("its CPU", sum(answer["cpu"] for answer in joined) / NODES, "s")
        figure("etcd's CPU for it", (after.etcd - before.etcd) / NODES, "s")
        for node, count in ((one, NETWORKS), (two, 1)):
            began = time.monotonic()
            for number in range(count):
                node.cli("network", "connect", f"net{number}", "--netns", node.host.netns(f"net{number}"))
            wanted = NODES * EACH // NETWORKS * count
            wait_until(lambda node=node, wanted=wanted: programmed(node) >= wanted, seconds=60)
            assert node.daemon
            note = f"{programmed(node)} entries, {resident(node.daemon.pid):.0f} MB"
            figure(f"{node.place.name}, real, uses {count} of the networks: programmed", time.monotonic() - began, "s",
                   note=note)  # fmt: skip
        self.sizes()

    def sizes(self) -> None:
        """Print what etcd holds."""
        status = json.loads(self.etcd.ctl("endpoint", "status", "-w", "json"))[0]["Status"]
        figure("etcd's database", status["dbSize"] / 1e6, "MB")
        member = self.etcd.processes[0]
        assert member
        figure("etcd's memory", resident(member.pid), "MB")
        leases = len(self.etcd.ctl("lease", "list").splitlines()) - 1
        answers = self.workers.ask("state")
        lost, anew = (sum(answer[key] for answer in answers) for key in ("lost", "anew"))
        figure(f"leases of {NODES + 2} nodes", leases, "", note=f"sessions begun anew: {anew}, losses seen: {lost}")

    def churn(self) -> None:
        """Let endpoints come and go, faster and faster."""
        head = (
            "events/s",
            "made",
            "claim p50",
            "told p50",
            "p99",
            "kernel p50",
            "p99",
            "etcd",
            "a node",
            "n1",
            "n2",
            "busy",
        )
        print(f"\n{'':<9}{'':>9}{'ms':>10}{'ms':>10}{'ms':>10}{'ms':>11}{'ms':>10}{'CPU ms an event':>24}{'%':>21}")
        print("".join(f"{name:>{width}}" for name, width in zip(head, WIDTHS, strict=True)))
        costs: list[tuple[float, float, float]] = []
        for rate in RATES:
            broken = self._phase(rate, costs)
            if broken:
                print(f"broken at {rate} events/s: {broken}")
                break
        etcd, node, real = (min(each) for each in zip(*costs, strict=True))  # at the best: commits and messages shared
        limits = {"etcd (requests, and the fan-out of its watch)": etcd, "a node's session and store": node,
                  "a real daemon that programs all": real}  # fmt: skip
        print("\none core each would carry, by the least CPU an event that was measured:")
        for name, cost in sorted(limits.items(), key=lambda pair: -pair[1]):
            figure(f"  {name}", 1 / cost if cost else 0.0, "1/s", note=f"{cost * 1e3:.2f} ms an event")
        print(f"  this machine, which is all {NODES} nodes and etcd at once: {os.cpu_count()} cores")

    def _phase(self, rate: int, costs: list[tuple[float, float, float]]) -> str:
        """Measure one rate, and print a line; returns what is broken."""
        with entries(self.nodes[0]) as seen:
            before = Usage.now(self.etcd, self.nodes)
            answers = self.workers.ask("churn", rate=rate / PROCESSES, seconds=SECONDS)
            after = Usage.now(self.etcd, self.nodes)
        macs = {mac: sent for answer in answers for mac, sent in answer["macs"].items()}
        told = [each * 1e3 for answer in answers for each in answer["told"]] or [0.0]
        kernel = [(seen[mac] - sent) * 1e3 for mac, sent in macs.items() if mac in seen] or [0.0]
        claimed = [each * 1e3 for answer in answers for each in answer["claimed"]] or [0.0]
        took, events = max(answer["took"] for answer in answers), rate * SECONDS
        etcd, one, two = (
            (now - then) / events
            for now, then in zip([after.etcd, *after.real], [before.etcd, *before.real], strict=True)
        )
        node = sum(answer["cpu"] for answer in answers) / events / NODES
        costs.append((etcd, node, one))
        busy = (after.busy - before.busy) / (after.all - before.all)
        line = (rate, events / took, percentile(claimed, 0.5), percentile(told, 0.5), percentile(told, 0.99),
                percentile(kernel, 0.5), percentile(kernel, 0.99), etcd * 1e3, node * 1e3, one * 1e3, two * 1e3, busy * 100)  # fmt: skip
        print(
            "".join(f"{value:>{width}.{0 if value >= 100 else 1}f}" for value, width in zip(line, WIDTHS, strict=True)),
            flush=True,
        )
        failed, missing = sum(answer["failed"] for answer in answers), len(macs) - len(kernel)
        lost = sum(answer["lost"] for answer in self.workers.ask("state"))
        late = percentile(told, 0.99) / 1e3
        reasons = {
            f"1 in 100 is told of after {late:.1f} s": late > LATE_SECONDS,
            f"{failed} claims failed: {[answer['failures'][:1] for answer in answers]}": failed,
            f"{missing} of {len(macs)} endpoints did not get to n1's kernel meanwhile": missing > len(macs) * 0.02,
            f"nodes took each other for lost: {lost} times": lost,
            f"only {events / took:.0f} a second were made": took > 1.5 * SECONDS,
        }
        return "; ".join(reason for reason, holds in reasons.items() if holds)


WIDTHS = (9, 9, 10, 10, 10, 11, 10, 9, 9, 9, 9, 9)


def programmed(node: Node) -> int:
    """Return how many entries of other nodes' endpoints a node's tunnels have."""
    return int(node.host.sh("bridge fdb | grep -c 'dst 192.0.' || true"))


def main() -> None:
    """Bring it up, measure, take it down."""
    place = Path(sys.argv[1])
    (place / "certificates").mkdir()
    underlay = Underlay(place)
    etcd = Etcd3(underlay, make_certificates(place / "certificates"), [underlay.machine(21)], [None])
    workers = Workers()
    nodes: list[Node] = []
    try:
        etcd.start(0)
        etcd.wait()
        nodes = [start_node(etcd, number) for number in (1, 2)]
        simulation = Simulation(etcd, nodes, workers)
        simulation.load()
        simulation.churn()
        simulation.sizes()
        workers.tell()
    finally:
        workers.close()
        stop_nodes(nodes)
        etcd.close()
        underlay.close()


if __name__ == "__main__":
    main()
