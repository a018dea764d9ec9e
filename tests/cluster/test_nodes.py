"""Nodes of a cluster: they join, are lost, come back, are drained and removed; duplicates are refused."""

from __future__ import annotations

import json
import shutil
import time

import grpc
import pytest
from conftest import Node, wait_until

from cluster.lab import (
    UNDERLAY,
    Etcd3,
    address_of,
    connect,
    info,
    known,
    new_node,
    reaches,
    resolves,
    restart,
    states,
    stop_nodes,
)
from netstore.api.v1 import node_pb2 as pb
from netstore.client import BlockingClient as Client


def test_nodes_join_are_drained_and_removed(nodes3: list[Node]) -> None:
    one, two, three = nodes3
    shown = one.out("node", "ls")
    assert "ADDRESS" in shown
    assert f"{UNDERLAY}.2" in shown
    assert shown.count("*") == 1
    assert "joined as n1 (198.51.100.1), 3 of 3 nodes up" in one.out("system", "info")
    assert json.loads(one.out("node", "inspect", "n2"))[0]["status"]["address"] == f"{UNDERLAY}.2"
    assert "is up" in one.cli("node", "rm", "n2", check=False).stderr
    assert "is this one" in one.cli("node", "rm", "-f", "n1", check=False).stderr
    one.cli("node", "drain", "n3")
    assert "Drain" in three.out("node", "ls", "--filter", "name=n3")
    restarted = time.monotonic()
    three.kill()
    restart(three)
    assert "Drain" in three.out("node", "ls", "--filter", "name=n3"), "it stays drained"
    assert time.monotonic() - restarted < 9
    assert states(one)["n3"] == "up", "a quick restart is no loss"
    three.cli("node", "undrain", "self")
    assert "Active" in one.out("node", "ls", "--filter", "name=n3")
    three.kill()
    one.cli("node", "rm", "-f", "n3")
    wait_until(lambda: set(states(two)) == {"n1", "n2"}, what="the removal")
    events = two.out("system", "events", "--since", "0", "--until-now", "--filter", "kind=node")
    assert [line.split()[3] for line in events.splitlines() if " n3" in line][-1] == "remove"
    restart(three)
    wait_until(lambda: states(one).get("n3") == "up", what="the removed node joins again when it is restarted")


def test_a_registration_of_an_earlier_session_is_made_late(nodes3: list[Node], etcd3: Etcd3) -> None:
    """It binds the node to a lease that nobody keeps: the node begins anew when that ends."""
    node_id = json.loads(nodes3[0].out("node", "inspect", "n2"))[0]["id"]
    lease = etcd3.ctl("lease", "grant", "2").split()[1]
    alive = f"/netstore/1/state/alive/{node_id}"
    value = etcd3.ctl("get", alive, "--print-value-only").strip()
    etcd3.ctl("put", alive, value, f"--lease={lease}")
    wait_until(lambda: etcd3.ctl("lease", "timetolive", lease).find("already expired") >= 0, what="its end")
    wait_until(lambda: states(nodes3[0])["n2"] == "up" and value in etcd3.ctl("get", alive), what="n2's return")


def test_a_node_that_comes_back_with_another_address_is_reached_there(nodes3: list[Node]) -> None:
    """Its tunnels were made with the one before, which nobody hears any more."""
    one, two, _ = nodes3
    one.cli("network", "create", "-d", "overlay", "moved")
    known(nodes3, "moved")
    connect(one, "stays", "moved")
    address = connect(two, "moves", "moved")
    reaches(one, "stays", address)
    file = two.place / "cluster.toml"
    before, other = file.read_text(), f"{UNDERLAY}.62"
    try:
        for text, told in ((before.replace(f'"{UNDERLAY}.2"', f'"{other}"'), other), (before, f"{UNDERLAY}.2")):
            two.host.sh(f"ip addr replace {other}/24 dev eth0")
            file.write_text(text)
            two.kill()
            restart(two)
            wait_until(lambda told=told: told in one.out("node", "inspect", "n2"), what="its other address")
            reaches(one, "stays", address)
            reaches(two, "moves", address_of(one, "stays"))
            wait_until(lambda: not two.cli("system", "check", check=False).returncode, what="all of it in order")
    finally:
        file.write_text(before)
        two.host.sh(f"ip addr del {other}/24 dev eth0")


def test_bad_values_are_named(nodes3: list[Node]) -> None:
    client = Client(nodes3[0].address)
    for method, request, code, text in (
        ("GetNode", pb.GetNodeRequest(), grpc.StatusCode.INVALID_ARGUMENT, "node"),
        ("GetNode", pb.GetNodeRequest(node="nosuch"), grpc.StatusCode.NOT_FOUND, "nosuch"),
        ("ListNodes", pb.ListNodesRequest(filter=["colour=red"]), grpc.StatusCode.INVALID_ARGUMENT, "colour"),
        ("ListNodes", pb.ListNodesRequest(page_size=-1), grpc.StatusCode.INVALID_ARGUMENT, "page_size"),
        ("DeleteNode", pb.DeleteNodeRequest(node="nosuch"), grpc.StatusCode.NOT_FOUND, "nosuch"),
        ("DeleteNode", pb.DeleteNodeRequest(node="n1"), grpc.StatusCode.FAILED_PRECONDITION, "n1"),
        ("DrainNode", pb.DrainNodeRequest(node="nosuch"), grpc.StatusCode.NOT_FOUND, "nosuch"),
        ("DrainNode", pb.DrainNodeRequest(node="n1", etag="1"), grpc.StatusCode.ABORTED, "n1"),
        ("UndrainNode", pb.UndrainNodeRequest(node="n1", etag="x"), grpc.StatusCode.ABORTED, "n1"),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            getattr(client.nodes, method)(request)
        assert refused.value.code() is code, (method, refused.value)
        assert text in refused.value.details()
    client.nodes.DeleteNode(pb.DeleteNodeRequest(node="nosuch", allow_missing=True))
    client.channel.close()


def test_a_live_node_that_is_removed_is_told(nodes3: list[Node]) -> None:
    one, two, _ = nodes3
    one.cli("node", "rm", "-f", "n2")
    wait_until(lambda: info(two)["state"] == "refused", what="the removal")
    assert "was removed from the cluster" in str(info(two)["message"])
    assert "n2" not in states(one)
    two.cli("network", "create", "local")
    two.kill()
    restart(two)
    wait_until(lambda: states(one).get("n2") == "up", what="its return, once it is restarted")


def test_duplicates_are_refused(etcd3: Etcd3, nodes3: list[Node]) -> None:
    """A second node of a name, or an address, waits until the first is removed."""
    one, _, three = nodes3
    twins = [new_node(etcd3, 4, "n3"), new_node(etcd3, 9, "n9", advertise=3)]
    for twin in twins:
        twin.start_resolver()
        restart(twin)
    try:
        for twin, taken in zip(twins, ("the node name n3", f"the address {UNDERLAY}.3 (advertise)"), strict=True):
            wait_until(lambda twin=twin: info(twin)["state"] == "refused", what="the refusal")
            assert f"{taken} is taken by node" in str(info(twin)["message"])
            refused = twin.cli("node", "drain", "n1", check=False)
            assert refused.returncode == 1
            assert f"{taken} is taken" in refused.stderr
            assert "WARNING: cluster:" in twin.cli("system", "info").stderr
            twin.cli("network", "create", "local")
        assert states(one) == {"n1": "up", "n2": "up", "n3": "up"}
        three.kill()
        one.cli("node", "rm", "-f", "n3")
        everybody = {"n1": "up", "n2": "up", "n3": "up", "n9": "up"}
        wait_until(lambda: states(one) == everybody, what="both, once what they wait for is free")
    finally:
        stop_nodes(twins)
    for name in ("n3", "n9"):
        one.cli("node", "rm", "-f", name)


def test_a_copied_state_directory_is_refused(etcd3: Etcd3, nodes3: list[Node]) -> None:
    """Two machines with one node id, whether the copy has a configuration of its own or not: the first goes on."""
    one, two, _ = nodes3
    one.cli("network", "create", "-d", "overlay", "app")
    known(nodes3, "app")
    address, second = connect(one, "a"), connect(two, "b")
    reaches(two, "b", address)
    for machine, name, advertise in ((5, "n5", 5), (6, "n1", 1)):
        twin = new_node(etcd3, machine, name, advertise=advertise)
        shutil.copytree(one.place / "state", twin.place / "state")
        twin.start_resolver()
        restart(twin)
        try:
            wait_until(lambda twin=twin: info(twin)["state"] == "refused", what="the refusal")
            assert f"is in use by node n1 ({UNDERLAY}.1)" in str(info(twin)["message"])
            refused = twin.cli("network", "connect", "app", "--netns", twin.host.netns("c"), check=False)
            assert "was the state directory copied from there? begin with an empty one" in refused.stderr
        finally:
            stop_nodes([twin])
        assert states(two) == {"n1": "up", "n2": "up", "n3": "up"}
        assert resolves(two, "b", "a") == address
        reaches(one, "a", second)


def test_a_node_alone_says_so(node: Node) -> None:
    refused = node.cli("node", "ls", check=False)
    assert refused.returncode == 1
    assert "this node is in no cluster" in refused.stderr
