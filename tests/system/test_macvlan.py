"""macvlan networks: real interfaces on a parent, seen by the neighbour on the wire."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import Node, wait_until


def addresses(node: Node, netns: str) -> dict[str, list[str]]:
    found = json.loads(node.host.sh(f"ip -n {netns} -j addr"))
    return {link["ifname"]: [each["local"] for each in link["addr_info"]] for link in found}


def pings(node: Node, netns: str, address: str) -> bool:
    where = f"ip netns exec {netns} " if netns else ""
    return not node.host.run("sh", "-c", f"{where}ping -c1 -W1 {address}", check=False).returncode


def attach(node: Node, network: str, netns: str, *flags: str) -> None:
    node.host.netns(netns)
    node.cli("network", "connect", *flags, network, "--netns", f"/run/netns/{netns}")


@pytest.fixture
def lan(node: Node) -> str:
    """A macvlan network on the uplink, with its router: the neighbour."""
    node.cli("network", "create", "-d", "macvlan", "-o", "parent=uplink", "--subnet", "203.0.113.0/24",
             "--gateway", "203.0.113.2", "--ip-range", "203.0.113.64/26", "lan")  # fmt: skip
    return "lan"


def test_on_the_wire(node: Node, lan: str) -> None:
    attach(node, lan, "a")
    attach(node, lan, "b")
    assert addresses(node, "a")["eth0"] == ["203.0.113.64"]
    assert pings(node, "a", "203.0.113.2")  # the router, a machine of its own
    assert pings(node, "neighbour", "203.0.113.65")
    assert pings(node, "a", "203.0.113.65")
    assert "via 203.0.113.2" in node.host.sh("ip -n a route show default")
    assert not pings(node, "", "203.0.113.64")  # as with Docker's: the host itself does not
    link = json.loads(node.host.sh("ip -n a -d -j link show eth0"))[0]
    assert link["linkinfo"]["info_data"]["mode"] == "bridge"
    assert link["ifalias"].startswith("netstore endpoint ")
    node.cli("network", "disconnect", lan, "--netns", "/run/netns/a")
    assert "eth0" not in addresses(node, "a")
    refused = node.cli("network", "create", "-d", "macvlan", "-o", "parent=uplink", "-o", "macvlan_mode=passthru",
                       "--subnet", "192.0.2.0/24", "all", check=False)  # fmt: skip
    assert refused.returncode
    assert "lan" in refused.stderr
    node.cli("network", "create", "-d", "macvlan", "-o", "parent=uplink", "-o", "macvlan_mode=private",
             "--subnet", "192.0.2.0/24", "second")  # fmt: skip
    assert json.loads(node.out("system", "check", "--format", "json")) == []


def test_beside_an_eth0_of_the_host(node: Node, lan: str) -> None:
    """Linux before 6.14 looked for the name of an interface that is made inside in the host's namespace, too."""
    node.host.sh("ip link add eth0 type veth peer name eth0-peer")
    attach(node, lan, "a")
    assert pings(node, "a", "203.0.113.2")
    node.host.sh("ip netns add full; ip -n full link add eth0 type veth peer name other")
    node.cli("network", "connect", lan, "--netns", "/run/netns/full")
    assert sorted(addresses(node, "full")) == ["eth0", "eth1", "lo", "other"]


def test_no_gateway_leaves_the_way_out(node: Node) -> None:
    node.cli("network", "create", "-d", "macvlan", "-o", "parent=uplink", "--subnet", "192.0.2.0/24", "plain")
    attach(node, "plain", "a")
    assert node.host.sh("ip -n a route show default") == ""
    node.cli("network", "create", "out")
    node.cli("network", "connect", "out", "--netns", "/run/netns/a")
    assert "dev eth1" in node.host.sh("ip -n a route show default")


def test_host_access(node: Node) -> None:
    node.cli("network", "create", "-d", "macvlan", "-o", "parent=uplink", "-o", "host_access=true", "--ipv6",
             "--subnet", "192.0.2.0/24", "--subnet", "fd00:2::/64", "--aux-address", "host=192.0.2.9", "lan")  # fmt: skip
    attach(node, "lan", "a", "--ip", "192.0.2.20", "--ip6", "fd00:2::20")
    assert pings(node, "", "192.0.2.20")
    assert pings(node, "", "fd00:2::20")
    assert pings(node, "a", "192.0.2.9")
    shown = json.loads(node.out("network", "inspect", "lan"))[0]
    assert "192.0.2.9" in json.dumps(shown)
    taken = node.cli("network", "connect", "--ip", "192.0.2.9", "lan", "--netns", "/run/netns/neighbour", check=False)
    assert "taken" in taken.stderr
    node.cli("network", "disconnect", "lan", "--netns", "/run/netns/a")
    assert "192.0.2.20" not in node.host.sh("ip route show")
    node.cli("network", "rm", "lan")
    assert "macvlan" not in node.host.sh("ip -d link show")


@pytest.mark.parametrize(("mode", "hairpin", "among"), [("private", "on", False), ("vepa", "on", True), ("vepa", "off", False),
                                                       ("bridge", "off", True)])  # fmt: skip
def test_who_hears_whom(node: Node, mode: str, hairpin: str, among: bool) -> None:
    """What passes between endpoints of a parent, which is at a switch that sends frames back, or does not."""
    node.host.sh("ip netns add switch; ip link add pt type veth peer name port netns switch; ip link set pt up;"
                 "ip -n switch link add br0 type bridge; ip -n switch link set port master br0 up;"
                 f"bridge -n switch link set dev port hairpin {hairpin};"
                 "ip -n switch addr add 192.0.2.254/24 dev br0; ip -n switch link set br0 up")  # fmt: skip
    node.cli("network", "create", "-d", "macvlan", "-o", "parent=pt", "-o", f"macvlan_mode={mode}",
             "--subnet", "192.0.2.0/24", "--ip-range", "192.0.2.64/26", "lan")  # fmt: skip
    for name in ("a", "b"):
        attach(node, "lan", name)
        link = json.loads(node.host.sh(f"ip -n {name} -d -j link show eth0"))[0]
        assert link["linkinfo"]["info_data"]["mode"] == mode
        wait_until(lambda name=name: pings(node, name, "192.0.2.254"), what="the switch")
    assert pings(node, "a", "192.0.2.65") is among
    assert pings(node, "b", "192.0.2.64") is among


CUTOFF = """
from pyroute2 import IPRoute
import netstore.kernel.netlink  # pyroute2 does not know the attribute's name by itself
print(IPRoute().get_links(ifname="eth0")[0].get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA", "IFLA_MACVLAN_BC_CUTOFF"))
"""


def test_mtu_and_ipv6(node: Node) -> None:
    mtu = "com.docker.network.driver.mtu"
    node.cli("network", "create", "-d", "macvlan", "-o", "parent=uplink", "-o", f"{mtu}=1400",
             "--ipv6", "--subnet", "203.0.113.0/24", "--subnet", "fd00:2::/64", "--ip-range", "203.0.113.64/26", "lan")  # fmt: skip
    node.host.sh("ip -n neighbour addr add fd00:2::ffff/64 dev eth0 nodad")
    attach(node, "lan", "a")
    assert "mtu 1400 " in node.host.sh("ip -n a -o link show eth0")
    assert pings(node, "a", "fd00:2::ffff")
    assert pings(node, "neighbour", next(each for each in addresses(node, "a")["eth0"] if each.startswith("fd00:2:")))
    node.cli("network", "create", "-d", "macvlan", "-o", "parent=uplink", "-o", f"{mtu}=9000", "--subnet",
             "192.0.2.0/24", "large")  # fmt: skip
    larger = node.cli("network", "connect", "large", "--netns", node.host.netns("b"), check=False)
    assert "MTU 9000 is larger than that of its parent uplink, 1500" in larger.stderr
    assert "eth0" not in addresses(node, "b")


def test_internal_without_a_parent(node: Node) -> None:
    node.cli("network", "create", "-d", "macvlan", "--subnet", "192.0.2.0/24", "inner")
    for name in ("a", "b"):
        attach(node, "inner", name)
    assert pings(node, "a", "192.0.2.2")
    assert not pings(node, "a", "203.0.113.2")
    for name in ("a", "b"):
        node.cli("network", "disconnect", "inner", "--netns", f"/run/netns/{name}")
    node.cli("network", "rm", "inner")
    assert "nsm" not in node.host.sh("ip -o link show")


def test_passthru_is_exclusive(node: Node) -> None:
    node.host.sh("ip link add pt type veth peer name far; ip link set far up; ip link set pt up")
    node.cli("network", "create", "-d", "macvlan", "-o", "parent=pt", "-o", "macvlan_mode=passthru",
             "--subnet", "192.0.2.0/24", "whole")  # fmt: skip
    attach(node, "whole", "a")
    node.host.netns("b")
    refused = node.cli("network", "connect", "whole", "--netns", "/run/netns/b", check=False)
    assert "passthru" in refused.stderr
    assert "eth0" not in addresses(node, "b")


def test_a_parent_that_goes_and_returns(node: Node) -> None:
    node.host.sh("ip link add pt type veth peer name far; ip link set far up; ip link set pt up")
    node.cli("network", "create", "-d", "macvlan", "-o", "parent=pt", "--subnet", "192.0.2.0/24", "lan")
    attach(node, "lan", "a")
    node.host.sh("ip link del pt")
    wait_until(lambda: "eth0" not in addresses(node, "a"), what="the kernel to take it away")
    assert "interface pt is missing" in node.cli("system", "check", check=False).stdout
    node.host.sh("ip link add pt type veth peer name far; ip link set far up; ip link set pt up")
    wait_until(lambda: "eth0" in addresses(node, "a"), what="netstored to see that the parent is back")
    wait_until(lambda: addresses(node, "a")["eth0"] == ["192.0.2.1"], what="its address")


def test_broadcasts(node: Node) -> None:
    """The limit reaches the kernel; one that would ignore it is told of."""
    options = ("-o", "parent=uplink", "-o", "netstore.macvlan.broadcast_cutoff=7")
    made = node.cli("network", "create", "-d", "macvlan", *options, "lan", check=False)
    if made.returncode:
        assert "would ignore it" in made.stderr
        assert "lan" not in node.out("network", "ls")
        return
    attach(node, "lan", "a")
    assert node.host.run("ip", "netns", "exec", "a", sys.executable, "-c", CUTOFF).stdout == "7\n"


def test_refusals(node: Node) -> None:
    def refused(*flags: str) -> str:
        done = node.cli("network", "create", "-d", "macvlan", *flags, "n", check=False)
        assert done.returncode
        return done.stderr

    assert "nosuch" in refused("-o", "parent=nosuch")
    assert "uplink" in refused("-o", "parent=nosuch")  # what there is
    assert "lo" in refused("-o", "parent=lo")
    assert "macvlan_mode" in refused("-o", "parent=uplink", "-o", "macvlan_mode=other")
    assert "host_access" in refused("-o", "parent=uplink", "-o", "macvlan_mode=vepa", "-o", "host_access=true")
    assert "internal" in refused("-o", "parent=uplink", "--internal")
    tagged = node.cli("network", "create", "-d", "macvlan", "-o", "parent=uplink.50", "tagged", check=False)
    assert "802.1q" in tagged.stderr or "uplink.50@uplink" in node.host.sh("ip -o link show uplink.50")
    node.cli("network", "create", "-d", "macvlan", "-o", "parent=uplink", "--subnet", "192.0.2.0/24", "lan")
    node.host.netns("a")
    no_ports = node.cli("network", "connect", "lan", "--netns", "/run/netns/a", "-p", "80:80", check=False)
    assert no_ports.returncode


def test_not_beside_ipvlan(node: Node) -> None:
    node.cli("network", "create", "-d", "macvlan", "-o", "parent=uplink", "--subnet", "192.0.2.0/25", "mac")
    refused = node.cli(
        "network", "create", "-d", "ipvlan", "-o", "parent=uplink", "--subnet", "192.0.2.128/25", "ip", check=False
    )
    assert "mac" in refused.stderr
    node.cli("network", "rm", "mac")
    node.cli("network", "create", "-d", "ipvlan", "-o", "parent=uplink", "--subnet", "192.0.2.128/25", "ip")
    node.host.netns("a")
    done = node.cli("network", "connect", "ip", "--netns", "/run/netns/a", check=False)
    assert done.returncode == 0 or "this kernel has no ipvlan" in done.stderr
    assert bool(done.returncode) == ("eth0" not in addresses(node, "a"))


def test_containers(node: Node, lan: str, image: str) -> None:
    node.cli("run", "-d", "--name", "one", "--network", lan, image)
    node.cli("run", "-d", "--name", "two", "--network", lan, image)
    assert node.cli("exec", "two", "ping", "-c1", "-W1", "one").returncode == 0
    assert node.cli("exec", "two", "ping", "-c1", "-W1", "203.0.113.2").returncode == 0
    before = node.out("exec", "one", "ip", "-o", "addr")
    node.cli("stop", "-t", "0", "one")
    node.kill()
    node.start()
    node.cli("start", "one")
    after = node.out("exec", "one", "ip", "-o", "addr")
    assert [line.split()[3] for line in before.splitlines()] == [line.split()[3] for line in after.splitlines()]
