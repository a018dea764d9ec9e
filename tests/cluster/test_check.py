"""`network check`: what each node holds of a network, and what passes between each pair of them."""

from __future__ import annotations

import json
import re

from conftest import Node, wait_until

from cluster.lab import Etcd3, connect, info, known, pings, reaches, states


def check(node: Node, *, status: int) -> dict[str, dict]:
    done = node.cli("network", "check", "app", "--format", "json", check=False)
    assert done.returncode == status, done.stdout
    return {each["node"]: each for each in json.loads(done.stdout)}


def test_what_differs_and_what_does_not_pass_is_named(etcd3: Etcd3, nodes3: list[Node]) -> None:
    one, two, three = nodes3
    one.cli("network", "create", "-d", "overlay", "app")
    known(nodes3, "app")
    connect(one, "a")
    second = connect(two, "b")
    reaches(one, "a", second)
    found = check(three, status=0)
    assert [each["used"] for each in found.values()] == [True, True, False]
    (probe,) = found["n1"]["probes"]
    assert (probe["node"], probe["sent"], probe["received"], probe["mtu"]) == ("n2", 5, 5, 1450)
    assert 0 < float(probe["latency"].removesuffix("s")) < 1
    assert [each["node"] for each in found["n2"]["probes"]] == ["n1"]
    shown = three.out("network", "check", "app")
    assert "n3     nothing: it has no endpoint there" in shown
    assert "n1     n2   10.0.0" in shown

    mac = two.host.sh('ip -n b -j link show eth0 | grep -o \'"address":"[^"]*\' | cut -d\'"\' -f4').strip()
    tunnel = one.host.sh("ip -o link | grep -o 'nsvx-[0-9a-f]*' | head -1").strip()
    one.host.sh(f"bridge fdb del {mac} dev {tunnel} dst 198.51.100.2 self")
    found = check(three, status=1)
    assert found["n1"]["findings"][0] == "1 remote endpoint(s) missing, 0 that are no more"
    assert found["n2"]["findings"] == []
    one.cli("system", "check", "--repair", check=False)

    wire = etcd3.underlay
    wire.host.sh(
        "nft 'add table bridge cut; add chain bridge cut forward { type filter hook forward priority 0; };"
        "add rule bridge cut forward udp dport 4789 meta length > 1400 drop'"
    )
    (probe,) = check(one, status=1)["n2"]["probes"]
    assert (probe["received"], 1342 < probe["mtu"] <= 1350) == (5, True), probe
    assert "large packets are lost" in one.cli("network", "check", "app", check=False).stdout
    wire.heal()

    wire.cut_between([1], [2])
    three.kill()
    found = check(one, status=1)
    assert found["n1"]["probes"][0]["received"] == 0
    assert found["n3"]["error"].startswith("no answer in 6 s: its netstored stopped")
    wire.heal()


def test_nodes_that_are_away_read_well(etcd3: Etcd3, nodes3: list[Node]) -> None:
    """What is shown of a node that is down, and of all others on one that is cut off."""
    one, two, three = nodes3
    one.cli("network", "create", "-d", "overlay", "app")
    known(nodes3, "app")
    connect(one, "a")
    reaches(one, "a", connect(two, "b"))
    assert "state of: up, down, unknown" in one.cli("node", "ls", "--filter", "state=dow", check=False).stderr
    assert "n1     what the store says" in one.out("network", "check", "bridge")
    three.kill()
    wait_until(lambda: states(one)["n3"] == "down", seconds=16, what="the loss of n3")
    assert [line.split()[1] for line in one.out("node", "ls", "--filter", "state=down").splitlines()] == ["NAME", "n3"]
    shown = one.cli("network", "check", "app", check=False).stdout
    assert "n3     down: its netstored does not run, or is cut off from etcd" in shown

    etcd3.underlay.cut(2)
    shown = one.cli("network", "check", "app", check=False).stdout
    assert re.search(r"^n1 +n2 +10\.0\.0\.\d+ +unreachable +0/5$", shown, re.MULTILINE), shown
    wait_until(lambda: info(two)["state"] == "away", seconds=16, what="n2 to know that it is cut off")
    shown = two.cli("network", "check", "app", check=False).stdout
    assert re.search(r"^n1 +not asked: [a-z' ]+: etcd does not answer( within 4 s|: .*)$", shown, re.MULTILINE), shown
    assert "Deadline" not in shown
    assert "nodes up when last seen" in two.out("system", "info")


def test_a_network_of_one_node(node: Node) -> None:
    assert "self   what the store says" in node.out("network", "check", "bridge")


def test_policies_let_the_nodes_probes_in_and_nothing_more(nodes3: list[Node]) -> None:
    one, two, _ = nodes3
    one.cli("network", "create", "-d", "overlay", "--policy-default", "deny", "app")
    known(nodes3, "app")
    connect(one, "a")
    second = connect(two, "b")
    found = check(one, status=0)
    (probe,) = found["n1"]["probes"]
    assert (probe["node"], probe["received"], probe["mtu"]) == ("n2", 5, 1450)
    assert not pings(one, "a", probe["address"]), "an endpoint's ping is not a node's"
    assert not pings(two, "b", probe["address"])
    assert not pings(one, "", second)
    two.host.sh("nft flush ruleset")
    wait_until(lambda: "policed" in two.host.sh("nft list ruleset"), what="the repair")
    wait_until(lambda: not one.cli("network", "check", "app", check=False).returncode, what="the probes")
