"""Debian's podman 4 with its CNI backend: networks, ports, names, connect and disconnect by netstore-cni."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Node, wait_until
from podman_engine import HTTPD, Podman, needs_podman, running, with_cni

pytestmark = needs_podman


@pytest.fixture
def podman(node: Node, busybox_tar: Path) -> Iterator[Podman]:
    """A podman whose containers are removed in the end."""
    podman = Podman(node.host, node.place / "podman")
    with_cni(podman, node)
    with running(podman, busybox_tar):
        yield podman


@pytest.mark.timeout(180)  # a dozen commands of podman's
def test_podman(podman: Podman, node: Node) -> None:
    """What a user of podman does: run with ports, names, static addresses, connect, disconnect, reload, stop, start."""
    podman.run(
        "web", "--network", "app", "-p", "8080:80", "--ip", "10.79.0.40", "--mac-address", "02:00:00:00:00:40", *HTTPD
    )
    assert podman.network("web", "app")["IPAddress"] == "10.79.0.40"
    wanted = podman("exec", "web", "cat", "/etc/hostname")

    def reached() -> bool:
        return node.host.sh("ip netns exec neighbour curl -s -m2 203.0.113.1:8080/hostname || true").strip() == wanted

    wait_until(reached, what="the published port")
    fetch = ("run", "--rm", "--network", "app", "bb", "/bin/busybox", "wget", "-qO-")
    assert podman(*fetch, "http://web/hostname") == wanted
    assert len(node.out("endpoint", "ls", "-q").split()) == 1  # the other one is gone with its container
    podman("network", "reload", "web")  # conmon listens on the port meanwhile
    wait_until(reached, what="the published port, reloaded")
    podman("network", "disconnect", "app", "web")
    assert node.out("endpoint", "ls", "-q") == ""
    podman("network", "connect", "--alias", "www", "app", "web")
    wait_until(reached, what="the published port, connected again")
    assert podman(*fetch, "http://www/hostname") == wanted
    node.kill()
    assert reached()
    node.start()
    podman("stop", "-t0", "web")
    podman("start", "web")
    wait_until(reached, what="the published port, started again")
    podman("rm", "-f", "-t0", "web")
    assert node.out("endpoint", "ls", "-q") == ""
    assert node.out("system", "check") == "kernel and store agree"


@pytest.mark.timeout(120)
def test_podman_without_netstored(podman: Podman, node: Node) -> None:
    """What podman prints when netstored is away says so; afterwards all is well."""
    podman("create", "--name", "web", *HTTPD)
    node.kill()
    with pytest.raises(pytest.fail.Exception, match="is netstored running"):
        podman("start", "web")
    node.start()
    podman("start", "web")
    address = podman.network("web", "podman")["IPAddress"]
    assert address.startswith("10.78.0.")
    assert subprocess.run(node.host.command("ping", "-c1", "-W2", address)).returncode == 0
