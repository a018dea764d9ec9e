"""A swarm of two of Debian's dockerds whose networks are the cluster's: by the managed plugin of packaging/docker-plugin."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from conftest import Node, wait_until
from dockerd import NEEDS_DOCKERD, Docker

from cluster.lab import UNDERLAY, Etcd3, address_of, new_node, reaches, restart, stop_nodes

PLUGIN = Path(__file__).parents[2] / "packaging" / "docker-plugin"
NAME = "netstore-swarm:latest"
NUMBERS = count(11)
IMAGE = "localhost:1/bb"  # a registry that refuses at once: a service asks one for its image
HTTPD = ("httpd", "-f", "-p", "80", "-h", "/data")

pytestmark = [NEEDS_DOCKERD, pytest.mark.timeout(300)]


@pytest.fixture
def pair(etcd3: Etcd3, nodes3: list[Node]) -> Iterator[list[Node]]:
    """Two more nodes, which serve the plugin."""
    numbers = [next(NUMBERS) for _ in range(2)]
    nodes = [new_node(etcd3, number) for number in numbers]
    for node in nodes:
        file = node.place / "cluster.toml"
        file.write_text(file.read_text() + f'[adapters.docker]\nsocket = "{node.place}/docker.sock"\n')
        node.host.sh("mkdir -p /run/docker; mount -t tmpfs docker /run/docker")
        node.start_resolver()
        restart(node)
    yield nodes
    stop_nodes(nodes)
    for number, node in zip(numbers, nodes, strict=True):
        node.host.sh("umount -l /run/docker; rmdir /run/docker || true")
        nodes3[0].cli("node", "rm", "-f", f"n{number}")


@pytest.fixture
def swarm(pair: list[Node], etcd3: Etcd3, busybox_tar: Path) -> Iterator[list[Docker]]:
    """A dockerd on each, with the plugin; the first one leads."""
    started: list[Docker] = []
    for node in pair:
        docker = Docker(node.host, node.place / "d")
        started.append(docker)
        docker(("import", str(busybox_tar), IMAGE))
        docker.out("plugin", "create", NAME, str(PLUGIN))
        docker.out("plugin", "set", NAME, f"SOCKET={node.place}/run/docker-swarm.sock")
        docker.out("plugin", "enable", NAME)
    first, second = started
    address, other = (underlay_address(node) for node in pair)
    first.out("swarm", "init", "--advertise-addr", address, "--data-path-port", "4788")
    token = first.out("swarm", "join-token", "-q", "worker")
    second.out("swarm", "join", "--advertise-addr", other, "--token", token, f"{address}:2377")
    yield started
    for docker in (second, first):
        docker.stop()


def underlay_address(node: Node) -> str:
    return f"{UNDERLAY}.{node.place.name.removeprefix('n')}"


def create(leader: Docker, name: str, *args: str) -> None:
    leader.out("network", "create", "-d", NAME, "--ipam-driver", NAME, "--attachable", *args, name)


def start(docker: Docker, name: str, *args: str) -> str:
    """Run a container, and return its address."""
    docker.out("run", "-d", "--name", name, "--network", "app", *args, IMAGE, *HTTPD)
    return address(docker, name)


def address(docker: Docker, name: str) -> str:
    shown = json.loads(docker.out("inspect", name))[0]["NetworkSettings"]["Networks"]
    return str(shown["app"]["IPAddress"])


def resolved(docker: Docker, name: str, asked: str) -> list[str]:
    answer = docker(("exec", name, "nslookup", asked), check=False).stdout
    return re.findall(r"^Address: ([0-9.]+)$", answer, re.MULTILINE)


def fetches(docker: Docker, name: str, from_: str) -> bool:
    """Say whether a container gets a page from another one."""
    wget = ("busybox", "timeout", "3", "wget", "-qO-", f"http://{from_}/hello")
    done = docker(("exec", name, *wget), check=False)
    return done.stdout.strip() == "from the image"


def end(pair: list[Node], swarm: list[Docker], *networks: str) -> None:
    """Remove all containers, and networks: then nothing of them is left."""
    for docker in swarm:
        docker.out("rm", "-f", *docker.out("ps", "-aq").split())
    for name in networks:
        wait_until(lambda n=name: not swarm[0](("network", "rm", n), check=False).returncode, seconds=30, what=name)
    for node in pair:
        wait_until(lambda n=node: "overlay" not in n.out("network", "ls"), what="the networks' end")
        assert node.out("endpoint", "ls", "-q") == ""
        wait_until(lambda n=node: not n.cli("system", "check", check=False).returncode, what="the kernel to follow")
        assert "nsv" not in node.host.sh("ip -o link")


def test_one_network_on_two_nodes(pair: list[Node], swarm: list[Docker]) -> None:
    """Addresses, names, ports, an address asked for, services, and an end that leaves nothing."""
    one, two = swarm
    create(one, "app", "-o", "netstore.name=app")
    create(one, "inside", "--internal", "-o", "netstore.internal=true")
    create(one, "six", "--ipv6", "--subnet", "10.44.0.0/24", "--subnet", "fd44::/64")
    first = [start(one, f"a{index}") for index in range(3)]
    second = [start(two, f"b{index}", *(("-p", "8080:80") if index == 0 else ())) for index in range(3)]
    assert len({*first, *second}) == 6
    for docker, name, other, there in ((one, "a0", "b0", second[0]), (two, "b0", "a0", first[0])):
        wait_until(lambda d=docker, n=name, t=there: fetches(d, n, t), what=f"{other}'s address")
        wait_until(lambda d=docker, n=name, o=other: fetches(d, n, o), what=f"{other}'s name")
    assert "from the image" in pair[0].host.sh(f"curl -s -m 5 http://{underlay_address(pair[1])}:8080/hello")
    asked = first[0].rsplit(".", 1)[0] + ".77"
    assert start(two, "asked", "--ip", asked) == asked
    assert "default" not in two.out("run", "--rm", "--network", "inside", IMAGE, "ip", "route")
    for docker, name in ((one, "s1"), (two, "s2")):
        docker.out("run", "-d", "--name", name, "--network", "six", IMAGE, "sleep", "1000")
    six = json.loads(two.out("inspect", "s2"))[0]["NetworkSettings"]["Networks"]["six"]["GlobalIPv6Address"]
    wait_until(lambda: not one(("exec", "s1", "ping", "-6", "-c1", "-W1", six), check=False).returncode, what=six)

    path = pair[0].host.netns(
        "ours"
    )  # others join: what netstore gives them is in the upper half, where swarm's come last
    pair[0].cli("network", "connect", "app", "--netns", path, "--name", "ours")
    ours = address_of(pair[0], "ours")
    assert int(ours.rsplit(".", 1)[1]) > 127
    reaches(pair[0], "ours", second[0])
    pair[0].cli("network", "disconnect", "app", "--netns", path)

    one.out("network", "create", "-d", NAME, "--attachable", "--subnet", "10.45.0.0/24", "plain")  # swarm's addresses
    for docker, name in ((one, "p1"), (two, "p2"), (one, "p3"), (two, "p4")):
        docker.out("run", "-d", "--name", name, "--network", "plain", IMAGE, *HTTPD)
    wait_until(lambda: fetches(one, "p1", "p4") and fetches(two, "p2", "p3"), what="names")

    replicated = ("--endpoint-mode", "dnsrr", "--replicas", "4", "--network", "app", "--no-resolve-image")
    one.out("service", "create", "-d", "-q", "--name", "www", *replicated, IMAGE, *HTTPD)
    running = ("service", "ps", "-q", "-f", "desired-state=running", "www")
    wait_until(lambda: one.out("service", "ls", "--format", "{{.Replicas}}") == "4/4", seconds=60, what="the service")
    assert len(one.out(*running).split()) == 4
    wait_until(lambda: len(set(resolved(one, "a0", "tasks.www"))) == 4, what="the service's name")
    wait_until(lambda: fetches(two, "b0", "www"), what="the service")
    published = (
        "--mode",
        "global",
        "--publish",
        "mode=host,target=80,published=8081",
        *replicated[:2],
        *replicated[-3:],
    )
    one.out("service", "create", "-d", "-q", "--name", "edge", *published, IMAGE, *HTTPD)
    for node in pair:
        page = f"curl -s -m 5 http://{underlay_address(node)}:8081/hello || true"
        wait_until(lambda p=page: "from the image" in pair[0].host.sh(p), seconds=60, what="the service's port")
        assert node.out("system", "check") == "kernel and store agree"

    one.out("service", "rm", "www", "edge")
    wait_until(lambda: not any("www" in docker.out("ps", "-a") for docker in swarm), seconds=30, what="its end")
    end(pair, swarm, "app", "inside", "six", "plain")


def test_what_is_refused(pair: list[Node]) -> None:
    """The socket answers who is not dockerd: with a reason, and nothing is made."""
    node = pair[0]

    def call(method: str, body: str) -> str:
        socket = str(node.place / "run" / "docker-swarm.sock")
        return node.host.run("curl", "-s", "--unix-socket", socket, "-d", body, f"http://plugin/{method}").stdout

    pools = '"IPv4Data": [{"Pool": "10.88.0.0/24", "Gateway": "10.88.0.1/24"}]'
    bad = {
        f'{{"NetworkID": "{"x" * 24}"}}': "$.NetworkID",
        '{"NetworkID": "': "truncated",
        f'{{"NetworkID": "{"x" * 25}", {pools}, "Options": {{"a": "b"}}}}': "'a' is not accepted",
        f'{{"NetworkID": "{"x" * 25}", {pools}, "Options": {{"netstore.internal": "perhaps"}}}}': "true or false",
        f'{{"NetworkID": "{"x" * 25}", "IPv4Data": [{{"Pool": "10.88.0.1/24"}}]}}': "Pool: '10.88.0.1/24' is not accepted",
    }
    for body, reason in bad.items():
        assert reason in call("NetworkDriver.AllocateNetwork", body), body
    good = f'{{"NetworkID": "{"x" * 25}", {pools}, "Options": {{"netstore.name": "n"}}}}'
    for _ in range(2):
        assert call("NetworkDriver.AllocateNetwork", good) == '{"Options":{"netstore.name":"n"}}'
    assert "n " in pair[1].out("network", "ls")
    internal = f'{{"NetworkID": "{"x" * 25}", {pools}, "Options": {{"com.docker.network.internal": true, %s}}}}'
    internal %= '"com.docker.network.generic": {"netstore.name": "n"}'
    assert "-o netstore.internal=true besides" in call("NetworkDriver.CreateNetwork", internal)
    for _ in range(2):
        assert call("NetworkDriver.FreeNetwork", f'{{"NetworkID": "{"x" * 25}"}}') == "{}"
    assert call("VolumeDriver.List", "{}").startswith('{"Err":"POST /VolumeDriver.List: Not Found')
    assert "overlay" not in node.out("network", "ls")
    assert "defect" not in node.log()


def test_restarts(pair: list[Node], swarm: list[Docker]) -> None:
    """dockerd and netstored end and start in any order; no address has two holders.

    Names of a node whose dockerd ended come back when Docker's gossip has noticed: up to a minute, with its own overlay
    networks, too.
    """
    one, two = swarm
    create(one, "app")
    first, second = (start(docker, name, "--restart", "always") for docker, name in ((one, "aa"), (two, "bb")))

    def reach_each_other() -> bool:
        return fetches(one, "aa", address(two, "bb")) and fetches(two, "bb", address(one, "aa"))

    wait_until(reach_each_other, what="each other")
    pair[1].kill()
    assert reach_each_other()
    restart(pair[1])
    assert len({first, second, start(two, "cc"), start(one, "dd")}) == 4
    one.out("rm", "-f", "dd")
    one.end()
    one.spawn()
    one.wait()
    wait_until(reach_each_other, seconds=30, what="each other, after the leader")
    two.daemon.kill()
    two.daemon.wait()
    pair[1].kill()
    two.spawn()  # it asks for netstored until there is one
    restart(pair[1])
    two.wait()
    wait_until(reach_each_other, seconds=30, what="each other, after a crash of both")
    wait_until(lambda: fetches(one, "aa", "bb") and fetches(two, "bb", "aa"), seconds=120, what="names")
    assert len(pair[0].out("endpoint", "ls", "-q").split()) == len(pair[1].out("endpoint", "ls", "-q").split()) == 1
    end(pair, swarm, "app")
