"""What overlay networks carry: bytes beside a tunnel made by hand, and packets while a daemon starts again."""

from __future__ import annotations

import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import figure

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cluster.lab import UNDERLAY, Etcd3, address_of, connect, known, reaches
from conftest import Host, Node, wait_until

ROUNDS, SECONDS = 10, 1
FIRST = ("nice", "-n", "-20")  # what else runs takes from all alike, and as little as can be
PINGS, PING_SECONDS = 4000, 0.002


@dataclass(frozen=True)
class Way:
    """From one namespace to another, where iperf3 listens."""

    name: str
    client: Host
    sandbox: str
    address: str

    def gigabits(self) -> float:
        """Return what one TCP connection carries, in Gbit/s."""
        command = ("ip", "netns", "exec", self.sandbox, *FIRST, "iperf3", "-J", "-c", self.address, "-t", str(SECONDS))
        found = json.loads(self.client.run(*command).stdout)
        return float(found["end"]["sum_received"]["bits_per_second"]) / 1e9


def by_hand(machines: dict[int, Host], port: int) -> None:
    """Make bridge, tunnel and sandbox on two machines, by their numbers, as an administrator would."""
    for number, machine in machines.items():
        other = next(each for each in machines if each != number)
        machine.sh(
            "set -e; ip link add hands type bridge; ip link set hands up mtu 1450; ip netns add hand;"
            f"ip link add hand0 type vxlan id 77 local {UNDERLAY}.{number} dstport {port} nolearning;"
            f"ip link set hand0 mtu 1450 master hands up; bridge fdb append 00:00:00:00:00:00 dev hand0 dst {UNDERLAY}.{other};"
            "ip link add hand1 mtu 1450 type veth peer name eth0 mtu 1450 netns hand; ip link set hand1 master hands up;"
            f"ip -n hand addr add 10.99.0.{number}/24 dev eth0; ip -n hand link set eth0 up"
        )


def ways(etcd: Etcd3, nodes: list[Node], listening: list[subprocess.Popen[bytes]]) -> list[Way]:
    """Make what is to be compared."""
    one, two = nodes[:2]
    one.cli("network", "create", "-d", "overlay", "policed")
    known(nodes, "policed")
    rule = ("--from", "label=role=client", "--to", "label=role=server", "--port", "5201/tcp")
    one.cli("policy", "create", "--network", "policed", *rule, "speed")

    def listen(host: Host, sandbox: str) -> None:
        command = host.command("ip", "netns", "exec", sandbox, *FIRST, "iperf3", "-s")
        listening.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        wait_until(lambda: host.sh(f"ip netns exec {sandbox} ss -Hltn sport = :5201"), what="iperf3")

    bare = {number: etcd.underlay.machine(number) for number in (11, 12)}
    by_hand(bare, 4789)
    by_hand({1: one.host, 2: two.host}, 4791)
    listen(bare[12], "hand")
    listen(two.host, "hand")
    found = [Way("tunnel by hand, hosts without netstore", bare[11], "hand", "10.99.0.12"),
             Way("tunnel by hand, the same hosts", one.host, "hand", "10.99.0.2")]  # fmt: skip
    connect(one, "from-app")
    address = connect(two, "to-app")
    listen(two.host, "to-app")
    reaches(one, "from-app", address)
    found.append(Way("overlay", one.host, "from-app", address))
    connect(one, "from-policed", "policed", "--label", "role=client")
    address = connect(two, "to-policed", "policed", "--label", "role=server")
    listen(two.host, "to-policed")
    found.append(Way("overlay, policed", one.host, "from-policed", address))
    connect(one, "from-local", "local")
    address = connect(one, "to-local", "local")
    listen(one.host, "to-local")
    found.append(Way("bridge, one host", one.host, "from-local", address))
    return found


def throughput(etcd: Etcd3, nodes: list[Node]) -> None:
    """Let one TCP connection after another carry what it can, in turns."""
    listening: list[subprocess.Popen[bytes]] = []
    try:
        compared = ways(etcd, nodes, listening)
        rates: dict[str, list[float]] = {way.name: [] for way in compared}
        for way in compared * ROUNDS:
            rates[way.name].append(way.gigabits())
    finally:
        for process in listening:
            process.kill()
            process.wait()
    for name, found in rates.items():
        note = f"best of {ROUNDS}: {max(found):.2f}"
        figure(f"TCP through {name}, middle", statistics.median(found), "Gbit/s", note=note)
    bare, hand, overlay, policed, bridge = rates.values()
    for name, these, those, least in (
        ("overlay to by hand, the same hosts", overlay, hand, 0.95),
        ("overlay to by hand, hosts without netstore", overlay, bare, 0.95),
        ("overlay, policed, to overlay", policed, overlay, None), ("overlay to bridge on one host", overlay, bridge, None),
    ):  # fmt: skip
        pairs = [ours / theirs for ours, theirs in zip(these, those, strict=True)]
        note = f"of the best: {max(these) / max(those):.2f}"
        figure(f"{name}, middle of pairs", statistics.median(pairs), "times", least=least, note=note)


def losses(nodes: list[Node], joined: Callable[[Node], bool]) -> None:
    """Count packets lost between others, and of its own, while a node's daemon ends and starts again."""
    one, two, three = nodes[:3]
    addresses = {node.place.name: connect(node, "ping") for node in nodes}
    for node in nodes:
        for address in addresses.values():
            reaches(node, "ping", address)
    pairs = (("others, n2 to n3", two, three), ("its own, n2 to n1", two, one), ("its own, n1 to n2", one, two))
    for how, number in (("killed", signal.SIGKILL), ("restarted", signal.SIGTERM)):
        running = {
            name: _ping(source, address_of(target, "ping")) for name, source, target in pairs
        }  # fmt: skip
        time.sleep(1.0)
        assert one.daemon
        one.daemon.send_signal(number)
        one.daemon.wait()
        one.start("--config", str(one.place / "cluster.toml"))
        wait_until(lambda: joined(one), seconds=30)
        late = any(process.poll() is not None for process in running.values())
        for name, process in running.items():
            sent, back = re.findall(r"(\d+) (?:packets transmitted|received)", process.communicate()[0])
            note = "it was not over when the pings were" if late else f"of {sent}"
            figure(f"n1's daemon {how}: packets lost, {name}", int(sent) - int(back), "", most=0, note=note)


def _ping(source: Node, address: str) -> subprocess.Popen[str]:
    flags = ("-q", "-i", str(PING_SECONDS), "-c", str(PINGS), "-W", "1")
    command = source.host.command("ip", "netns", "exec", "ping", "ping", *flags, address)
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
