"""Debian's dockerd 20.10 with netstore as its plugin: networks, addresses, ports, names, volumes, restarts, compose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Host, Node, wait_until
from dockerd import NEEDS_DOCKERD, Docker

HTTPD = ("bb", "httpd", "-f", "-p", "80", "-h", "/data")
HELLO = "from the image"

pytestmark = NEEDS_DOCKERD


@pytest.fixture
def plugged(host: Host, place: Path) -> Iterator[Node]:
    """A node that is a plugin of the host's dockerd."""
    host.sh("mkdir -p /run/docker; mount -t tmpfs docker /run/docker")
    node = Node(host, place)
    (place / "docker.toml").write_text("[adapters.docker]\n[resolver]\nmanage = false\n")
    node.start("--config", str(place / "docker.toml"))
    yield node
    node.stop()
    host.sh("umount -l /run/docker; rmdir /run/docker || true")


@pytest.fixture
def docker(plugged: Node, place: Path, busybox_tar: Path) -> Iterator[Docker]:
    """A dockerd that came second; its FORWARD chain drops by default."""
    plugged.host.sh("sysctl -qw net.ipv4.ip_forward=0")
    docker = Docker(plugged.host, place / "docker")
    docker(("import", str(busybox_tar), "bb"))
    yield docker
    docker.stop()


def create(docker: Docker, name: str, *args: str) -> None:
    docker.out("network", "create", "-d", "netstore", "--ipam-driver", "netstore", *args, name)


def fetch(host: Host, port: int) -> str:
    return host.sh(f"ip netns exec neighbour curl -s -m2 203.0.113.1:{port}/hello || true").strip()


@pytest.mark.timeout(180)
def test_networks(plugged: Node, docker: Docker) -> None:
    """Run, ports, names, static addresses, dual stack, connect, disconnect, internal networks."""
    host = plugged.host
    create(docker, "app", "--subnet", "10.9.0.0/24", "--ip-range", "10.9.0.128/25", "--gateway", "10.9.0.9",
           "--aux-address", "printer=10.9.0.128", "--ipv6", "--subnet", "fd09::/64", "-o", "netstore.name=app")  # fmt: skip
    create(docker, "inside", "--internal")
    docker.out("run", "-d", "--name", "web", "--network", "app", "--ip", "10.9.0.40", "-p", "8080:80", *HTTPD)
    docker.out("run", "-d", "--name", "peer", "--network", "app", "bb", "sleep", "1000")
    shown = json.loads(docker.out("inspect", "peer"))[0]["NetworkSettings"]["Networks"]["app"]
    assert (shown["IPAddress"], shown["Gateway"]) == ("10.9.0.129", "10.9.0.9")
    assert shown["GlobalIPv6Address"].startswith("fd09::")
    wait_until(lambda: fetch(host, 8080) == HELLO, what="the published port")
    assert docker.out("exec", "peer", "wget", "-qO-", "http://web/hello") == HELLO
    assert docker.out("exec", "peer", "wget", "-qO-", "http://10.9.0.40/hello") == HELLO
    assert docker(("exec", "peer", "ping", "-c1", "-W2", "203.0.113.2")).returncode == 0
    six = json.loads(docker.out("inspect", "web"))[0]["NetworkSettings"]["Networks"]["app"]["GlobalIPv6Address"]
    assert docker(("exec", "peer", "ping", "-6", "-c1", "-W2", six)).returncode == 0
    docker.out("network", "connect", "inside", "web")
    docker.out("run", "--rm", "--network", "inside", "bb", "wget", "-qO-", "http://web/hello")
    routes = docker.out("run", "--rm", "--network", "inside", "bb", "ip", "route")
    assert "default" not in routes
    assert "docker_gwbridge" not in docker.out("network", "ls")
    docker.out("network", "disconnect", "app", "web")
    assert fetch(host, 8080) == ""
    docker.out("network", "connect", "--alias", "www", "app", "web")
    wait_until(lambda: fetch(host, 8080) == HELLO, what="the published port, connected again")
    assert docker.out("exec", "peer", "wget", "-qO-", "http://www/hello") == HELLO
    assert len(plugged.out("endpoint", "ls", "-q").split()) == 3
    taken = docker(("run", "--rm", "--network", "app", "--ip", "10.9.0.129", "bb", "true"), check=False)
    assert "10.9.0.129" in taken.stderr
    assert "is taken by" in taken.stderr
    limited = ("--network", "name=app,driver-opt=netstore.endpoint.bandwidth_in=1m")
    assert "dockerd moves interfaces" in docker(("run", "--rm", *limited, "bb", "true"), check=False).stderr
    docker.out(
        "network", "create", "-d", "netstore", "-o", "com.docker.network.driver.mtu=1400", "plain"
    )  # Docker's IPAM
    assert "mtu 1400" in docker.out("run", "--rm", "--network", "plain", "-p", "80", "bb", "ip", "link", "show", "eth0")
    docker.out("rm", "-f", "web", "peer")
    assert plugged.out("endpoint", "ls", "-q") == ""
    assert plugged.out("system", "check") == "kernel and store agree"
    docker.out("network", "rm", "app", "inside", "plain")
    assert "app" not in plugged.out("network", "ls")


@pytest.mark.timeout(180)
def test_volumes_and_restarts(plugged: Node, docker: Docker, place: Path) -> None:
    """Volumes with a size, mounted once however many use them; dockerd and netstored end and start in any order."""
    host = plugged.host
    docker.out("volume", "create", "-d", "netstore", "-o", "driver=image", "-o", "size=64M", "data")
    create(docker, "app")
    run = ("run", "-d", "--restart", "always", "--network", "app", "-v", "data:/v")
    docker.out(*run, "--name", "web", "-p", "8080:80", *HTTPD)
    docker.out(*run, "--name", "peer", "bb", "sleep", "1000")
    docker.out("exec", "web", "sh", "-c", "echo kept > /v/file")

    def works() -> bool:
        names = docker(("exec", "peer", "wget", "-qO-", "http://web/hello"), check=False).stdout.strip()
        file = docker(("exec", "peer", "cat", "/v/file"), check=False).stdout.strip()
        return (fetch(host, 8080), names, file) == (HELLO, HELLO, "kept")

    wait_until(works, what="web")
    free = docker.out("exec", "peer", "sh", "-c", "stat -f -c '%b %S' /v").split()
    assert 40 << 20 < int(free[0]) * int(free[1]) <= 64 << 20
    mounts = place / "state"
    assert host.sh(f"findmnt -rn -o TARGET | grep -c ^{mounts}").strip() == "1"
    configuration = ("--config", str(place / "docker.toml"))
    plugged.kill()
    assert works()
    docker.end()  # both are away
    docker.spawn()  # it asks for its plugin until there is one
    plugged.start(*configuration)
    docker.wait()
    wait_until(works, seconds=60, what="web, dockerd first")
    docker.daemon.kill()
    docker.daemon.wait()
    plugged.kill()
    plugged.start(*configuration)
    docker.spawn()
    docker.wait()
    wait_until(works, seconds=60, what="web, netstored first")
    assert plugged.out("system", "check") == "kernel and store agree"
    refused = docker(("volume", "rm", "data"), check=False)
    assert "in use" in refused.stderr
    docker.out("rm", "-f", "peer")
    assert host.sh(f"findmnt -rn -o TARGET | grep -c ^{mounts}").strip() == "1"
    docker.out("rm", "-f", "web")
    assert host.sh(f"findmnt -rn -o TARGET | grep -c ^{mounts} || true").strip() == "0"
    docker.out("volume", "rm", "data")
    docker.out("network", "rm", "app")
    assert plugged.out("volume", "ls", "-q") == plugged.out("endpoint", "ls", "-q") == ""
