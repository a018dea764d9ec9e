"""Services of an overlay network: endpoints on every node, a name and ports on every node."""

from __future__ import annotations

from balanced import reached, serving, settles, status, virtual
from conftest import Node, wait_until

from cluster.lab import UNDERLAY, Etcd3, connect, joined, known, resolves, restart


def test_balanced_across_nodes(etcd3: Etcd3, nodes3: list[Node]) -> None:
    """Every node reaches every endpoint; a node is killed, and etcd, and what is left keeps answering."""
    one, two, three = nodes3
    joined(nodes3)
    one.cli("network", "create", "-d", "overlay", "--subnet", "10.90.0.0/16", "app")
    known(nodes3, "app")
    for node, name in ((one, "b1"), (two, "b2"), (three, "b3")):
        connect(node, name, "app", "--label", "tier=web")
    two.cli("service", "create", "web", "--network", "app", "-l", "tier=web", "-p", "8080:80", "--health", "tcp:80",
            "--health-interval", "1s", "--health-retries", "1")  # fmt: skip
    address = virtual(two, "web")
    with serving(one, "b1"), serving(two, "b2") as servers, serving(three, "b3"):
        for node, client in ((one, "b1"), (two, "b2"), (three, "b3")):
            settles(node, client, address, {"b1", "b2", "b3"})
            assert resolves(node, client, "web") == address
            assert reached(node, "", f"{UNDERLAY}.1", port=8080).keys() == {"b1", "b2", "b3"}
            assert node.out("system", "check") == "kernel and store agree"
        assert status(three, "web") == {"b1": True, "b2": True, "b3": True}
        twin = one.cli("service", "create", "twin", "--network", "app", "-l", "tier", "-p", "8080:80", check=False)
        assert "host port 0.0.0.0:8080/tcp is taken by service web" in twin.stderr
        servers["b2"].kill()
        settles(one, "b1", address, {"b1", "b3"})

        # A node is lost: first netstored with its lease, then what runs there.
        three.kill()
        three.host.sh("ip link set eth0 down")
        wait_until(lambda: "b3" not in status(one, "web"), seconds=20, what="the lost node's endpoint to leave")
        settles(one, "b1", address, {"b1"})
        assert reached(one, "", f"{UNDERLAY}.2", port=8080).keys() == {"b1"}
        three.host.sh(f"ip link set eth0 up; ip route replace default via {UNDERLAY}.254")
        restart(three)
        settles(one, "b1", address, {"b1", "b3"})

        # etcd is away: what runs goes on, also over a restart; what would change the cluster is refused.
        etcd3.kill(0, 1, 2)
        one.kill()
        restart(one)
        assert reached(one, "b1", address).keys() == {"b1", "b3"}
        assert "the cluster is not available" in one.cli("service", "rm", "web", check=False).stderr
        etcd3.start(0, 1, 2)
        joined(nodes3)
    one.cli("service", "update", "web", "--no-healthcheck", "--publish-rm", "8080")
    wait_until(lambda: status(three, "web") == {"b1": True, "b2": True, "b3": True}, what="the change on n3")
    for node, name in ((one, "b1"), (two, "b2"), (three, "b3")):
        node.cli("network", "disconnect", "app", "--netns", f"/run/netns/{name}")
    wait_until(lambda: status(three, "web") == {}, what="all endpoints' end")
    assert "has 1 service(s): web" in three.cli("network", "rm", "app", check=False).stderr
    three.cli("service", "rm", "web")
    for node in nodes3:
        wait_until(lambda node=node: not node.out("service", "ls", "-q"), what="its end everywhere")
        assert node.out("system", "check") == "kernel and store agree"
