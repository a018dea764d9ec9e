"""Networks that span nodes: created once, claimed in etcd, known on every node, finished later when etcd was away."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

from cluster.lab import UNDERLAY, Etcd3, restart
from cluster.test_nodes import info, states
from conftest import Node, wait_until


def create(node: Node, name: str = "app", *flags: str) -> str:
    return node.out("network", "create", "-d", "spanning", *flags, name)


def connect(node: Node, sandbox: str, network: str = "app", *flags: str) -> str:
    """Attach a new namespace and return its address."""
    path = node.host.netns(sandbox)
    node.cli("network", "connect", network, "--netns", path, "--name", sandbox, *flags)
    return address_of(node, sandbox)


def address_of(node: Node, sandbox: str) -> str:
    return node.host.sh(f"ip -n {sandbox} -4 -o addr show dev eth0 | awk '{{print $4}}' | cut -d/ -f1").strip()


def told(node: Node, network_id: str) -> dict[str, list[str]]:
    """What the driver was told of other nodes: address -> MAC, VTEP."""
    text = node.host.sh("cat /run/netns/.spanning.json 2>/dev/null || echo '{}'")
    return json.loads(text or "{}").get(network_id, {})


def resolves(node: Node, sandbox: str, name: str) -> str:
    done = node.host.run(
        "ip", "netns", "exec", sandbox, "dig", "+short", "+time=1", "+tries=1", "@127.0.0.11", name, check=False
    )
    return " ".join(sorted(re.findall(r"^[0-9.]+$", done.stdout, re.MULTILINE)))


def joined(nodes: list[Node]) -> None:
    for node in nodes:
        wait_until(lambda node=node: list(states(node).values()) == ["up"] * len(nodes), what="all nodes")


def test_networks_and_endpoints_are_known_everywhere(etcd3: Etcd3, nodes3: list[Node]) -> None:
    one, two, three = nodes3
    joined(nodes3)
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


def test_addresses_have_one_holder(etcd3: Etcd3, nodes3: list[Node]) -> None:
    joined(nodes3)
    one, two, _ = nodes3
    create(one, "app", "--subnet", "10.9.0.0/26")
    for node in nodes3:
        wait_until(lambda node=node: "app" in node.out("network", "ls"), what="the network")
    with ThreadPoolExecutor(3) as pool:
        found = list(
            pool.map(lambda pair: connect(pair[0], pair[1]), [(node, f"s{i}") for i in range(6) for node in nodes3])
        )
    assert len(set(found)) == len(found) == 18
    connect(one, "static", "app", "--ip", "10.9.0.60")
    two.host.netns("other")
    taken = two.cli("network", "connect", "app", "--netns", "/run/netns/other", "--ip", "10.9.0.60", check=False)
    assert taken.returncode == 1
    assert "10.9.0.60" in taken.stderr
    assert "static" in taken.stderr


def test_a_lost_nodes_names_go_and_its_addresses_stay(etcd3: Etcd3, nodes3: list[Node]) -> None:
    joined(nodes3)
    one, two, three = nodes3
    network = create(one)
    connect(one, "a")
    second = connect(two, "b")
    wait_until(lambda: resolves(one, "a", "b") == second, what="b's name")
    two.kill()
    wait_until(lambda: not resolves(one, "a", "b"), seconds=16, what="the end of its names")
    assert second not in told(one, network)
    three.host.netns("c")
    taken = three.cli("network", "connect", "app", "--netns", "/run/netns/c", "--ip", second, check=False)
    assert "is taken by endpoint b on node n2" in taken.stderr
    restart(two)
    wait_until(lambda: resolves(one, "a", "b") == second, what="its return")
    assert told(one, network)[second][1] == f"{UNDERLAY}.2"
    two.kill()
    wait_until(lambda: states(one)["n2"] == "down", seconds=16, what="its loss")
    one.cli("node", "rm", "n2")
    three.cli("network", "connect", "app", "--netns", "/run/netns/c", "--ip", second)
    restart(two)  # it comes back after all, and what it held has another holder
    wait_until(lambda: "evict" in two.out("system", "events", "--since", "0", "--until-now"), what="the eviction")
    wait_until(lambda: address_of(two, "b") == "", what="its end")
    assert address_of(three, "c") == second


def test_without_etcd(etcd3: Etcd3, nodes3: list[Node]) -> None:
    joined(nodes3)
    one, two, _ = nodes3
    network = create(one)
    create(two, "unused")
    first, second = connect(one, "a"), connect(two, "b")
    wait_until(lambda: resolves(one, "a", "b") == second, what="b's name")
    wait_until(lambda: "unused" in one.out("network", "ls"), what="the other network")
    etcd3.kill(0, 1, 2)
    wait_until(lambda: info(one)["state"] == "away", what="the loss of etcd")
    assert resolves(one, "a", "b") == second, "what runs goes on"
    one.host.netns("c")
    began = time.monotonic()
    refused = one.cli("network", "connect", "app", "--netns", "/run/netns/c", check=False)
    assert time.monotonic() - began < 2, "at once"
    assert "the cluster is not available: " in refused.stderr
    assert "etcd does not answer" in refused.stderr
    refused = one.cli("network", "create", "-d", "spanning", "more", check=False)
    assert "the cluster is not available" in refused.stderr
    assert "10.0." not in one.host.sh("ip -n c -o addr")
    one.kill()
    one.host.sh("rm /run/netns/.spanning.json")
    restart(one)
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
    joined(nodes3)
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
