"""Overlay networks of a real cluster: containers on three machines, through tunnels between them."""

from __future__ import annotations

import json

from cluster.lab import Etcd3, restart
from cluster.test_spanning import address_of, connect, joined, resolves
from conftest import Node, wait_until


def pings(node: Node, sandbox: str, address: str, *flags: str) -> bool:
    where = ("ip", "netns", "exec", sandbox) if sandbox else ()
    return not node.host.run(*where, "ping", "-c1", "-W1", *flags, address, check=False).returncode


def reaches(node: Node, sandbox: str, address: str) -> None:
    wait_until(lambda: pings(node, sandbox, address), what=f"{sandbox} to reach {address}")


def test_three_machines_are_one_network(etcd3: Etcd3, nodes3: list[Node]) -> None:
    one, two, three = nodes3
    joined(nodes3)
    one.cli(
        "network", "create", "-d", "overlay", "--ipv6", "--subnet", "10.90.0.0/16", "--subnet", "fd00:90::/64", "app"
    )
    first, second = connect(one, "a", "app"), connect(two, "b", "app")
    third = connect(three, "c", "app", "--ip", "10.90.7.7")
    assert third == "10.90.7.7"
    for node, sandbox, others in (
        (one, "a", (second, third)),
        (two, "b", (first, third)),
        (three, "c", (first, second)),
    ):
        for address in others:
            reaches(node, sandbox, address)
    six = json.loads(two.host.sh("ip -n b -j -6 addr show dev eth0 scope global"))[0]["addr_info"][0]["local"]
    reaches(one, "a", six)
    wait_until(lambda: resolves(one, "a", "b") == second, what="b's name")
    assert pings(one, "a", second, "-M", "do", "-s", "1422")
    reaches(one, "", second)  # the machine itself, to a container of another one
    gateway = {
        node.host.sh(f"ip -n {name} neigh show 10.90.0.1 | awk '{{print $5}}'")
        for node, name in ((one, "a"), (two, "b"))
    }
    assert len(gateway) == 1, "the same gateway MAC on every node"
    assert pings(one, "a", "10.90.0.1")
    for node in nodes3:
        assert "kernel and store agree" in node.out("system", "check")

    # A container that moves keeps its name and gets the way to it changed everywhere.
    two.cli("network", "disconnect", "app", "--netns", "/run/netns/b")
    wait_until(lambda: not pings(one, "a", second), what="its end")
    moved = connect(three, "b", "app", "--ip", second)
    assert moved == second
    reaches(one, "a", second)

    # Nodes restart: nothing that runs notices; etcd away: neither.
    one.kill()
    assert pings(three, "c", first)
    restart(one)
    etcd3.kill(0, 1, 2)
    assert pings(three, "c", first)
    assert pings(one, "a", third)
    one.kill()
    restart(one)
    assert pings(one, "a", third), "the data plane comes back with etcd away"
    refused = one.cli("network", "connect", "app", "--netns", one.host.netns("d"), check=False)
    assert "etcd" in refused.stderr or "cluster" in refused.stderr
    etcd3.start(0, 1, 2)


def test_what_a_port_and_a_flush_do(etcd3: Etcd3, nodes3: list[Node]) -> None:
    one, two, _ = nodes3
    joined(nodes3)
    one.cli("network", "create", "-d", "overlay", "--subnet", "10.91.0.0/16", "app")
    connect(one, "a", "app")
    connect(two, "b", "app", "-p", "8080:80")
    second = address_of(two, "b")
    reaches(one, "a", second)
    two.host.sh("ip netns exec b busybox httpd -p 80 -h /etc")
    got = one.host.run("curl", "-s", "-m", "5", "http://198.51.100.2:8080/hostname", check=False)
    assert got.returncode == 0, "a published port, at the node where the container is"
    two.host.sh("ip netns pids b | xargs kill")
    two.host.sh("nft flush ruleset")
    wait_until(lambda: "vteps" in two.host.sh("nft list tables; nft list ruleset"), what="the repair")
    reaches(one, "a", second)
    tunnel = two.host.sh("ip -o link | grep -o 'nsvx-[0-9a-f]*' | head -1").strip()
    two.host.sh(f"ip link del {tunnel}")
    reaches(one, "a", second)
