"""Networks that span nodes: created once, claimed in etcd, known on every node, finished later when etcd was away."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

from conftest import Node, wait_until

from cluster.lab import UNDERLAY, Etcd3, connect, info, known, resolves, restart, states


def create(node: Node, name: str = "app", *flags: str) -> str:
    return node.out("network", "create", "-d", "spanning", *flags, name)


def told(node: Node, network_id: str) -> dict[str, list[str]]:
    """What the driver was told of other nodes: address -> MAC, VTEP."""
    text = node.host.sh("cat /run/netns/.spanning.json 2>/dev/null || echo '{}'")
    return json.loads(text or "{}").get(network_id, {})


def test_networks_and_endpoints_are_known_everywhere(etcd3: Etcd3, nodes3: list[Node]) -> None:
    one, two, three = nodes3
    network = create(one)
    assert create(two) == network, "created once: the same name and spec is the same network"
    differs = three.cli("network", "create", "-d", "spanning", "--internal", "app", check=False)
    assert "differs" in differs.stderr
    inspected = json.loads(three.out("network", "inspect", "app"))[0]
    assert inspected["status"]["ipam"][0]["subnet"] == "10.0.0.0/24"
    assert inspected["status"]["scope"] == "NETWORK_SCOPE_GLOBAL"
    assert "global" in three.out("network", "ls", "--filter", "scope=global")
    assert "app" not in three.out("network", "ls", "--filter", "scope=local")
    first, second = connect(one, "a"), connect(two, "b")
    assert first != second
    wait_until(lambda: second in told(one, network), what="b on n1")
    assert told(one, network)[second][1] == f"{UNDERLAY}.2"
    wait_until(lambda: first in told(two, network), what="a on n2")
    assert told(three, network) == {}, "a network that a node does not use is not in its kernel"
    wait_until(lambda: resolves(one, "a", "b") == second, what="b's name on n1")
    assert resolves(two, "b", "a.app") == first
    third = connect(three, "c")
    assert third in ({f"10.0.0.{n}" for n in range(2, 255)} - {first, second})
    assert {first, second} <= told(three, network).keys(), "all is known before the first packet"
    two.cli("network", "disconnect", "app", "--netns", "/run/netns/b")
    wait_until(lambda: second not in told(one, network) and not resolves(one, "a", "b"), what="b's end")
    in_use = two.cli("network", "rm", "app", check=False)
    assert "endpoint(s) on other nodes: a, c" in in_use.stderr
    one.cli("network", "disconnect", "app", "--netns", "/run/netns/a")
    three.cli("network", "disconnect", "app", "--netns", "/run/netns/c")
    wait_until(lambda: two.cli("network", "rm", "app", check=False).returncode == 0, what="the network's end")
    for node in nodes3:
        wait_until(lambda node=node: "app" not in node.out("network", "ls"), what="its end everywhere")
        assert "kernel and store agree" in node.out("system", "check")
    assert etcd3.ctl("get", "--prefix", "/netstore/1/claims/addresses", "--keys-only").strip() == ""
    assert etcd3.ctl("get", "--prefix", "/netstore/1/state/endpoints", "--keys-only").strip() == ""


def test_addresses_have_one_holder(nodes3: list[Node]) -> None:
    one, two, _ = nodes3
    create(one, "app", "--subnet", "10.9.0.0/26")
    known(nodes3, "app")
    with ThreadPoolExecutor(3) as pool:
        found = list(
            pool.map(lambda pair: connect(pair[0], pair[1]), [(node, f"s{i}") for i in range(6) for node in nodes3])
        )
    assert len(set(found)) == len(found) == 18
    for node in (two, one, two, nodes3[2]):  # what is given back is free at once, everywhere
        connect(node, "static", "app", "--ip", "10.9.0.60")
        node.cli("network", "disconnect", "app", "--netns", "/run/netns/static")
        node.host.sh("ip netns delete static")
    connect(one, "static", "app", "--ip", "10.9.0.60")
    two.host.netns("other")
    taken = two.cli("network", "connect", "app", "--netns", "/run/netns/other", "--ip", "10.9.0.60", check=False)
    assert taken.returncode == 1
    assert "10.9.0.60" in taken.stderr
    assert "static" in taken.stderr


def test_without_etcd(etcd3: Etcd3, nodes3: list[Node]) -> None:
    one, two, _ = nodes3
    network = create(one)
    create(two, "unused")
    first, second = connect(one, "a"), connect(two, "b")
    wait_until(lambda: resolves(one, "a", "b") == second, what="b's name")
    wait_until(lambda: "unused" in one.out("network", "ls"), what="the other network")
    etcd3.kill(0, 1, 2)
    wait_until(lambda: info(one)["state"] == "away", what="the loss of etcd")
    assert states(one) == {"n1": "up", "n2": "unknown", "n3": "unknown"}
    assert resolves(one, "a", "b") == second, "what runs goes on"
    one.host.netns("c")
    began = time.monotonic()
    refused = one.cli("network", "connect", "app", "--netns", "/run/netns/c", check=False)
    assert time.monotonic() - began < 5, "at once"
    assert "the cluster is not available: " in refused.stderr
    assert "etcd does not answer" in refused.stderr
    for asked in (("network", "create", "-d", "spanning", "more"), ("node", "drain", "n2")):
        began = time.monotonic()
        refused = one.cli(*asked, check=False)
        assert time.monotonic() - began < 5, "at once"
        assert refused.returncode == 1
        assert "the cluster is not available" in refused.stderr
    one.cli("network", "create", "local")
    one.cli("network", "connect", "local", "--netns", "/run/netns/c")
    assert "10.0." not in one.host.sh("ip -n c -o addr")
    one.kill()
    one.host.sh("rm /run/netns/.spanning.json")
    began = time.monotonic()
    restart(one)
    assert time.monotonic() - began < 20, "a node starts without etcd"
    assert second in told(one, network), "the data plane comes back without etcd"
    assert resolves(one, "a", "b") == second
    one.cli("network", "disconnect", "app", "--netns", "/run/netns/a")
    one.cli("network", "rm", "unused")
    etcd3.start(0, 1, 2)
    for node in nodes3:
        wait_until(lambda node=node: "unused" not in node.out("network", "ls"), seconds=20, what="the removal, later")
    wait_until(lambda: first not in told(two, network), what="a's end on n2")
    wait_until(lambda: not resolves(two, "b", "a"), what="the end of a's name")
    connect(one, "d")


def test_containers_reserve_and_drained_nodes_refuse(etcd3: Etcd3, nodes3: list[Node], busybox_tar: object) -> None:
    one, two, _ = nodes3
    network = create(one)
    two.cli("image", "import", str(busybox_tar), "bb", "--cmd", "sleep 1000")
    connect(one, "a")
    wait_until(lambda: "app" in two.out("network", "ls"), what="the network on n2")
    two.cli("create", "--name", "web", "--network", "app", "--network-alias", "www", "bb")
    (record,) = [
        json.loads(text)
        for text in etcd3.ctl("get", "--prefix", "/netstore/1/state/endpoints", "--print-value-only").split()
        if '"web"' in text
    ]
    assert not record["attached"]
    assert not resolves(one, "a", "web"), "a reservation has no name yet"
    two.cli("start", "web")
    wait_until(lambda: resolves(one, "a", "www") == record["addresses"][0], what="its alias")
    assert record["addresses"][0] in told(one, network)
    two.cli("stop", "-t", "0", "web")
    wait_until(lambda: not resolves(one, "a", "web"), what="its end")
    assert record["addresses"][0] not in told(one, network)
    two.cli("node", "drain", "self")
    refused = two.cli("create", "--name", "other", "--network", "app", "bb", check=False)
    assert "node n2 is drained" in refused.stderr
    assert "other" not in two.out("ps", "-a")
    two.cli("start", "web")  # what is reserved may run
    wait_until(lambda: resolves(one, "a", "web"), what="its return")


def test_what_is_refused(nodes3: list[Node]) -> None:
    one, two, three = nodes3
    vni = "com.docker.network.driver.overlay.vxlanid_list"
    one.cli("network", "create", "-d", "overlay", "-o", f"{vni}=5000", "--subnet", "10.5.0.0/24", "app")
    wait_until(lambda: "app" in two.out("network", "ls"), what="the network on n2")
    for flags, text in (
        (("-o", f"{vni}=5000"), "VNI 5000 is taken by network app"),
        (("--subnet", "10.5.0.0/25"), "subnet 10.5.0.0/25 overlaps 10.5.0.0/24 of network app"),
        (("-o", f"{vni}=16777216"), "16777216"),
        (("-o", "encrypted=true"), "encrypted"),
    ):
        refused = two.cli("network", "create", "-d", "overlay", *flags, "other", check=False)
        assert refused.returncode == 1
        assert text in refused.stderr
    assert "other" not in one.out("network", "ls")
    # A network of n3 alone stands in the way of one of the cluster, there and nowhere else.
    three.cli("network", "create", "--subnet", "10.6.0.0/24", "mine")
    one.cli("network", "create", "-d", "overlay", "--subnet", "10.7.0.0/24", "mine")
    one.cli("network", "create", "-d", "overlay", "--subnet", "10.6.0.0/16", "wide")
    wait_until(lambda: three.cli("system", "info").stderr.count("is not on this node") == 2, what="the warnings")
    assert "overlay" not in three.out("network", "ls", "--filter", "name=mine")
    second = connect(two, "b", "mine")
    three.cli("network", "rm", "mine")
    wait_until(lambda: "overlay" in three.out("network", "ls", "--filter", "name=mine"), what="the cluster's network")
    connect(three, "c", "mine")
    wait_until(lambda: resolves(three, "c", "b") == second, what="what was there before")
    assert "is not on this node" not in three.cli("system", "info").stderr


def test_history_is_compacted_while_a_node_is_cut_off(etcd3: Etcd3, nodes3: list[Node]) -> None:
    one, two, three = nodes3
    network = create(one)
    connect(three, "c")
    second = connect(two, "b")
    wait_until(lambda: second in told(three, network), what="b on n3")
    etcd3.underlay.cut(3)
    two.cli("network", "disconnect", "app", "--netns", "/run/netns/b")
    first = connect(one, "a", "app", "--ip", "10.0.0.77")
    newest = json.loads(etcd3.ctl("get", "x", "-w", "json"))["header"]["revision"]
    etcd3.ctl("compact", str(newest))
    wait_until(lambda: info(three)["state"] == "away", seconds=20, what="n3 to notice")
    etcd3.underlay.heal()
    wait_until(lambda: {first} <= told(three, network).keys(), seconds=20, what="what n3 missed")
    assert told(three, network).get(second, ["", ""])[1] != f"{UNDERLAY}.2", "b is gone; its address may be another's"
    assert not resolves(three, "c", "b")
    assert resolves(three, "c", "a") == first
