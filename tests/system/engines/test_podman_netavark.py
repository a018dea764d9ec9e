"""Debian's podman 4 with its netavark backend, where netavark is packaging/netstore-cni under that name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Node, wait_until
from podman_engine import HTTPD, Podman, needs_podman, running, with_netavark

pytestmark = needs_podman


@pytest.fixture
def podman(node: Node, busybox_tar: Path) -> Iterator[Podman]:
    """A podman whose containers are removed in the end."""
    podman = Podman(node.host, node.place / "podman")
    with_netavark(podman, node)
    with running(podman, busybox_tar):
        yield podman


def reached(node: Node, port: int = 8080) -> str:
    """Return what a neighbour is served at a published port."""
    return node.host.sh(f"ip netns exec neighbour curl -s -m2 203.0.113.1:{port}/hostname || true").strip()


@pytest.mark.timeout(240)  # two dozen commands of podman's
def test_podman(podman: Podman, node: Node) -> None:
    """What a user of podman does with networks of podman's own, in both families."""
    podman("network", "create", "--subnet", "10.91.0.0/24", "--subnet", "fd91::/64", "app")
    podman("network", "create", "two")
    podman.run(
        "web", "--network", "app:ip=10.91.0.40,ip6=fd91::40,mac=02:00:00:00:00:40,alias=www",
        "-p", "8080:80", "-p", "127.0.0.1:9000-9001:9000-9001/udp", *HTTPD,
    )  # fmt: skip
    shown = podman.network("web", "app")
    assert (shown["IPAddress"], shown["GlobalIPv6Address"], shown["MacAddress"]) == (
        "10.91.0.40", "fd91::40", "02:00:00:00:00:40",
    )  # fmt: skip
    assert (shown["Gateway"], shown["IPv6Gateway"]) == ("10.91.0.1", "fd91::1")
    wanted = podman("exec", "web", "cat", "/etc/hostname")
    wait_until(lambda: reached(node) == wanted, what="the published port")
    (endpoint,) = json.loads(node.out("endpoint", "ls", "--format", "json"))
    ports = {(each["host_port"], each["count"], each["host_ip"]) for each in endpoint["status"]["ports"]}
    assert ports == {(8080, 0, "0.0.0.0"), (9000, 2, "127.0.0.1")}
    names = ("web", "web.dns.podman", "www", podman("ps", "-q"))
    asked = " && ".join(f"/bin/busybox nslookup {name}" for name in names)
    answer = podman("run", "--rm", "--network", "app", "bb", "/bin/busybox", "sh", "-c", asked)
    assert [answer.count(each) for each in ("10.91.0.40", "fd91::40")] == [len(names), len(names)]
    for address in ("10.91.0.40", "[fd91::40]"):
        assert node.host.sh(f"curl -s -m2 http://{address}/hostname").strip() == wanted

    podman("network", "connect", "two", "web")
    assert "eth1" in podman("exec", "web", "/bin/busybox", "ip", "-o", "addr")
    podman("network", "reload", "web")  # conmon listens on the ports meanwhile
    wait_until(lambda: reached(node) == wanted, what="the published port, reloaded")
    podman("network", "disconnect", "app", "web")
    wait_until(lambda: reached(node) == wanted, what="the published port, on the network that is left")
    podman("network", "connect", "app", "web")
    podman("network", "disconnect", "two", "web")
    wait_until(lambda: reached(node) == wanted, what="the published port, back again")
    assert "two" not in node.out("network", "ls")  # as netavark's bridge, it went with its last container

    node.kill()
    assert reached(node) == wanted
    node.start()
    podman("stop", "-t0", "web")
    podman("start", "web")
    wait_until(lambda: reached(node) == wanted, what="the published port, started again")
    podman("rm", "-f", "-t0", "web")
    assert node.out("endpoint", "ls", "-q") == ""
    assert node.out("network", "ls", "-q", "--filter", "type=custom") == ""
    assert node.out("system", "check") == "kernel and store agree"


@pytest.mark.timeout(180)
def test_after_a_reboot(podman: Podman, node: Node) -> None:
    """Processes, namespaces, interfaces, rules and what podman keeps in /run are gone: the same container starts again."""
    podman("network", "create", "--subnet", "10.91.0.0/24", "app")
    podman.run("web", "--network", "app:ip=10.91.0.40", "-p", "8080:80", *HTTPD)
    shown = json.loads(podman("inspect", "web"))[0]
    netns, pids = shown["NetworkSettings"]["SandboxKey"], (shown["State"]["ConmonPid"], shown["State"]["Pid"])
    node.kill()
    node.host.sh(f"kill -9 {' '.join(map(str, pids))}; umount -l {netns} && rm {netns}; nft flush ruleset")
    node.host.sh(f"ip link del podman1; rm -rf {podman.place}/tmp {podman.place}/runroot /run/containers/* /dev/shm/*")
    node.host.sh(f"rm -rf /run/crun/{shown['Id']}")
    node.start()
    wait_until(lambda: node.out("endpoint", "ls", "-q") == "", what="what ended to be given back")
    podman("start", "web")
    assert podman.network("web", "app")["IPAddress"] == "10.91.0.40"
    wait_until(lambda: reached(node), what="the published port, after the reboot")
    podman("rm", "-f", "-t0", "web")
    assert node.out("endpoint", "ls", "-q") == ""
    assert node.out("network", "ls", "-q", "--filter", "type=custom") == ""
    assert node.out("system", "check") == "kernel and store agree"
