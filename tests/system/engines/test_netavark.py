"""Our program as netavark, called as podman calls it: arguments, JSON on stdin, JSON on stdout, {"error": …} on failure."""

from __future__ import annotations

import copy
import json
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, wait_until
from test_cni import addresses, program_of, storm

APP = {
    "name": "app", "id": "a" * 64, "driver": "bridge", "network_interface": "podman1", "created": "2026-11-25T12:56:28Z",
    "subnets": [{"subnet": "10.91.0.0/24", "gateway": "10.91.0.1", "lease_range": {"start_ip": "10.91.0.2"}},
                {"subnet": "fd91::/64", "gateway": "fd91::1"}],
    "ipv6_enabled": True, "internal": False, "dns_enabled": True, "ipam_options": {"driver": "host-local"},
}  # fmt: skip


@dataclass
class Netavark:
    """Podman's side."""

    node: Node
    program: Path

    def body(self, number: int = 2, **keys: Any) -> dict[str, Any]:
        asked = {"static_ips": [f"10.91.0.{number}", f"fd91::{number}"], "aliases": ["www"], "interface_name": "eth0"}
        known = {"container_id": f"{number:064x}", "container_name": f"c{number}", "networks": {"app": asked}}
        return known | {"network_info": {"app": APP}} | keys

    def call(self, *args: str, body: Any = None) -> tuple[int, Any]:
        text = body if isinstance(body, str) else json.dumps(self.body() if body is None else body)
        flags = ("--config", "/run/containers/networks", "--rootless=false", "--aardvark-binary=/none")
        command = self.node.host.command(str(self.program), *flags, *args)
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=50)
        assert not done.stderr, done.stderr
        return done.returncode, json.loads(done.stdout) if done.stdout else None

    def ok(self, *args: str, body: Any = None) -> Any:
        status, answer = self.call(*args, body=body)
        assert status == 0, answer
        return answer

    def fails(self, *args: str, body: Any = None) -> str:
        status, answer = self.call(*args, body=body)
        assert (status, list(answer)) == (1, ["error"]), answer
        assert len(answer["error"]) < 1000
        return str(answer["error"])

    def nothing_left(self) -> None:
        assert self.node.out("endpoint", "ls", "-q") == ""
        assert self.node.out("network", "ls", "-q", "--filter", "type=custom") == ""


@pytest.fixture
def netavark(node: Node) -> Netavark:
    """A podman with two namespaces, a and b."""
    for name in "ab":
        node.host.netns(name)
    return Netavark(node, program_of(node, "netavark"))


def test_life(netavark: Netavark) -> None:
    """Setup makes what its answer says; teardown takes away what it names, however often, also without the namespace."""
    node = netavark.node
    made = netavark.ok("setup", "/run/netns/a")
    ((name, interface),) = made["app"]["interfaces"].items()
    (link,) = json.loads(node.host.sh("ip -n a -j link show dev eth0"))
    assert (name, interface["mac_address"]) == ("eth0", link["address"])
    assert (
        {each["ipnet"] for each in interface["subnets"]} == addresses(node.host, "a") == {"10.91.0.2/24", "fd91::2/64"}
    )
    assert [each["gateway"] for each in interface["subnets"]] == ["10.91.0.1", "fd91::1"]
    assert (made["app"]["dns_server_ips"], made["app"]["dns_search_domains"]) == (["127.0.0.11"], ["dns.podman"])
    assert "fd91::1" in node.host.sh("ip -6 addr show dev podman1")
    assert netavark.ok("setup", "/run/netns/a") == made  # what was done already
    changes = {
        "dns_enabled": False,
        "subnets": None,
        "network_interface": "",
        "name": "quiet",
        "options": {"mtu": "1400"},
    }
    silent = APP | changes
    both = netavark.body(3, network_info={"quiet": silent, "app": APP})
    both["networks"]["quiet"] = {"interface_name": "eth1", "static_mac": "02:00:00:00:00:33"}
    answer = netavark.ok("setup", "/run/netns/b", body=both)
    assert (answer["quiet"]["dns_server_ips"], answer["quiet"]["dns_search_domains"]) == ([], [])
    assert "mtu 1400" in node.host.sh("ip -n b link show dev eth1 | grep -B1 02:00:00:00:00:33")
    assert sorted(node.host.sh("ip netns exec a dig +short @127.0.0.11 c3.dns.podman").split()) == ["10.91.0.3"]
    assert "NXDOMAIN" in node.host.sh("ip netns exec a dig @127.0.0.11 nosuch.dns.podman")
    node.host.sh("ip netns del b")
    for _ in range(2):
        assert netavark.ok("teardown", "/run/netns/a") is None
        assert netavark.ok("teardown", "/run/netns/b", body=both) is None
    netavark.nothing_left()
    assert "eth0" not in node.host.sh("ip -n a link")


def test_another_engines_network(netavark: Netavark) -> None:
    """A network of the same name with the same subnets is shared, and stays; with others it is refused."""
    node = netavark.node
    node.cli("network", "create", "--subnet", "10.91.0.0/24", "--ipv6", "--subnet", "fd91::/64", "app")
    netavark.ok("setup", "/run/netns/a")
    netavark.ok("teardown", "/run/netns/a")
    assert node.out("network", "ls", "-q", "--filter", "name=app") != ""
    node.cli("network", "rm", "app")
    node.cli("network", "create", "--subnet", "10.92.0.0/24", "app")
    assert "10.92.0.0/24" in netavark.fails("setup", "/run/netns/a")
    node.cli("network", "rm", "app")


def test_update_create_and_version(netavark: Netavark) -> None:
    """Name servers follow; a new network gets a free subnet, is tried, and is left to podman."""
    node = netavark.node
    netavark.ok("setup", "/run/netns/a")
    for given, wanted in (("203.0.113.9,203.0.113.8", ["203.0.113.9", "203.0.113.8"]), ("", [])):
        netavark.ok("update", "app", "--network-dns-servers", given)
        assert json.loads(node.out("network", "inspect", "app"))[0]["spec"]["dns_servers"] == wanted
    netavark.ok("update", "unused", "--network-dns-servers=203.0.113.9")
    assert "network-dns-servers" in netavark.fails("update", "app", "--network-dns-servers", "x")
    node.cli("network", "create", "--subnet", "10.89.1.0/24", "ours")
    new = {
        "name": "new",
        "id": "b" * 64,
        "driver": "bridge",
        "dns_enabled": True,
        "internal": False,
        "ipv6_enabled": False,
    }
    pools = [{"base": "10.89.0.0/16", "size": 24}]
    options = {"subnet_pools": pools, "default_interface_name": "podman", "check_used_subnets": True}
    wish = {"network": new, "used": {"subnets": ["10.89.0.0/24"], "names": {}, "interfaces": []}, "options": options}
    made = netavark.ok("create", body=wish)
    assert made["subnets"] == [{"subnet": "10.89.2.0/24", "gateway": "10.89.2.1"}]
    assert (made["name"], made["ipam_options"]) == ("new", {"driver": "host-local"})
    assert made["network_interface"]
    assert "vlan" in netavark.fails("create", body=wish | {"network": new | {"options": {"vlan": "7"}}})
    assert "no subnet" in netavark.fails(
        "create", body=wish | {"options": {"subnet_pools": [{"base": "10.89.0.0/23", "size": 24}]}}
    )
    assert "new" not in node.out("network", "ls", "--format", "{{.Name}}").split()
    netavark.ok("teardown", "/run/netns/a")
    node.cli("network", "rm", "ours")
    node.stop()
    assert netavark.ok("version")["version"]
    assert "is netstored running" in netavark.fails("setup", "/run/netns/a")


def test_wrong_calls(netavark: Netavark) -> None:
    """Each wrong call is told, naming what is wrong, and leaves nothing."""
    good = json.dumps(netavark.body())
    for body in ("", "{", good[:-1], "null", "[]", "[" * 100_000, good.replace('"app"', "7"), "{}" + good):
        netavark.fails("setup", "/run/netns/a", body=body)
    assert "MiB" in netavark.fails("setup", "/run/netns/a", body=good[:-1] + " " * 10_000_000 + "}")
    for args in (("setup",), ("teardown",), ("update",), ("move", "x"), ()):
        netavark.fails(*args)
    for path in ("/run/netns/none", "/etc/passwd", "/proc/self/ns/net"):
        assert path in netavark.fails("setup", path)
    for keys, said in (
        ({"driver": "dhcp"}, "driver"), ({"name": "a/b"}, "a/b"), ({"subnets": [{"subnet": "10.0.0.0/99"}]}, "10.0.0.0/99"),
        ({"options": {"vrf": "x"}}, "vrf"), ({"options": {"mtu": "x"}}, "mtu"), ({"ipam_options": {"driver": "dhcp"}}, "dhcp"),
        ({"network_interface": "much-too-long-for-linux"}, "much-too-long"), ({"options": {"mode": "unmanaged"}}, "mode"),
        ({"routes": [{"destination": "x", "gateway": "10.91.0.9"}]}, "destination"), ({"dns_enabled": 7}, "dns_enabled"),
        ({"network_dns_servers": ["x"]}, "dns_servers"), ({"driver": "macvlan", "network_interface": "none0"}, "none0"),
    ):  # fmt: skip
        wrong = netavark.body(network_info={"app": APP | keys})
        assert said in netavark.fails("setup", "/run/netns/a", body=wrong), keys
    for keys, said in (
        ({"static_ips": ["x"]}, "static_ips"), ({"static_ips": ["10.9.9.9"]}, "10.9.9.9"), ({"static_mac": "x"}, "mac"),
        ({"static_ips": ["10.91.0.8", "10.91.0.9"]}, "one address"), ({"interface_name": "a/b"}, "interface_name"),
        ({"aliases": ["no name"]}, "no name"), ({"options": {"no": "such"}}, "no"),
    ):  # fmt: skip
        wrong = copy.deepcopy(netavark.body())
        wrong["networks"]["app"] |= keys
        assert said in netavark.fails("setup", "/run/netns/a", body=wrong), keys
    for keys, said in (
        ({"host_port": 70000}, "host_port"), ({"protocol": "icmp"}, "icmp"), ({"host_ip": "x"}, "host_ip"),
        ({"range": 65535}, "count"), ({"container_port": 0}, "container_port"),
    ):  # fmt: skip
        wrong = netavark.body(port_mappings=[{"host_port": 80, "container_port": 80} | keys])
        assert said in netavark.fails("setup", "/run/netns/a", body=wrong), keys
    assert "app" in netavark.fails("setup", "/run/netns/a", body=netavark.body(network_info={}))
    netavark.nothing_left()


async def test_a_thousand_at_once(netavark: Netavark) -> None:
    """Each of a thousand callers who listens gets a status block or an error; afterwards all can be taken away."""

    def draw() -> bytes:
        name, command = random.choice("ab"), random.choice(("setup", "setup", "teardown", "update", "move"))
        head = f"NETAVARK_COMMAND={command}\0NETAVARK_TARGET=/run/netns/{name}\0NETAVARK_DNS=203.0.113.9"
        return head.encode() + b"\0\0" + json.dumps(netavark.body("ab".index(name) + 2)).encode()

    for told in await storm(f"{netavark.node.place}/run/netavark.sock", draw):
        answer = json.loads(told[1:]) if told[1:] else {}
        assert told[:1] == b"0" or (told[:1], list(answer)) == (b"1", ["error"]), told
    for name in "ab":
        netavark.ok("teardown", f"/run/netns/{name}")
    netavark.nothing_left()
    assert "defect" not in netavark.node.log()


def test_killed_in_between(netavark: Netavark) -> None:
    """netstored is killed while containers come: each is told, comes again, and goes; nothing is left."""
    numbers = range(2, 14)
    netavark.node.host.sh("".join(f"ip netns add c{number};" for number in numbers))

    def call(command: str, number: int) -> tuple[int, Any]:
        return netavark.call(command, f"/run/netns/c{number}", body=netavark.body(number))

    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(call, "setup", number) for number in numbers]
        wait_until(lambda: any(each.done() for each in calls), what="the first")
        netavark.node.kill()
        answers = [each.result() for each in calls]
        assert all(status == 0 or "is netstored running" in answer["error"] for status, answer in answers), answers
        netavark.node.start()
        assert all(status == 0 for status, _ in pool.map(lambda number: call("setup", number), numbers))
        assert all(status == 0 for status, _ in pool.map(lambda number: call("teardown", number), numbers))
    netavark.nothing_left()
    assert netavark.node.out("system", "check") == "kernel and store agree"


def test_a_name_is_no_id(netavark: Netavark) -> None:
    """`podman network update` and setup of a name that begins another network's id leave that one alone."""
    node = netavark.node
    node.cli("network", "create", "--subnet", "10.92.0.0/24", "other")
    name = node.out("network", "inspect", "--format", "{{.Id}}", "other")[:6]
    before = node.out("network", "inspect", "other")
    netavark.ok("--network-dns-servers", "192.0.2.53", "update", name, body="")
    assert node.out("network", "inspect", "other") == before
    body = netavark.body(network_info={name: APP | {"name": name}})
    body["networks"] = {name: body["networks"]["app"]}
    assert list(netavark.ok("setup", "/run/netns/a", body=body)) == [name]
    netavark.ok("teardown", "/run/netns/a", body=body)
    assert node.out("network", "inspect", "other") == before
