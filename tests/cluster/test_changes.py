"""Networks that span nodes change, and are policed, on all of them."""

from __future__ import annotations

import json

from conftest import Node, wait_until

from cluster.lab import Etcd3, connect, info, known, pings, reaches, restart


def spec(node: Node) -> dict:
    return json.loads(node.out("network", "inspect", "app"))[0]["spec"]


def test_a_network_changes_on_every_node(etcd3: Etcd3, nodes3: list[Node]) -> None:
    one, two, three = nodes3
    one.cli("network", "create", "-d", "overlay", "--subnet", "10.92.0.0/24", "app")
    known(nodes3, "app")
    first, second = connect(one, "a"), connect(two, "b")
    reaches(one, "a", second)
    mtu = "com.docker.network.driver.mtu"
    two.cli("network", "update", "--label-add", "team=x", "-o", f"{mtu}=1300", "--subnet-add", "10.93.0.0/24", "app")
    for node in nodes3:
        wait_until(lambda node=node: spec(node)["options"] == {mtu: "1300"}, what="the change")
        assert len(spec(node)["ipam"]) == 2
    wait_until(lambda: "mtu 1300" in one.host.sh("ip -n a link show eth0"), what="the MTU of what is attached")
    assert connect(three, "c", "app", "--ip", "10.93.0.9") == "10.93.0.9"
    reaches(one, "a", "10.93.0.9")
    refused = one.cli("network", "update", "--subnet-add", "10.92.0.0/16", "app", check=False)
    assert "overlaps" in refused.stderr
    etcd3.kill(0, 1, 2)
    wait_until(lambda: info(one)["state"] == "away", what="the loss of etcd")
    assert (
        "the cluster is not available" in one.cli("network", "update", "--label-add", "a=b", "app", check=False).stderr
    )
    assert pings(two, "b", first)


def test_policies_select_endpoints_of_other_nodes(nodes3: list[Node]) -> None:
    one, two, three = nodes3
    one.cli("network", "create", "-d", "overlay", "--policy-default", "deny", "app")
    known(nodes3, "app")
    connect(one, "web", "app", "--label", "tier=web")
    database = connect(two, "db", "app", "--label", "tier=db")
    connect(three, "other", "app")
    three.cli("policy", "create", "--network", "app", "--from", "label=tier=web", "--to", "label=tier=db",
              "--port", "icmp", "p")  # fmt: skip
    reaches(one, "web", database)
    assert not pings(three, "other", database)
    assert "p" in two.out("policy", "ls")
    late = connect(three, "late", "app", "--label", "tier=web")
    reaches(three, "late", database)
    assert not pings(two, "db", late), "only who is allowed begins"
    one.kill()
    restart(one)
    reaches(one, "web", database)
    for node in nodes3:
        wait_until(lambda node=node: not node.cli("system", "check", check=False).returncode, what="agreement")
    two.cli("policy", "rm", "p")
    wait_until(lambda: not pings(one, "web", database), what="its end on n1")
    assert "p" not in one.out("policy", "ls", "-q", "--filter", "name=p")
