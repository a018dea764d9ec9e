"""Nodes that hear each other one way alone, or etcd; and a clock that is wrong: nobody loses what is its own."""

from __future__ import annotations

import json
import time

import pytest
from conftest import Node, wait_until
from shifted import LIBRARY, environment, shift

from cluster.lab import ClusterNode, Etcd3, address_of, connect, info, known, pings, reaches, resolves, restart, states

ETCD = [21, 22, 23]


def events(node: Node) -> list[str]:
    return node.out("system", "events", "--since", "0", "--until-now").splitlines()


def test_one_way_between_nodes(etcd3: Etcd3, nodes3: list[Node]) -> None:
    """n1 hears n2, and n2 does not hear n1: both are up, nothing is taken from anybody, and it is told between whom."""
    one, two, three = nodes3
    one.cli("network", "create", "-d", "overlay", "app")
    known(nodes3, "app")
    first, second, third = (connect(node, name) for node, name in zip(nodes3, "abc", strict=True))
    reaches(one, "a", second)
    reaches(three, "c", first)
    etcd3.underlay.cut_between([1], [2])
    assert not pings(one, "a", second)
    assert not pings(two, "b", first)
    assert pings(one, "a", third)
    assert pings(two, "b", third)
    found = json.loads(three.cli("network", "check", "app", "--format", "json", check=False).stdout)
    lost = {each["node"]: [p["node"] for p in each["probes"] if not p["received"]] for each in found}
    assert lost == {"n1": ["n2"], "n2": ["n1"], "n3": []}
    assert set(states(three).values()) == {"up"}
    assert resolves(one, "a", "b") == second, "its node holds its lease"
    etcd3.underlay.heal()
    reaches(one, "a", second)
    reaches(two, "b", first)


def test_one_way_to_etcd(etcd3: Etcd3, nodes3: list[Node]) -> None:
    """n2 hears nothing of etcd, which hears it; n3 is not heard by etcd, which it hears: both are lost, and come back."""
    one, two, three = nodes3
    one.cli("network", "create", "-d", "overlay", "app")
    known(nodes3, "app")
    first, second, third = (connect(node, name) for node, name in zip(nodes3, "abc", strict=True))
    reaches(two, "b", third)
    etcd3.underlay.cut_between(ETCD, [2])
    etcd3.underlay.cut_between([3], ETCD)
    cut = time.monotonic()
    wait_until(lambda: states(one) == {"n1": "up", "n2": "down", "n3": "down"}, seconds=20, what="the loss of both")
    assert time.monotonic() - cut < 16
    for node, name in ((two, "b"), (three, "c")):
        wait_until(lambda node=node: info(node)["state"] == "away", what="what they know themselves")
        assert not resolves(one, "a", name)
        refused = node.cli("network", "connect", "app", "--netns", node.host.netns("d"), check=False)
        assert "the cluster is not available" in refused.stderr
    reaches(two, "b", third)
    for address in (second, third):
        taken = one.cli(
            "network", "connect", "app", "--netns", one.host.netns(f"x{address}"), "--ip", address, check=False
        )
        assert "is taken by endpoint" in taken.stderr
    etcd3.underlay.heal()
    wait_until(lambda: set(states(one).values()) == {"up"}, seconds=20, what="both again")
    reaches(one, "a", second)
    reaches(one, "a", third)
    wait_until(lambda: resolves(one, "a", "b") == second and resolves(one, "a", "c") == third, what="their names")
    assert [address_of(node, name) for node, name in zip(nodes3, "abc", strict=True)] == [first, second, third]
    assert not [line for node in nodes3 for line in events(node) if "evict" in line]


@pytest.mark.skipif(LIBRARY is None, reason="needs faketime(1): scripts/setup installs it")
def test_a_node_whose_clock_jumps_stays(nodes3: list[Node]) -> None:
    one, _, three = nodes3
    assert isinstance(three, ClusterNode)
    shift(three.place, 0)
    three.environment = environment(three.place)
    three.kill()
    restart(three)
    try:
        one.cli("network", "create", "-d", "overlay", "app")
        known(nodes3, "app")
        wait_until(lambda: info(three)["state"] == "joined", what="n3")
        before = [line for line in events(one) if " node " in line]
        first = connect(one, "a")
        for number, days in enumerate((1, -1, 0)):
            shift(three.place, days)
            time.sleep(3.5)  # all in all longer than a lease
            address = connect(three, f"c{number}")
            reaches(one, "a", address)
            wait_until(lambda number=number, of=address: resolves(one, "a", f"c{number}") == of, what="its name")
            assert info(three)["state"] == "joined"
        assert [line for line in events(one) if " node " in line] == before
        reaches(three, "c0", first)
    finally:
        three.environment = []
        three.kill()
        restart(three)
