"""Addresses over the life of containers and of netstored; options and pools of the configuration."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import Node


def status(node: Node, name: str) -> dict:
    return json.loads(node.out("inspect", name))[0]["status"]["endpoints"][0]["status"]


def test_a_static_address_is_its_containers_from_create_to_remove(node: Node, image: str) -> None:
    node.cli("network", "create", "--subnet", "10.8.0.0/29", "app")
    node.cli("create", "--name", "db", "--network", "name=app,ip=10.8.0.3", image)
    for name in ("a", "b", "c", "d"):  # all that is left: .2 .4 .5 .6
        node.cli("run", "-d", "--name", name, "--network", "app", image)
    assert {status(node, name)["addresses"][0] for name in "abcd"} == {f"10.8.0.{last}/29" for last in (2, 4, 5, 6)}
    full = node.cli("create", "--network", "app", image, check=False)
    assert "no free address in 10.8.0.0/29" in full.stderr
    taken = node.cli("create", "--network", "name=app,ip=10.8.0.3", image, check=False)
    assert "10.8.0.3 of network app is taken by endpoint db" in taken.stderr
    before = {name: status(node, name) for name in ("a", "b")}
    node.cli("stop", "-t", "0", "a")
    node.kill()
    node.start()
    assert node.out("system", "check", "--repair") == "kernel and store agree"  # a stopped container is not stale
    node.cli("start", "a", "db")
    for name in ("a", "b"):
        assert status(node, name)["addresses"] == before[name]["addresses"]
        assert status(node, name)["mac_address"] == before[name]["mac_address"]
    assert status(node, "db")["addresses"] == ["10.8.0.3/29"]
    node.cli("rm", "-f", "db", "a")
    # Freed addresses come again in turn.
    node.cli("run", "-d", "--name", "e", "--network", "app", image)
    node.cli("run", "-d", "--name", "f", "--network", "app", image)
    assert {status(node, name)["addresses"][0] for name in "ef"} == {"10.8.0.2/29", "10.8.0.3/29"}


def test_a_namespace_that_ended_frees_its_addresses(node: Node) -> None:
    node.cli("network", "create", "--subnet", "10.8.0.0/24", "app")
    for name in ("a", "b"):
        node.host.netns(name)
        node.cli("network", "connect", "--netns", f"/run/netns/{name}", "--ip", f"10.8.0.{ord(name)}", "app")
    node.host.sh("ip netns del a")
    found = node.cli("system", "check", check=False)
    assert (found.returncode, "/run/netns/a: its network namespace is gone" in found.stdout) == (1, True)
    assert "/run/netns/b" not in found.stdout
    node.cli("system", "check", "--repair")
    assert len(node.out("endpoint", "ls", "-q").split()) == 1
    node.host.netns("a")  # another one at the same place
    node.cli("network", "connect", "--netns", "/run/netns/a", "--ip", "10.8.0.97", "app")
    assert node.out("system", "check") == "kernel and store agree"


def test_options_and_pools_of_the_configuration(node: Node, place: Path) -> None:
    node.stop()
    config = place / "netstored.toml"
    text = """
[[address-pool]]
base = "10.64.0.0/12"
size = 24
[default-network-opts.bridge]
"com.docker.network.driver.mtu" = "1400"
"""
    config.write_text(text)
    node.start_resolver()
    node.start("--config", str(config))
    node.cli("network", "create", "app")
    node.cli("network", "create", "-o", "com.docker.network.driver.mtu=1300", "own")
    found = {name: json.loads(node.out("network", "inspect", name))[0] for name in ("app", "own", "bridge")}
    assert found["app"]["status"]["ipam"][0]["subnet"] == "10.64.0.0/24"
    assert {name: each["status"]["mtu"] for name, each in found.items()} == {"app": 1400, "own": 1300, "bridge": 1500}
    assert node.out("network", "create", "app")  # again: the same
    node.stop()
    for bad in ('[default-network-opts.nosuch]\n"a" = "b"', text.replace("1400", "fast")):
        config.write_text(bad)
        refused = node.host.run(*node.command("netstored", "--config", str(config)), check=False, timeout=20)
        assert (refused.returncode, "default-network-opts." in refused.stderr) == (1, True)
    assert node.daemon
    node.start_resolver()
    node.start()
