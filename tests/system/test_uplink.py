"""The host's way out: its MTU is followed live, segments are clamped to it, and routes that appear are told."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import Node, wait_until


def mtu_of(node: Node, name: str, *, netns: str = "") -> int:
    inside = f"ip -n {netns}" if netns else "ip"
    return int(json.loads(node.host.sh(f"{inside} -j link show {name}"))[0]["mtu"])


def network_of(node: Node, name: str) -> dict:
    return json.loads(node.out("network", "inspect", name))[0]


def test_mtu_follows_the_uplink(node: Node, image: str) -> None:
    node.cli("network", "create", "--ipv6", "app")
    node.cli("network", "create", "-o", "com.docker.network.driver.mtu=1450", "fixed")
    node.host.netns("a")
    for network in ("app", "fixed"):
        node.cli("network", "connect", "--netns", "/run/netns/a", network)
    node.cli("run", "-d", "--name", "web", "--network", "app", image)
    host_ends = [
        each["status"]["host_interface_name"]
        for each in json.loads(node.out("endpoint", "ls", "--filter", "network=app", "--format", "json"))
    ]
    bridge = network_of(node, "app")["status"]["interface"]

    def seen() -> set[int]:
        return {mtu_of(node, name) for name in (bridge, *host_ends)} | {mtu_of(node, "eth0", netns="a")}

    assert seen() == {1500}
    for mtu in (1400, 1300):
        node.host.sh(f"ip link set uplink mtu {mtu}")
        wait_until(lambda mtu=mtu: seen() == {mtu}, seconds=1, what=f"MTU {mtu}")
        assert f"mtu {mtu}" in node.out("exec", "web", "ip", "link", "show", "eth0")
        assert network_of(node, "app")["status"]["mtu"] == mtu
    # One too small for IPv6 is followed as far as IPv6 lets it; without an uplink everything stays.
    node.host.sh("ip link set uplink mtu 1200")
    wait_until(lambda: network_of(node, "bridge")["status"]["mtu"] == 1200, what="MTU of the default network")
    node.cli("run", "-d", "--name", "small", image)
    assert "mtu 1200" in node.out("exec", "small", "ip", "link", "show", "eth0")
    wait_until(lambda: seen() == {1280}, what="the least MTU")
    node.host.sh("ip route del default")
    # Another interface becomes the way out, also while netstored is down.
    node.kill()
    node.host.sh(
        "ip link add second mtu 1440 type veth peer name eth1 netns neighbour; ip addr add 198.51.100.1/24 dev second;"
        "ip link set second up; ip -n neighbour link set eth1 up; ip route add default via 198.51.100.2"
    )
    assert seen() == {1280}
    node.start()
    wait_until(lambda: seen() == {1440}, what="MTU of the other uplink")
    node.host.sh("ip link set second mtu 1420")
    wait_until(lambda: seen() == {1420}, seconds=1, what="MTU of the other uplink")
    assert mtu_of(node, "eth1", netns="a") == 1450


@pytest.mark.parametrize(("target", "largest"), [("203.0.113.2", 1400 - 40), ("2001:db8::2", 1400 - 60)])
def test_segments_fit_the_uplink(node: Node, target: str, largest: int) -> None:
    """A network of larger MTU than the uplink: neither side sends segments that do not fit (complaint 15)."""
    node.host.sh("ip -6 addr add 2001:db8::1/64 dev uplink nodad; ip link set uplink mtu 1400")
    node.host.sh("ip -n neighbour -6 addr add 2001:db8::2/64 dev eth0 nodad")
    node.cli("network", "create", "--ipv6", "-o", "com.docker.network.driver.mtu=1500", "app")
    node.host.netns("a")
    node.cli("network", "connect", "--netns", "/run/netns/a", "app")
    server = """
import socket
with socket.create_server(("::", 9), family=socket.AF_INET6, dualstack_ipv6=True) as server:
    print(flush=True)
    connection, _ = server.accept()
    print(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG))
"""
    client = f"import socket; s = socket.create_connection(('{target}', 9)); print(s.getsockopt(6, socket.TCP_MAXSEG))"
    listening = subprocess.Popen(
        node.host.command("ip", "netns", "exec", "neighbour", sys.executable, "-c", server), stdout=subprocess.PIPE
    )
    assert listening.stdout
    listening.stdout.readline()
    sent = int(node.host.run("ip", "netns", "exec", "a", sys.executable, "-c", client).stdout)
    received = int(listening.communicate()[0])
    assert {sent, received} == {largest - 12}  # the time stamps' option


def test_a_route_that_appears_is_told(node: Node) -> None:
    node.cli("network", "create", "--subnet", "10.8.0.0/16", "app")
    warned = node.cli("network", "create", "--subnet", "203.0.113.128/25", "near").stderr
    assert "overlaps the host's route 203.0.113.0/24 on uplink" in warned
    assert node.out("system", "check") == "kernel and store agree"  # what was known at create is not told again
    node.host.sh("ip route add 10.8.9.0/24 via 203.0.113.2")
    told = "subnet 10.8.0.0/16 overlaps the host's route 10.8.9.0/24 on uplink"

    def overlaps() -> list[str]:
        lines = node.out("system", "events", "--since", "0", "--until-now", "--format", "json").splitlines()
        return [each["attributes"]["detail"] for each in map(json.loads, lines) if each["action"] == "overlap"]

    wait_until(overlaps, what="the event")
    assert [told in each for each in overlaps()] == [True]
    found = node.cli("system", "check", "--repair", check=False)
    assert found.returncode == 1
    assert f"app: {told}" in found.stdout
    assert "near" not in found.stdout
    node.host.sh("ip route del 10.8.9.0/24")
    assert node.out("system", "check") == "kernel and store agree"
    # Halves of everything are default routes, whichever the family; pools pass all others over.
    node.host.sh("ip route add 0.0.0.0/1 via 203.0.113.2; ip route add 128.0.0.0/1 via 203.0.113.2")
    node.host.sh("ip route add 172.18.5.0/24 via 203.0.113.2; ip -6 addr add 2001:db8::1/64 dev uplink nodad")
    first = network_of(node, "bridge")["status"]["ipam"][0]["subnet"]
    node.cli("network", "create", "--ipv6", "six")
    subnets = [pool["subnet"] for pool in network_of(node, "six")["status"]["ipam"]]
    assert (first, subnets[0]) == ("172.17.0.0/16", "172.19.0.0/16")
    node.cli("network", "rm", "six")
    node.host.sh(f"ip -6 route add {subnets[1]} via 2001:db8::2")
    node.cli("network", "create", "--ipv6", "six")
    assert network_of(node, "six")["status"]["ipam"][1]["subnet"] != subnets[1]
    assert node.out("system", "check") == "kernel and store agree"
