"""Nodes of an overlay network that are restarted and lost; etcd that is away for longer than a lease."""

from __future__ import annotations

import subprocess
import time

from cluster.lab import Etcd3, restart
from cluster.test_nodes import info
from cluster.test_overlay import pings, reaches
from cluster.test_spanning import connect, joined, resolves
from conftest import Node, wait_until


def test_restarts_lose_no_packet_and_lost_nodes_get_none(etcd3: Etcd3, nodes3: list[Node]) -> None:
    joined(nodes3)
    one, two, three = nodes3
    one.cli("network", "create", "-d", "overlay", "app")
    for node in nodes3:
        wait_until(lambda node=node: "app" in node.out("network", "ls"), what="the network")
    addresses = {name: connect(node, name) for node, name in zip(nodes3, "abc", strict=True)}
    reaches(two, "b", addresses["a"])
    reaches(one, "a", addresses["c"])
    pinging = two.host.command("ip", "netns", "exec", "b", "ping", "-i", "0.05", "-c", "60", "-q", addresses["a"])
    with subprocess.Popen(pinging, stdout=subprocess.PIPE, text=True) as ping:
        one.kill()
        restart(one)
        assert " 0% packet loss" in ping.communicate()[0]
    three.kill()
    wait_until(lambda: not resolves(one, "a", "c"), seconds=16, what="the loss of n3")
    assert not pings(one, "a", addresses["c"]), "nothing is sent to a node that is lost"
    assert pings(one, "a", addresses["b"])
    restart(three)
    reaches(one, "a", addresses["c"])


def test_nobody_is_lost_while_etcd_is_away(etcd3: Etcd3, nodes3: list[Node]) -> None:
    joined(nodes3)
    one, two, _ = nodes3
    one.cli("network", "create", "-d", "overlay", "app")
    wait_until(lambda: "app" in two.out("network", "ls"), what="the network")
    connect(one, "a")
    second = connect(two, "b")
    reaches(one, "a", second)
    etcd3.kill(0, 1, 2)
    wait_until(lambda: info(one)["state"] == "away", what="the loss of etcd")
    time.sleep(12)  # longer than a lease
    assert pings(one, "a", second)
    assert resolves(one, "a", "b") == second
    etcd3.start(0, 1, 2)
    wait_until(lambda: info(one)["state"] == "joined", seconds=20, what="etcd")
    assert pings(one, "a", second)
    assert resolves(one, "a", "b") == second
