"""Ports of a container that every node publishes (--mesh)."""

from __future__ import annotations

import sys
from pathlib import Path

from balanced import reached, serving
from conftest import Node, wait_until

from cluster.lab import UNDERLAY, Etcd3, connect, joined, known, restart, states
from cluster.test_direct import answering, asks


def answers(nodes: list[Node], name: str, port: int = 8080) -> None:
    """Wait until every node's port leads to one server."""
    for asked in nodes:
        for number in (1, 2, 3):
            wait_until(
                lambda asked=asked, number=number: (
                    reached(asked, "", f"{UNDERLAY}.{number}", port=port).keys() == {name}
                ),
                what=f"n{number} to lead to {name}",
            )


def closed(node: Node, number: int, port: int = 8080) -> bool:
    connect_ = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1)"
    return node.host.run(sys.executable, "-c", connect_, f"{UNDERLAY}.{number}", str(port), check=False).returncode != 0


def test_every_node_publishes_it(etcd3: Etcd3, nodes3: list[Node]) -> None:
    one, two, three = nodes3
    one.cli("network", "create", "-d", "overlay", "--subnet", "10.84.0.0/16", "app")
    known(nodes3, "app")
    connect(one, "a", "app", "-p", "8080:80", "--mesh")
    with serving(one, "a"):
        answers(nodes3, "a")  # also by nodes without an endpoint of the network
        shown = one.out("port", "ls")
        assert "on every node" in shown
        for node in nodes3:
            assert node.out("system", "check") == "kernel and store agree"

        # One holder in the cluster: endpoints, services, and what a node publishes alone.
        two.host.netns("b")
        refused = two.cli(
            "network", "connect", "app", "--netns", "/run/netns/b", "-p", "8080:80", "--mesh", check=False
        )
        assert "8080/tcp is taken by endpoint a" in refused.stderr
        assert "of another node" in refused.stderr
        refused = two.cli("network", "connect", "app", "--netns", "/run/netns/b", "-p", "8080:80", check=False)
        assert "8080/tcp is taken by endpoint a" in refused.stderr
        refused = three.cli("service", "create", "s", "--network", "app", "-l", "x", "-p", "8080:80", check=False)
        assert "8080/tcp is taken by endpoint a" in refused.stderr

        # What is published here and leads elsewhere is tried again once it is free.
        two.host.netns("c")
        two.cli("network", "create", "local")
        two.cli("network", "connect", "local", "--netns", "/run/netns/c", "--name", "c", "-p", "8081:80")
        endpoint = one.out("endpoint", "ls", "-q").split()[0]
        one.cli("endpoint", "publish", endpoint, "8081:80", "--mesh")
        wait_until(lambda: "port-taken" in two.out("system", "events", "--since", "0", "--until-now"), what="the event")
        wait_until(lambda: reached(two, "", f"{UNDERLAY}.3", port=8081).keys() == {"a"}, what="n3's port")
        two.cli("network", "disconnect", "local", "--netns", "/run/netns/c")
        answers(nodes3, "a", 8081)
        one.cli("endpoint", "unpublish", endpoint, "8081:80")
        wait_until(lambda: all(closed(one, number, 8081) for number in (1, 2, 3)), what="its end")

        # etcd is away, and a node starts again: what runs goes on.
        etcd3.kill(0, 1, 2)
        two.kill()
        restart(two)
        assert reached(three, "", f"{UNDERLAY}.2", port=8080).keys() == {"a"}
        etcd3.start(0, 1, 2)
    joined(nodes3)
    wait_until(
        lambda: not one.cli("network", "disconnect", "app", "--netns", "/run/netns/a", check=False).returncode,
        what="its detachment",
    )
    wait_until(lambda: all(closed(one, number) for number in (1, 2, 3)), what="its end")
    connect(two, "d", "app", "-p", "8080:80", "--mesh")
    with serving(two, "d"):
        answers(nodes3, "d")
    assert etcd3.ctl("get", "--prefix", "/netstore/1/claims/ports", "--keys-only").split() == [
        "/netstore/1/claims/ports/tcp/8080"
    ]
    for node in nodes3:
        assert node.out("system", "check") == "kernel and store agree"


def test_a_lost_nodes_port_is_another_nodes(nodes3: list[Node]) -> None:
    one, two, three = nodes3
    one.cli("network", "create", "-d", "overlay", "-o", "direct=true", "--subnet", "10.85.0.0/16", "app")
    known(nodes3, "app")
    connect(one, "a", "app", "-p", "8080:80", "--mesh")
    with serving(one, "a"):
        answers(nodes3, "a")
        one.kill()
        wait_until(lambda: states(two)["n1"] == "down", seconds=16, what="the loss of n1")
        wait_until(lambda: closed(three, 2) and closed(three, 3), what="the end of its port")
        connect(two, "b", "app", "-p", "8080:80", "--mesh")
        with serving(two, "b"):
            wait_until(lambda: reached(three, "", f"{UNDERLAY}.3", port=8080).keys() == {"b"}, what="the new holder")
            restart(one)  # it learns that its port is another's, which it publishes then, too
            answers(nodes3, "b")
    assert "port-taken" in one.out("system", "events", "--since", "0", "--until-now")
    for node in nodes3:
        assert node.out("system", "check") == "kernel and store agree"


def test_a_container_whose_way_out_is_another_network(etcd3: Etcd3, nodes3: list[Node]) -> None:
    """Answers find their way to a client outside the cluster, whichever node it asked, and whichever way out there is."""
    one, two, _ = nodes3
    wire = etcd3.underlay.host
    one.cli("network", "create", "local")
    one.cli("network", "create", "-d", "overlay", "--subnet", "10.86.0.0/16", "app")
    known(nodes3, "app")
    connect(one, "a", "local")
    inside = ("--netns", "/run/netns/a")
    one.cli("network", "connect", "app", *inside, "--label", "tier=web", "-p", "8080:7777", "--mesh")
    two.cli("service", "create", "web", "--network", "app", "-l", "tier=web", "-p", "8081:7777")

    def clients() -> list[str]:
        places = [(number, port) for number in (1, 2, 3) for port in (8080, 8081)]
        return [asks(wire, f"{UNDERLAY}.{number}", port) for number, port in places]

    with answering(one, "a"):
        wait_until(lambda: all(clients()), what="answers by every node")
        assert all(each.startswith("10.86.") for each in clients())
        assert asks(one.host, f"{UNDERLAY}.1", 8080).startswith("10.86.")
        assert one.out("system", "check") == "kernel and store agree"
        # Where it is the way out, the client's own address is seen by its node.
        one.cli("network", "disconnect", "local", *inside)
        assert clients()[:2] == [f"{UNDERLAY}.254"] * 2
        one.cli("network", "connect", "local", *inside, "--gw-priority", "1")
        assert all(each.startswith("10.86.") for each in clients())
        for node in nodes3:
            assert node.out("system", "check") == "kernel and store agree"


def test_containers(nodes3: list[Node], busybox_tar: Path) -> None:
    one, two, _ = nodes3
    one.cli("image", "import", str(busybox_tar), "bb", "--cmd", "sleep 1000")
    one.cli("network", "create", "-d", "overlay", "app")
    known(nodes3, "app")
    refused = one.cli("run", "-d", "--name", "x", "-p", "8080:80", "--mesh", "bb", check=False)
    assert "network bridge is on this node alone" in refused.stderr
    one.cli("rm", "-f", "x", check=False)
    refused = one.cli("run", "-d", "--name", "x", "--network", "app", "-p", "80", "--mesh", "bb", check=False)
    assert "names its host port" in refused.stderr
    one.cli("rm", "-f", "x", check=False)
    one.cli(
        "run", "-d", "--name", "web", "--network", "bridge", "--network", "app", "-p", "8080:80", "--mesh", "bb",
        "httpd", "-f", "-p", "80", "-h", "/",
    )  # fmt: skip
    assert "0.0.0.0:8080->80/tcp (mesh)" in one.out("ps")
    assert one.out("port", "web") == "80/tcp -> 0.0.0.0:8080"
    wait_until(lambda: not closed(two, 2), what="n2's port")
    one.cli("stop", "-t", "0", "web")
    wait_until(lambda: closed(two, 2) and closed(two, 1), what="its end")
    one.cli("start", "web")
    wait_until(lambda: not closed(two, 3), what="n3's port")
