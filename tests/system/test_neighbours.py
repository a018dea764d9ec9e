"""Living with others: a real dockerd, libvirt's kind of rules, br_netfilter; each beside our networks on one host."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Host, Node, wait_until
from dockerd import NEEDS_DOCKERD, Docker

HTTPD = ("httpd", "-f", "-v", "-p", "80", "-h", "/data")
HELLO = "from the image\n"
LIBVIRT = """
table ip libvirt_network {
  chain forward {
    type filter hook forward priority filter; policy accept;
    oifname virbr0 ip daddr 192.168.122.0/24 ct state related,established accept
    iifname virbr0 ip saddr 192.168.122.0/24 accept
    iifname virbr0 oifname virbr0 accept
    oifname virbr0 reject
    iifname virbr0 reject
  }
  chain nat {
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr 192.168.122.0/24 ip daddr != 192.168.122.0/24 masquerade
  }
}
"""


@pytest.fixture
def docker(host: Host, place: Path, busybox_tar: Path) -> Iterator[Docker]:
    """A dockerd that came first on a host that did not forward yet: its FORWARD chain drops by default."""
    host.sh("sysctl -qw net.ipv4.ip_forward=0")
    docker = Docker(host, place / "docker")
    docker(("import", str(busybox_tar), "bb"))
    yield docker
    docker.stop()


def fetch(host: Host, url: str, netns: str = "") -> str:
    inside = ["ip", "netns", "exec", netns] if netns else []
    return host.run(*inside, "curl", "-gsS", "-m", "2", url, check=False).stdout


def bridged_filtering(host: Host, value: int) -> bool:
    return not host.run("sysctl", "-qw", f"net.bridge.bridge-nf-call-iptables={value}", check=False).returncode


@NEEDS_DOCKERD
@pytest.mark.timeout(120)
def test_beside_dockerd(docker: Docker, node: Node, image: str) -> None:
    host = node.host
    assert "-P FORWARD DROP" in host.sh("iptables -S FORWARD")
    bridged_filtering(host, 1)
    docker(("run", "-d", "--name", "theirs", "-p", "7070:80", "bb", *HTTPD))
    node.cli("network", "create", "app")
    node.cli("run", "-d", "--name", "web", "--network", "app", "-p", "8080:80", image, *HTTPD)
    node.cli("run", "-d", "--name", "peer", "--network", "app", image)
    wait_until(lambda: fetch(host, "http://127.0.0.1:8080/hello") == HELLO, what="our httpd")
    wait_until(lambda: fetch(host, "http://203.0.113.1:7070/hello", "neighbour") == HELLO, what="Docker's httpd")
    # Docker's drop wins: nobody from outside comes in, and `system check` says why, and what to do.
    assert fetch(host, "http://203.0.113.1:8080/hello", "neighbour") == ""
    check = node.cli("system", "check", check=False)
    assert check.returncode == 1
    assert "chain ip filter FORWARD: it drops by default" in check.stdout
    command = check.stdout[check.stdout.index("nft '") :].strip()
    assert "insert rule ip filter DOCKER-USER" in command
    host.sh(command)
    assert "kernel and store agree" in node.out("system", "check")
    assert "-A DOCKER-USER -i nsbr-+" in host.sh("iptables -S DOCKER-USER")  # readable for its own tool

    def both_work() -> None:
        assert fetch(host, "http://203.0.113.1:8080/hello", "neighbour") == HELLO
        assert fetch(host, "http://203.0.113.1:7070/hello", "neighbour") == HELLO
        assert node.out("exec", "peer", "wget", "-qO-", "http://web/hello") == HELLO.strip()
        assert node.cli("exec", "peer", "ping", "-c1", "-W2", "203.0.113.2").returncode == 0
        assert docker(("exec", "theirs", "ping", "-c1", "-W2", "203.0.113.2")).returncode == 0
        for url in ("http://203.0.113.1:7070/hello", "http://203.0.113.1:8080/hello"):
            assert node.out("exec", "peer", "wget", "-qO-", url) == HELLO.strip()
        assert docker(("exec", "theirs", "wget", "-qO-", "http://203.0.113.1:8080/hello")).stdout == HELLO
        # What nobody published stays unreachable for the other's containers.
        address = json.loads(node.out("inspect", "web"))[0]["status"]["endpoints"][0]["status"]["addresses"][0]
        assert docker(("exec", "theirs", "ping", "-c1", "-W1", address.split("/")[0]), check=False).returncode

    both_work()
    if bridged_filtering(host, 0):
        both_work()
    docker(("restart", "-t", "0", "theirs"))
    node.kill()
    node.start()
    both_work()


@NEEDS_DOCKERD
@pytest.mark.timeout(120)
def test_docker_user_by_configuration(host: Host, place: Path, busybox_tar: Path) -> None:
    """[firewall] docker-user: rules come with Docker's chain, and again after somebody flushed it."""
    host.sh("sysctl -qw net.ipv4.ip_forward=0")
    config = place / "netstored.toml"
    config.write_text("[firewall]\ndocker-user = true\n[resolver]\nmanage = false\n")
    node = Node(host, place)
    node.start_resolver()
    docker = Docker(host, place / "docker")
    node.start("--config", str(config))
    try:
        rules = "-A DOCKER-USER -i nsbr-+"
        assert rules in host.sh("iptables -S DOCKER-USER")
        node.cli("network", "create", "-o", "com.docker.network.bridge.name=lan0", "--subnet", "10.8.0.0/24", "lan")
        host.sh("iptables -F DOCKER-USER")
        wait_until(lambda: rules in host.sh("iptables -S DOCKER-USER"), what="the repair")
        assert "-A DOCKER-USER -o lan0" in host.sh("iptables -S DOCKER-USER")
        assert host.sh("iptables -S DOCKER-USER").count("nsbr-+") == 2
    finally:
        docker.stop()
        node.stop()


def test_beside_libvirt(node: Node, image: str) -> None:
    """A bridge with rules that reject all but its own: its machine and our containers go on, also under br_netfilter."""
    host = node.host
    host.sh("ip link add virbr0 type bridge; ip addr add 192.168.122.1/24 dev virbr0; ip link set virbr0 up")
    host.netns("vm")
    host.sh(
        "ip link add vnet0 type veth peer name eth0 netns vm; ip link set vnet0 master virbr0 up;"
        "ip -n vm addr add 192.168.122.2/24 dev eth0; ip -n vm link set eth0 up; ip -n vm route add default via 192.168.122.1"
    )
    host.run("sh", "-c", f"nft -f - <<'X'\n{LIBVIRT}\nX")
    node.cli("network", "create", "app")
    node.cli("run", "-d", "--name", "web", "--network", "app", "-p", "8080:80", image, *HTTPD)
    wait_until(lambda: fetch(host, "http://127.0.0.1:8080/hello") == HELLO, what="httpd")
    for value in (0, 1):
        bridged_filtering(host, value)
        assert fetch(host, "http://203.0.113.1:8080/hello", "neighbour") == HELLO
        assert fetch(host, "http://203.0.113.1:8080/hello", "vm") == HELLO
        assert host.run("ip", "netns", "exec", "vm", "ping", "-c1", "-W2", "203.0.113.2").returncode == 0
        assert node.cli("exec", "web", "ping", "-c1", "-W2", "203.0.113.2").returncode == 0
    before = host.sh("nft list table ip libvirt_network")
    node.kill()
    node.start()
    assert host.sh("nft list table ip libvirt_network") == before
    assert node.cli("system", "check").returncode == 0


CONNECTED = """
import socket, sys
c = socket.create_connection(("203.0.113.1", 8080), timeout=5)
for _ in sys.stdin:
    c.send(b"x")
    print(c.recv(9), flush=True)
"""
ECHO = """
import socket
s = socket.create_server(("", 80))
print(flush=True)
while True:
    connection, _ = s.accept()
    while data := connection.recv(99):
        connection.send(data)
"""


PROBE = """
import socket, sys, time
began = float(sys.argv[1])
while time.time() - began < 5:
    try:
        socket.create_connection(("203.0.113.1", 8080), timeout=0.2)
        break
    except OSError:
        time.sleep(0.01)
print(time.time() - began)
"""


def test_a_flush_is_repaired_within_a_second_and_told(node: Node) -> None:
    """New connections are served again at once; who is connected, and says nothing meanwhile, never notices."""
    host = node.host
    host.netns("one")
    node.cli("network", "connect", "--netns", "/run/netns/one", "-p", "8080:80", "--name", "one", "bridge")
    inside, pipe = ["ip", "netns", "exec"], subprocess.PIPE
    server = subprocess.Popen(host.command(*inside, "one", sys.executable, "-c", ECHO), stdout=pipe, text=True)
    assert server.stdout
    server.stdout.readline()
    client = subprocess.Popen(host.command(*inside, "neighbour", sys.executable, "-c", CONNECTED),
                              stdin=pipe, stdout=pipe, text=True)  # fmt: skip

    def answered() -> bool:
        assert client.stdin
        assert client.stdout
        client.stdin.write("\n")
        client.stdin.flush()
        return client.stdout.readline() == "b'x'\n"

    try:
        assert answered()
        meddlings = ("nft flush ruleset", "nft delete table inet netstore", "nft flush chain inet netstore prerouting",
                     "ip link del $(ip -o link | grep -o 'nsbr-[0-9a-f]*' | head -1)")  # fmt: skip
        for meddling in meddlings:
            command = f"{meddling} && began=$(date +%s.%N) && exec ip netns exec neighbour {sys.executable} -c '{PROBE}' $began"
            gap = float(host.run("sh", "-c", command).stdout)
            print(meddling, gap)
            assert gap < 1, meddling
            assert answered(), meddling
        told = node.out("system", "events", "--since", "0", "--until-now", "-f", "event=repair")
        assert "node repair nftables" in told
        assert "bridge (detail=interface nsbr-" in told
    finally:
        for process in (client, server):
            process.kill()
            process.communicate()
