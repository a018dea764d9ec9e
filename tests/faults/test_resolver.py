"""netstore-resolver, started by netstored: it outlives it, comes back when it is killed, and loses no question."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Host, Node, wait_until

from netstore.api.v1 import endpoint_pb2, network_pb2
from netstore.client import BlockingClient as Client


def resolvers(node: Node) -> list[int]:
    """The pids of the resolvers of a node."""
    found = subprocess.run(["pgrep", "-f", f"netstore-resolver .*{node.place}"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.fixture
def managed(host: Host, place: Path) -> Iterator[Node]:
    """A node whose resolver is netstored's to start."""
    node = Node(host, place)
    (place / "netstored.toml").write_text('[resolver]\nupstream = ["203.0.113.2"]\n')
    start(node)
    yield node
    node.stop()
    for pid in resolvers(node):
        os.kill(pid, signal.SIGTERM)


def start(node: Node) -> None:
    node.start("--config", str(node.place / "netstored.toml"))


def connected(node: Node) -> bool:
    return "true" in node.out("system", "info", "-f", "{{.ResolverConnected}}")


def attach(node: Node, name: str) -> None:
    node.host.netns(name)
    node.cli("network", "connect", "--netns", f"/run/netns/{name}", "--name", name, "app")


def sockets(pid: int) -> int:
    """How many sockets a process has open."""
    return sum(os.readlink(each).startswith("socket:") for each in Path(f"/proc/{pid}/fd").iterdir())


def ask(node: Node, name: str) -> subprocess.Popen[str]:
    inside = ["ip", "netns", "exec", name, "dig", "@127.0.0.11", "+short", "+tries=1", "+time=15", "-q", name]
    return subprocess.Popen(node.host.command(*inside), stdout=subprocess.PIPE, text=True)


def answer(asking: subprocess.Popen[str]) -> str:
    return asking.communicate(timeout=20)[0].strip()


def test_one_resolver_that_comes_back_and_outlives_the_daemon(managed: Node) -> None:
    node = managed
    wait_until(lambda: connected(node), what="the resolver")
    node.cli("network", "create", "app")
    attach(node, "one")
    assert answer(ask(node, "one")) == "172.18.0.2"
    (first,) = resolvers(node)

    os.kill(first, signal.SIGKILL)  # questions of the gap wait
    waiting = [ask(node, "one") for _ in range(5)]
    assert [answer(each) for each in waiting] == ["172.18.0.2"] * 5
    (second,) = resolvers(node)
    assert second != first

    node.kill()
    assert answer(ask(node, "one")) == "172.18.0.2"
    start(node)
    wait_until(lambda: connected(node), what="the same resolver")
    time.sleep(1)  # longer than a second one would need to be started
    assert resolvers(node) == [second]
    attach(node, "two")
    assert answer(ask(node, "two")) == "172.18.0.3"

    os.kill(second, signal.SIGKILL)  # of a resolver that another netstored started
    assert answer(ask(node, "two")) == "172.18.0.3"
    (third,) = resolvers(node)
    assert node.daemon
    node.daemon.terminate()
    node.daemon.wait(timeout=20)
    assert answer(ask(node, "one")) == "172.18.0.2"
    assert resolvers(node) == [third]
    start(node)
    assert node.out("system", "check") == "kernel and store agree"


def test_a_resolver_of_another_version_is_replaced(host: Host, place: Path) -> None:
    node = Node(host, place)
    (place / "netstored.toml").write_text("")
    program = "import netstore; netstore.__version__ = '0.0'; from netstore.resolver.main import main; main()"
    old = subprocess.Popen(
        host.command(sys.executable, "-c", program, *node.command("")[1:]), stderr=subprocess.DEVNULL
    )
    wait_until((place / "run/resolver.sock").exists, what="the old resolver")
    start(node)
    try:
        assert old.wait(timeout=10) == 0
        wait_until(lambda: connected(node), what="the new one")
        assert len(resolvers(node)) == 1
        node.cli("network", "create", "app")
        attach(node, "one")
        assert answer(ask(node, "one")) == "172.18.0.2"
    finally:
        node.stop()
        for pid in resolvers(node):
            os.kill(pid, signal.SIGTERM)


def test_one_sandbox_does_not_take_the_resolver_from_the_others(node: Node) -> None:
    node.cli("network", "create", "app")
    for name in ("one", "two"):
        attach(node, name)
    flood = """
import os, socket
held = [socket.create_connection(("127.0.0.11", 53), 2) for _ in range(300)]
udp = socket.socket(type=socket.SOCK_DGRAM)
for n in range(3000):
    udp.sendto(os.urandom(n % 600), ("127.0.0.11", 53))
for n in range(2000):  # names that nobody answers
    udp.sendto(os.urandom(2) + bytes.fromhex("0100000100000000000008") + b"%08d" % n + bytes([0, 0, 1, 0, 1]), ("127.0.0.11", 53))
print("flooded", flush=True)
input()
"""
    inside = ["ip", "netns", "exec", "one", sys.executable, "-c", flood]
    hostile = subprocess.Popen(node.host.command(*inside), stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    try:
        assert hostile.stdout
        assert hostile.stdout.readline() == "flooded\n"
        assert answer(ask(node, "two")) == "172.18.0.3"
        tcp = ["ip", "netns", "exec", "two", "dig", "@127.0.0.11", "+tcp", "+short", "+tries=1", "one"]
        assert node.host.run(*tcp).stdout.strip() == "172.18.0.2"
    finally:
        hostile.communicate("\n", timeout=10)
    assert node.resolver
    assert node.resolver.poll() is None


def test_a_bad_upstream_is_refused(host: Host, place: Path) -> None:
    (place / "bad.toml").write_text('[resolver]\nupstream = ["ns.example.org"]\n')
    done = host.run(*Node(host, place).command("netstored", "--config", str(place / "bad.toml")), check=False)
    assert done.returncode == 1
    assert "ns.example.org" in done.stderr


def test_what_changes_while_the_resolver_is_away(node: Node) -> None:
    """Sockets made, made anew and closed meanwhile are the resolver's once it is back."""
    node.cli("network", "create", "app")
    for name in ("one", "two"):
        attach(node, name)
    assert node.resolver
    wait_until(lambda: connected(node), what="the resolver")
    assert answer(ask(node, "two")) == "172.18.0.3"
    before = sockets(node.resolver.pid)
    os.kill(node.resolver.pid, signal.SIGSTOP)
    node.kill()
    node.start()  # cannot take its sockets back, so that it makes new ones
    node.cli("network", "disconnect", "app", "--netns", "/run/netns/two")
    attach(node, "three")
    os.kill(node.resolver.pid, signal.SIGCONT)
    wait_until(lambda: connected(node), what="the resolver")
    assert answer(ask(node, "one")) == "172.18.0.2"
    assert answer(ask(node, "three"))
    assert node.out("system", "check") == "kernel and store agree"
    assert sockets(node.resolver.pid) == before


def test_a_thousand_sandboxes_in_80_mb(node: Node, client: Client) -> None:
    count, batch = 1000, 250
    node.host.sh(f"for i in $(seq 0 {count - 1}); do echo netns add c$i; done | ip -batch -")
    for first in range(0, count, batch):
        name = f"app{first}"
        client.networks.CreateNetwork(network_pb2.CreateNetworkRequest(network={"name": name}))
        endpoints = [
            {"spec": {"network": name, "sandbox": {"netns_path": f"/run/netns/c{index}"}, "name": f"c{index}"}}
            for index in range(first, first + batch)
        ]
        client.endpoints.AttachEndpoints(endpoint_pb2.AttachEndpointsRequest(endpoints=endpoints))
    for index in range(0, count, 100):
        assert answer(ask(node, f"c{index}")).startswith("172.")
    assert node.resolver
    assert node.resolver.poll() is None

    def resident() -> int:
        status = Path(f"/proc/{node.resolver.pid}/status").read_text()  # type: ignore[union-attr]
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])  # type: ignore[index]

    assert resident() < 80 * 1024
    node.kill()  # the next one takes every socket back
    node.start()
    assert node.out("system", "check") == "kernel and store agree"
    node.resolver.kill()
    node.resolver.wait()
    asking = [ask(node, f"c{index}") for index in (0, 999)]
    node.start_resolver()
    assert all(answer(each).startswith("172.") for each in asking)
    assert resident() < 80 * 1024
