"""Interfaces that need modules: 802.1q parents, the modes of ipvlan, sockets of SCTP."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import Node, wait_until
from dhcp import ROUTER, Dnsmasq, inside, pass_time

SERVER = """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
server.bind(("", 53)); server.listen(8)
print("ready", flush=True)
while True:
    link, _ = server.accept()
    link.sendall(link.recv(64).upper())
    input()
    link.close()
"""
CLIENT = """
import socket
link = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
link.settimeout(3)
link.connect(("203.0.113.1", 5300))
link.sendall(b"hello")
print(link.recv(64).decode())
"""


def attach(node: Node, network: str, netns: str, *flags: str) -> str:
    node.cli("network", "connect", *flags, network, "--netns", node.host.netns(netns))
    shown = json.loads(node.host.sh(f"ip -n {netns} -j -4 addr show eth0"))[0]["addr_info"]
    return str(shown[0]["local"])


def pings(node: Node, netns: str, address: str) -> bool:
    done = node.host.run("ip", "netns", "exec", netns, "ping", "-c1", "-W2", address, check=False)
    return done.returncode == 0


@pytest.mark.parametrize("driver", ["macvlan", "ipvlan"])
def test_a_tagged_parent_is_made_and_removed(node: Node, driver: str) -> None:
    node.host.sh("ip -n neighbour link add link eth0 name eth0.50 type vlan id 50; ip -n neighbour link set eth0.50 up;"
                 "ip -n neighbour addr add 192.0.2.1/24 dev eth0.50")  # fmt: skip
    for name, subnet in (("one", "192.0.2.0/24"), ("two", "198.51.100.0/24")):
        node.cli("network", "create", "-d", driver, "-o", "parent=uplink.50", "--subnet", subnet, name)
    link = json.loads(node.host.sh("ip -d -j link show uplink.50"))[0]
    assert (link["linkinfo"]["info_kind"], link["linkinfo"]["info_data"]["id"], link["link"]) == ("vlan", 50, "uplink")
    attach(node, "one", "a", "--ip", "192.0.2.20")
    assert pings(node, "a", "192.0.2.1")  # tagged on the wire: only the neighbour's VLAN 50 has that address
    assert json.loads(node.out("system", "check", "--format", "json")) == []
    node.cli("network", "disconnect", "one", "--netns", "/run/netns/a")
    node.cli("network", "rm", "one")
    assert "uplink.50" in node.host.sh("ip -o link")  # two is on it
    node.kill()
    node.host.sh("ip link del uplink.50")
    node.start()
    assert "uplink.50" in node.host.sh("ip -o link")
    node.cli("network", "rm", "two")
    assert "uplink.50" not in node.host.sh("ip -o link")
    node.host.sh("ip link add link uplink name uplink.60 type vlan id 60; ip link set uplink.60 up")
    node.cli("network", "create", "-d", driver, "-o", "parent=uplink.60", "--subnet", "192.0.2.0/24", "theirs")
    node.cli("network", "rm", "theirs")
    assert "uplink.60" in node.host.sh("ip -o link")  # not ours


@pytest.mark.parametrize("mode", ["l2", "l3", "l3s"])
def test_ipvlan_modes(node: Node, mode: str) -> None:
    gateway = ["--gateway", "203.0.113.2"] if mode == "l2" else []
    node.host.sh("ip link add eth0 type veth peer name eth0-peer")  # as most machines have one
    node.cli("network", "create", "-d", "ipvlan", "-o", "parent=uplink", "-o", f"ipvlan_mode={mode}",
             "--subnet", "203.0.113.0/24", "--ip-range", "203.0.113.64/26", *gateway, "lan")  # fmt: skip
    first, second = (attach(node, "lan", name) for name in ("a", "b"))
    link = json.loads(node.host.sh("ip -n a -d -j link show eth0"))[0]
    assert link["linkinfo"]["info_data"]["mode"] == mode
    assert link["address"] == json.loads(node.host.sh("ip -j link show uplink"))[0]["address"]
    assert pings(node, "a", second)
    assert pings(node, "b", first)
    route = node.host.sh("ip -n a route show default")
    assert "via 203.0.113.2" in route if mode == "l2" else "dev eth0" in route
    if mode != "l2":  # there is no ARP of its own: the neighbour is told the way
        node.host.sh(f"ip -n neighbour route add {first}/32 via 203.0.113.1")
        node.host.sh("sysctl -qw net.ipv4.ip_forward=1")
    assert pings(node, "neighbour", first)
    assert pings(node, "a", "203.0.113.2")
    assert json.loads(node.out("system", "check", "--format", "json")) == []
    node.kill()
    node.start()
    assert pings(node, "a", second)


def test_leases_on_ipvlan(node: Node) -> None:
    """Endpoints that share a MAC have a lease each, renewed after a restart, and given back; their names are answered."""
    server = Dnsmasq(node)
    server.start()
    try:
        node.cli("network", "create", "-d", "ipvlan", "--ipam-driver", "dhcp", "-o", "parent=uplink", "lan")
        first, second = (attach(node, "lan", name, "--name", name) for name in ("a", "b"))
        assert {first, second} == {lease[2] for lease in server.leases()}
        assert {lease[3] for lease in server.leases()} == {"a", "b"}
        assert pings(node, "a", second)
        assert pings(node, "b", ROUTER)
        assert pings(node, "neighbour", first)
        asked = ("ip", "netns", "exec", "a", "dig", "+short", "+time=2", "@127.0.0.11", "-q", "b")
        assert node.host.run(*asked).stdout.strip() == second
        acknowledged, discovered = server.heard("DHCPACK"), server.heard("DHCPDISCOVER")
        pass_time(node, 61)
        wait_until(lambda: server.heard("DHCPACK") >= acknowledged + 2, what="both to be renewed")
        assert (inside(node, "a"), inside(node, "b")) == (first, second)
        assert server.heard("DHCPDISCOVER") == discovered
        node.cli("network", "disconnect", "lan", "--netns", "/run/netns/a")
        wait_until(lambda: [lease[2] for lease in server.leases()] == [second], what="the first to be given back")
        assert json.loads(node.out("system", "check", "--format", "json")) == []
    finally:
        server.stop()


def test_sctp(node: Node) -> None:
    """A published port is reached by a real association; it ends with the port."""
    node.cli("network", "create", "app")
    attach(node, "app", "one", "-p", "5300:53/sctp")
    inside = [*node.host.command("ip", "netns", "exec", "one", sys.executable, "-c", SERVER)]
    server = subprocess.Popen(inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        assert server.stdout.readline() == "ready\n"
        called = ("ip", "netns", "exec", "neighbour", sys.executable, "-c", CLIENT)
        assert node.host.run(*called).stdout == "HELLO\n"
        assert "sctp" in node.host.sh("cat /proc/net/nf_conntrack")
        endpoint = json.loads(node.out("endpoint", "ls", "--format", "json"))[0]["id"]
        node.cli("endpoint", "unpublish", endpoint, "5300:53/sctp")
        assert "sctp" not in node.host.sh("cat /proc/net/nf_conntrack")
        assert node.host.run(*called, check=False).returncode
        node.cli("endpoint", "publish", endpoint, "5300:53/sctp")
        server.stdin.write("\n")  # type: ignore[union-attr]
        server.stdin.flush()  # type: ignore[union-attr]
        assert node.host.run(*called).stdout == "HELLO\n"
    finally:
        server.kill()
        server.communicate()
