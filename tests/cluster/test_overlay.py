"""Overlay networks of a real cluster: containers on three machines, through tunnels between them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from conftest import Node, wait_until

from cluster.lab import (
    UNDERLAY,
    Etcd3,
    address_of,
    connect,
    info,
    known,
    pair_of_ipv6,
    pings,
    reaches,
    resolves,
    restart,
    states,
)


@contextmanager
def streams(node: Node, sandbox: str, *addresses: str) -> Iterator[list[tuple[int, int]]]:
    """Send a packet each millisecond to addresses; afterwards there is how many were sent and answered, of each."""
    command = ["ip", "netns", "exec", sandbox, "ping", "-i", "0.001", "-S", "4000000", "-q"]
    pings = [
        subprocess.Popen(node.host.command(*command, each), stdout=subprocess.PIPE, text=True) for each in addresses
    ]
    counted: list[tuple[int, int]] = []
    yield counted
    for ping in pings:
        ping.send_signal(signal.SIGINT)
    for ping in pings:
        sent, received = re.findall(r"(\d+) packets transmitted, (\d+) received", ping.communicate()[0])[0]
        counted.append((int(sent), int(received)))


def test_three_machines_are_one_network(nodes3: list[Node]) -> None:
    one, two, three = nodes3
    one.cli(
        "network", "create", "-d", "overlay", "--ipv6", "--subnet", "10.90.0.0/16", "--subnet", "fd00:90::/64", "app"
    )
    known(nodes3, "app")
    first, second = connect(one, "a"), connect(two, "b")
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


def test_an_underlay_of_ipv6_and_another_port(etcd3: Etcd3, nodes3: list[Node]) -> None:
    """Two more machines whose tunnels go over IPv6, by a port of their own choice; the network has no way out."""
    with pair_of_ipv6(etcd3, nodes3, (7, 8), more="\ndata-path-port = 4800") as (seven, eight):
        seven.cli("network", "create", "-d", "overlay", "--internal", "--subnet", "10.97.0.0/24", "inner")
        known([seven, eight], "inner")
        first, second = connect(seven, "a", "inner"), connect(eight, "b", "inner")
        reaches(seven, "a", second)
        assert pings(eight, "b", first, "-M", "do", "-s", str(1500 - 70 - 28))
        tunnel = json.loads(seven.host.sh("ip -d -j link show type vxlan"))[0]["linkinfo"]["info_data"]
        assert (tunnel["port"], tunnel["local6"]) == (4800, "fd00:198::7")
        assert not pings(seven, "a", f"{UNDERLAY}.254"), "internal"
        eight.kill()
        restart(eight)
        reaches(seven, "a", second)
        assert seven.out("system", "check") == "kernel and store agree"
        for node, name in ((seven, "a"), (eight, "b")):
            node.cli("network", "disconnect", "inner", "--netns", f"/run/netns/{name}")
        wait_until(lambda: not seven.cli("network", "rm", "inner", check=False).returncode, what="its removal")


def test_what_a_port_and_a_flush_do(nodes3: list[Node]) -> None:
    one, two, _ = nodes3
    one.cli("network", "create", "-d", "overlay", "--subnet", "10.91.0.0/16", "app")
    known(nodes3, "app")
    connect(one, "a")
    second = connect(two, "b", "app", "-p", "8080:80")
    reaches(one, "a", second)
    two.host.sh("ip netns exec b busybox httpd -p 80 -h /etc")
    got = one.host.run("curl", "-s", "-m", "5", "http://198.51.100.2:8080/hostname", check=False)
    assert got.returncode == 0, "a published port, at the node where the container is"
    two.host.sh("nft flush ruleset")
    wait_until(lambda: "vteps" in two.host.sh("nft list tables; nft list ruleset"), what="the repair")
    reaches(one, "a", second)
    tunnel = two.host.sh("ip -o link | grep -o 'nsvx-[0-9a-f]*' | head -1").strip()
    two.host.sh(f"ip link del {tunnel}")
    reaches(one, "a", second)


def test_restarts_lose_no_packet_and_lost_nodes_get_none(nodes3: list[Node]) -> None:
    one, two, three = nodes3
    one.cli("network", "create", "-d", "overlay", "app")
    known(nodes3, "app")
    first, second, third = (connect(node, name) for node, name in zip(nodes3, "abc", strict=True))
    reaches(two, "b", first)
    reaches(one, "a", third)
    with streams(two, "b", first, third) as counted:  # the restarted node's own container, and another's
        one.kill()
        restart(one)
    assert len(counted) == 2
    for sent, received in counted:
        assert sent > 50
        assert sent - received <= 1, "but for the one that was under way in the end"

    # What a lost node has is not answered for, nor given to others, until a person removes it.
    three.kill()
    killed = time.monotonic()
    wait_until(lambda: states(one)["n3"] == "down", seconds=16, what="the loss of n3")
    assert time.monotonic() - killed < 15
    wait_until(lambda: not resolves(one, "a", "c"), what="the end of its names")
    assert not pings(one, "a", third), "nothing is sent to a node that is lost"
    assert pings(one, "a", second)
    two.host.netns("d")
    claim = ("network", "connect", "app", "--netns", "/run/netns/d", "--ip", third)
    assert "is taken by endpoint c on node n3" in two.cli(*claim, check=False).stderr
    restart(three)
    reaches(one, "a", third)
    wait_until(lambda: resolves(one, "a", "c") == third, what="its return")
    three.kill()
    one.cli("node", "rm", "-f", "n3")
    wait_until(lambda: not two.cli(*claim, check=False).returncode, what="its address to be free")
    restart(three)  # it comes back after all, and what it held has another holder
    wait_until(lambda: "evict" in three.out("system", "events", "--since", "0", "--until-now"), what="the eviction")
    wait_until(lambda: address_of(three, "c") == "", what="its end")
    assert address_of(two, "d") == third


def test_what_runs_goes_on_while_etcd_is_away(etcd3: Etcd3, nodes3: list[Node]) -> None:
    one, two, _ = nodes3
    one.cli("network", "create", "-d", "overlay", "app")
    known(nodes3, "app")
    first, second = connect(one, "a"), connect(two, "b")
    reaches(one, "a", second)
    etcd3.kill(0, 1, 2)
    killed = time.monotonic()
    assert pings(two, "b", first)
    one.kill()
    restart(one)
    assert pings(one, "a", second), "the data plane comes back with etcd away"
    refused = one.cli("network", "connect", "app", "--netns", one.host.netns("d"), check=False)
    assert "etcd" in refused.stderr or "cluster" in refused.stderr
    time.sleep(max(0.0, killed + 12 - time.monotonic()))  # longer than a lease
    assert pings(one, "a", second)
    assert resolves(one, "a", "b") == second
    etcd3.start(0, 1, 2)
    wait_until(lambda: info(one)["state"] == "joined", seconds=20, what="etcd")
    assert pings(one, "a", second)
    assert resolves(one, "a", "b") == second
