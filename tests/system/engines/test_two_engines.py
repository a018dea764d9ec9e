"""Engines beside each other on one node: podman by netavark, podman by CNI, dockerd, and netstore's own containers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Node, wait_until
from dockerd import NEEDS_DOCKERD, Docker
from podman_engine import HTTPD, Podman, needs_podman, running, with_cni, with_netavark
from test_docker import docker, plugged

__all__ = ["docker", "plugged"]  # fixtures

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


@NEEDS_DOCKERD
@pytest.mark.timeout(400)
def test_docker_podman_and_our_own(plugged: Node, docker: Docker, busybox_tar: Path) -> None:
    """dockerd's network and volume are podman's and ours, too: addresses and ports apart, files the same; none disturbs
    another when it goes.
    """
    node, host = plugged, plugged.host
    node.start_resolver()
    podman = Podman(host, node.place / "netavark")
    with_netavark(podman, node)
    with running(podman, busybox_tar):
        podman("network", "create", "--subnet", "10.79.0.0/24", "--ip-range", "10.79.0.0/26", "app")
        docker.out("network", "create", "-d", "netstore", "--ipam-driver", "netstore", "-o", "netstore.name=app",
                   "--subnet", "10.79.0.0/24", "--ip-range", "10.79.0.128/25", "app")  # fmt: skip
        node.cli("volume", "create", "shared")
        node.cli("image", "import", str(busybox_tar), "bb")
        docker.out("run", "-d", "--name", "theirs", "--network", "app", "-v", "shared:/data", "-p", "8081:80",
                   *HTTPD[:-1], "/data")  # fmt: skip
        node.cli("run", "-d", "--name", "own", "--ip", "10.79.0.100", "--network", "app", "-v", "shared:/data",
                 "-p", "8082:80", *HTTPD[:-1], "/data")  # fmt: skip
        mountpoint = json.loads(node.out("volume", "inspect", "shared"))[0]["status"]["mountpoint"]
        podman.run("first", "--network", "app", "-v", f"{mountpoint}:/data", "-p", "8083:80", *HTTPD[:-1], "/data")
        docker.out("exec", "theirs", "sh", "-c", "echo of all > /data/file")

        def works(*ports: int) -> None:
            for port in ports:
                fetch = f"ip netns exec neighbour curl -s -m2 203.0.113.1:{port}/file || true"
                wait_until(lambda fetch=fetch: host.sh(fetch) == "of all\n", what=f"port {port}")

        works(8081, 8082, 8083)
        endpoints = json.loads(node.out("endpoint", "ls", "--format", "json"))
        addresses = [each["status"]["addresses"][0].partition("/")[0] for each in endpoints]
        assert len(set(addresses)) == 3
        for address in addresses:  # who resolves whom: docs/engines.md
            for reached in (docker.out("exec", "theirs", "wget", "-qO-", f"http://{address}/file"),
                            node.out("exec", "own", "wget", "-qO-", f"http://{address}/file"),
                            podman("exec", "first", "/bin/wget", "-qO-", f"http://{address}/file")):  # fmt: skip
                assert reached == "of all"
        assert "10.79.0." in node.out("exec", "own", "nslookup", "first")
        for taken in (8081, 8082, 8083):
            told = docker(("run", "--rm", "--network", "app", "-p", f"{taken}:80", "bb", "true"), check=False).stderr
            assert f"{taken}/tcp is taken" in told or taken == 8081, told
        in_use = docker(("network", "rm", "app"), check=False)
        assert in_use.returncode
        podman("rm", "-af", "-t0")
        works(8081, 8082)
        docker.out("rm", "-f", "theirs")
        works(8082)
        assert "in use" in docker(("volume", "rm", "shared"), check=False).stderr
        node.cli("rm", "-f", "own")
        docker.out("network", "rm", "app")
        docker.out("volume", "rm", "shared")
        podman("network", "rm", "app")
    assert node.out("endpoint", "ls", "-q") == node.out("volume", "ls", "-q") == ""
    assert node.out("system", "check") == "kernel and store agree"
