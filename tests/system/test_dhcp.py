"""`--ipam-driver dhcp`: addresses that the physical network's own server (dnsmasq) lends."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator

import pytest
from conftest import Node, wait_until
from dhcp import ROUTER, Dnsmasq, inside, pass_time


@pytest.fixture
def server(node: Node) -> Iterator[Dnsmasq]:
    """A DHCP server that waits to be started, and a macvlan network that it serves."""
    server = Dnsmasq(node)
    node.cli("network", "create", "-d", "macvlan", "--ipam-driver", "dhcp", "-o", "parent=uplink", "lan")
    yield server
    server.stop()


def connect(node: Node, netns: str, *flags: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return node.cli("network", "connect", *flags, "lan", "--netns", node.host.netns(netns), check=check)


def events(node: Node) -> str:
    return node.out("system", "events", "--since", "0", "--until-now")


def test_a_lease_from_first_to_last(node: Node, server: Dnsmasq) -> None:
    server.start()
    connect(node, "a", "--name", "web")
    address = inside(node, "a")
    assert address.startswith("203.0.113.1")
    assert f"default via {ROUTER}" in node.host.sh("ip -n a route")
    assert "/24" in node.host.sh("ip -n a -o -4 addr show eth0")
    (_, mac, leased, name, identifier), = server.leases()  # fmt: skip
    assert (leased, name, identifier) == (address, "web", f"01:{mac}")
    assert mac in node.host.sh("ip -n a link show eth0")
    shown = json.loads(node.out("endpoint", "ls", "--format", "json"))
    assert ROUTER in json.dumps(shown)
    assert not node.host.run("sh", "-c", f"ip netns exec a ping -c1 -W1 {ROUTER}", check=False).returncode

    for seconds, what in ((61, "renewed at its server"), (110, "bound again by any")):
        acknowledged = server.heard("DHCPACK")
        pass_time(node, seconds)
        wait_until(lambda than=acknowledged: server.heard("DHCPACK") > than, what=f"the lease to be {what}")
    assert inside(node, "a") == address
    assert server.heard("DHCPDISCOVER") == 1
    assert json.loads(node.out("system", "check", "--format", "json")) == []

    node.cli("network", "disconnect", "lan", "--netns", "/run/netns/a")
    wait_until(lambda: server.heard("DHCPRELEASE"), what="the lease to be given back")
    wait_until(lambda: not server.leases(), what="the server to forget it")


def test_the_address_that_was_asked_for_or_none(node: Node, server: Dnsmasq) -> None:
    server.start()
    connect(node, "a", "--ip", "203.0.113.111")
    assert inside(node, "a") == "203.0.113.111"
    refused = connect(node, "b", "--ip", "203.0.113.111", check=False)
    assert "offers 203.0.113.1" in refused.stderr
    refused = node.cli("network", "connect", "--ip6", "fd00::1", "lan", "--netns", "/run/netns/b", check=False)
    assert "ipv6" in refused.stderr
    assert "eth0" not in node.host.sh("ip -n b -o link")
    assert len(json.loads(node.out("endpoint", "ls", "--format", "json"))) == 1


def test_no_server_no_attachment(node: Node, server: Dnsmasq) -> None:
    began = time.monotonic()
    refused = connect(node, "a", check=False)
    assert time.monotonic() - began < 20
    assert "no DHCP server answered" in refused.stderr
    assert "eth0" not in node.host.sh("ip -n a -o link")
    assert json.loads(node.out("endpoint", "ls", "--format", "json")) == []


def test_a_lease_that_ends_takes_its_address_along(node: Node, server: Dnsmasq) -> None:
    server.start()
    connect(node, "a")
    address = inside(node, "a")
    server.stop()
    pass_time(node, 90)
    wait_until(lambda: "lease-unanswered" in events(node), what="the event", seconds=25)
    assert inside(node, "a") == address
    pass_time(node, 30)
    wait_until(lambda: not inside(node, "a"), what="the address to go")
    assert "lease-lost" in events(node)
    server.start()
    wait_until(lambda: inside(node, "a"), what="another lease", seconds=30)
    assert json.loads(node.out("system", "check", "--format", "json")) == []


def test_the_way_out_of_others(node: Node, server: Dnsmasq) -> None:
    """A default route that is not ours stays when an address is lent, and when another is, unless the priority says so."""
    server.start()
    host, theirs = node.host, "default via 10.99.0.1 dev lan"
    for name, flags in (("a", ()), ("b", ("--gw-priority", "1")), ("c", ())):
        host.netns(name)
        host.sh(f"ip -n {name} link set lo up; ip -n {name} link add lan type veth peer name other;"
                f"ip -n {name} link set lan up; ip -n {name} link set other up; ip -n {name} addr add 10.99.0.2/24 dev lan")  # fmt: skip
        if name != "c":
            host.sh(f"ip -n {name} route add {theirs}")
        node.cli("network", "connect", *flags, "lan", "--netns", f"/run/netns/{name}")
    ours = f"default via {ROUTER} dev eth0"
    assert [ours in host.sh(f"ip -n {name} route") for name in "abc"] == [False, True, True]
    assert theirs in host.sh("ip -n a route")
    assert not host.run("ip", "netns", "exec", "a", "ping", "-c1", "-W2", ROUTER, check=False).returncode

    # The leases end while no server answers; meanwhile c gets a way out of somebody else's.
    server.stop()
    pass_time(node, 130)
    wait_until(lambda: not any(inside(node, name) for name in "abc"), what="the addresses to go")
    host.sh(f"ip -n c route add {theirs}")
    server.start()
    wait_until(lambda: all(inside(node, name) for name in "abc"), what="other leases", seconds=40)
    assert [ours in host.sh(f"ip -n {name} route") for name in "abc"] == [False, True, False]
    assert [theirs in host.sh(f"ip -n {name} route") for name in "abc"] == [True, False, True]
    assert json.loads(node.out("system", "check", "--format", "json")) == []


def test_the_way_out_while_a_lease_is_lost(node: Node, server: Dnsmasq) -> None:
    """Another network is the way out meanwhile, whether it was there before or came then."""
    server.start()
    for name in "ab":
        connect(node, name)
    node.cli("network", "connect", "bridge", "--netns", "/run/netns/a", "-p", "8080:80")

    def ways() -> list[str]:
        return [node.host.sh(f"ip -n {name} -4 -o route show default").partition(" proto")[0].strip() for name in "ab"]

    leased, bridged = f"default via {ROUTER} dev eth0", "default via 172.17.0.1 dev eth1"
    assert ways() == [leased, leased]
    server.stop()
    pass_time(node, 130)
    wait_until(lambda: not inside(node, "a") and not inside(node, "b"), what="the addresses to go")
    wait_until(lambda: ways() == [bridged, ""], what="the other way out")
    node.cli("network", "connect", "bridge", "--netns", "/run/netns/b")
    assert ways() == [bridged, bridged]
    assert json.loads(node.out("system", "check", "--format", "json")) == []
    server.start()
    wait_until(lambda: ways() == [leased, leased], what="the first way out", seconds=40)
    assert json.loads(node.out("system", "check", "--format", "json")) == []


def test_containers(node: Node, server: Dnsmasq, image: str) -> None:
    server.start()
    node.cli("run", "-d", "--name", "one", "--hostname", "alpha", "--network", "lan", image)
    node.cli("run", "-d", "--name", "two", "--network", "lan", image)
    assert {lease[3] for lease in server.leases()} == {"alpha", "two"}
    assert node.cli("exec", "two", "ping", "-c1", "-W1", "one").returncode == 0
    (address,) = {lease[2] for lease in server.leases() if lease[3] == "alpha"}
    node.cli("stop", "-t", "0", "one")
    wait_until(lambda: len(server.leases()) == 1, what="its lease to be given back")
    node.cli("start", "one")
    assert [lease[2] for lease in server.leases() if lease[3] == "alpha"] == [address]
