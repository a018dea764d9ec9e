"""Engines beside each other on one node: podman by netavark, podman by CNI, and netstore's own containers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Node, wait_until
from podman_engine import HTTPD, Podman, needs_podman, running, with_cni, with_netavark

pytestmark = needs_podman


@pytest.mark.timeout(240)
def test_one_network_and_one_volume(node: Node, image: str, busybox_tar: Path) -> None:
    """All are on one network with addresses, names and ports apart, and see one volume; each lets go of its own alone."""
    netavark, cni = Podman(node.host, node.place / "netavark"), Podman(node.host, node.place / "cni")
    with_netavark(netavark, node)
    with_cni(cni, node)
    with running(netavark, busybox_tar), running(cni, busybox_tar):
        # Podman first: it refuses a subnet that the host has.
        netavark("network", "create", "--subnet", "10.79.0.0/24", "--ip-range", "10.79.0.0/26", "app")
        node.cli("network", "create", "--subnet", "10.79.0.0/24", "--ip-range", "10.79.0.128/25", "app")
        node.cli("volume", "create", "shared")
        node.cli("run", "-d", "--name", "own", "--network", "app", "-v", "shared:/data", "-p", "8081:80", image,
                 "httpd", "-f", "-p", "80", "-h", "/data")  # fmt: skip
        mountpoint = json.loads(node.out("volume", "inspect", "shared"))[0]["status"]["mountpoint"]
        netavark.run("first", "--network", "app", "-v", f"{mountpoint}:/data", "-p", "8082:80", *HTTPD[:-1], "/data")
        cni.run("second", "--network", "app", "-v", f"{mountpoint}:/data", "-p", "8083:80", *HTTPD[:-1], "/data")
        netavark("exec", "first", "sh", "-c", "echo of all > /data/file")
        for port in (8081, 8082, 8083):
            fetch = f"ip netns exec neighbour curl -s -m2 203.0.113.1:{port}/file || true"
            wait_until(lambda fetch=fetch: node.host.sh(fetch) == "of all\n", what=f"port {port}")
        endpoints = json.loads(node.out("endpoint", "ls", "--format", "json"))
        assert {each["name"] for each in endpoints} >= {"own", "first"}
        assert len({each["status"]["addresses"][0] for each in endpoints}) == 3
        for engine, name, other in ((netavark, "first", "second"), (cni, "second", "own")):
            assert "10.79.0." in engine("exec", name, "/bin/busybox", "nslookup", other)
        for name in ("first", "second"):
            assert "10.79.0." in node.out("exec", "own", "nslookup", name)
        with pytest.raises(pytest.fail.Exception, match="8081"):  # the message names who has it
            netavark.run("third", "--network", "app", "-p", "8081:80", *HTTPD)
        netavark("rm", "-af", "-t0")
        cni("rm", "-af", "-t0")
        assert [each["name"] for each in json.loads(node.out("endpoint", "ls", "--format", "json"))] == ["own"]
        assert node.host.sh("ip netns exec neighbour curl -s -m2 203.0.113.1:8081/file") == "of all\n"
    assert node.out("system", "check") == "kernel and store agree"
