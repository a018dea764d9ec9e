"""Overlay networks with plain routes between nodes that share a link (-o direct), and tunnels to the others."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from balanced import status
from conftest import Host, Node, wait_until

from cluster.lab import UNDERLAY, Etcd3, connect, known, pair_of_ipv6, pings, reaches, restart, states

ASK = "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 3); print(s.recv(99).decode())"
ANSWER = (
    "import socket; s = socket.create_server(('::', 7777), family=socket.AF_INET6, dualstack_ipv6=True)\n"
    "while True:\n c, peer = s.accept(); c.sendall(peer[0].removeprefix('::ffff:').encode()); c.close()"
)
SPEAK = """
import socket, struct, sys
source, target, mac, own = sys.argv[1:]
def packet():
    data = b"\\x08\\0" + struct.pack("!HHH", 0, 7, 1) + b"forged"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    check = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    data = data[:2] + struct.pack("!H", check) + data[4:]
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(data), 1, 0, 64, 1, 0,
                       socket.inet_aton(source), socket.inet_aton(target))
    total = sum(struct.unpack("!10H", head))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack("!H", ~total & 0xFFFF) + head[12:] + data
link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
link.bind(("eth0", 0))
link.send(bytes.fromhex(mac.replace(":", "") + own.replace(":", "")) + b"\\x08\\0" + packet())
"""


@pytest.fixture
def wire(etcd3: Etcd3) -> Iterator[Host]:
    """The wire, which counts what goes over it in tunnels, and what goes plainly between endpoints."""
    wire = etcd3.underlay.host
    wire.sh("nft -f - <<'X'\nadd table bridge seen\nadd chain bridge seen c { type filter hook forward priority 0; }\n"
            "add rule bridge seen c udp dport 4789 counter comment \"tunnel\"\n"
            "add rule bridge seen c ip saddr 10.80.0.0/16 ip daddr 10.80.0.0/16 counter comment \"plain\"\n"
            "add rule bridge seen c ip6 saddr fd00:80::/64 ip6 daddr fd00:80::/64 counter comment \"plain\"\nX")  # fmt: skip
    yield wire
    wire.sh("nft delete table bridge seen")


def seen(wire: Host) -> dict[str, int]:
    """Return the packets that were counted, and begin anew."""
    found: dict[str, int] = {}
    text = wire.sh("nft list table bridge seen; nft reset rules table bridge seen >/dev/null 2>&1 || true")
    for packets, way in re.findall(r'packets (\d+) .*comment "(\w+)"', text):
        found[way] = found.get(way, 0) + int(packets)
    return found


@contextmanager
def counted(wire: Host) -> Iterator[dict[str, int]]:
    """Count what goes over the wire meanwhile."""
    before, difference = seen(wire), dict[str, int]()
    yield difference
    difference.update({way: packets - before[way] for way, packets in seen(wire).items()})


def create(nodes: list[Node], *flags: str) -> None:
    subnets = ("--ipv6", "--subnet", "10.80.0.0/16", "--subnet", "fd00:80::/64")
    nodes[0].cli("network", "create", "-d", "overlay", "-o", "direct=true", *subnets, *flags, "app")
    known(nodes, "app")


def six_of(node: Node, sandbox: str) -> str:
    return node.host.sh(f"ip -n {sandbox} -6 -o addr show dev eth0 scope global | awk '{{print $4}}'").split("/")[0]


def routes(node: Node) -> str:
    return node.host.sh("ip route show proto 110; ip -6 route show proto 110")


@contextmanager
def answering(node: Node, sandbox: str) -> Iterator[None]:
    """Serve connections in a namespace, each with the address that it came from."""
    command = node.host.command("ip", "netns", "exec", sandbox, sys.executable, "-c", ANSWER)
    with subprocess.Popen(command) as server:
        listens = f"ip netns exec {sandbox} ss -Hltn sport = 7777"
        wait_until(lambda: node.host.sh(listens), what="the server")
        try:
            yield
        finally:
            server.kill()


def seen_as(node: Node, sandbox: str, address: str) -> str:
    """Return what a server says that the client's address is."""
    return asks(node.host, address, 7777, *(("ip", "netns", "exec", sandbox) if sandbox else ()))


def asks(host: Host, address: str, port: int, *where: str) -> str:
    """Return what a server says, asked from a machine, or from where a command runs."""
    return host.run(*where, sys.executable, "-c", ASK, address, str(port), check=False).stdout.strip()


def test_plain_routes_between_nodes_on_a_link(nodes3: list[Node], wire: Host) -> None:
    one, two, three = nodes3
    create(nodes3)
    first, second = connect(one, "a"), connect(two, "b", "app", "--label", "tier=web")
    connect(three, "c")
    reaches(one, "a", second)
    with counted(wire) as packets:
        assert pings(one, "a", second)
        assert pings(one, "a", six_of(two, "b"))
        assert pings(one, "a", second, "-M", "do", "-s", "1422")
        assert pings(one, "", second), "the machine itself, to a container of another one"
        assert pings(one, "", six_of(two, "b"))
    assert packets == {"tunnel": 0, "plain": 10}
    with answering(two, "b"):
        assert seen_as(one, "a", second) == first, "no address is translated"
        assert seen_as(one, "a", six_of(two, "b")) == six_of(one, "a")
        own = one.host.sh(f"ip -j route get {second} | grep -o 'prefsrc\":\"[0-9.]*' | cut -d'\"' -f3").strip()
        assert seen_as(one, "", second) == own
        # A service that every node publishes: from outside, and from within.
        one.cli("service", "create", "web", "--network", "app", "--label", "tier=web", "--publish", "8080:7777")
        virtual = re.search(r"10\.80\.[0-9.]+", one.out("service", "inspect", "web"))
        assert virtual
        wait_until(lambda: seen_as(one, "a", virtual[0]) == own, what="the virtual address")
        assert asks(wire, f"{UNDERLAY}.1", 8080) == own
        one.cli("service", "rm", "web")
    for node in nodes3:
        assert "kernel and store agree" in node.out("system", "check")
    checked = one.out("network", "check", "app")
    assert "large" not in checked
    assert "unreachable" not in checked

    # What takes routes away is noticed: an interface that went down, a person.
    one.host.sh("ip link set eth0 down; ip link set eth0 up; ip route add default via 198.51.100.254")
    wait_until(lambda: routes(one).count("via") == 8, what="the routes")
    reaches(one, "a", second)
    one.host.sh("ip route flush proto 110")
    assert "missing" in one.cli("network", "check", "app", check=False).stdout
    one.cli("system", "check", "--repair")
    assert "kernel and store agree" in one.out("system", "check")

    # A node that starts again loses nothing; nothing is left of a network that is gone.
    pinging = two.host.command("ip", "netns", "exec", "b", "ping", "-i", "0.05", "-c", "60", "-q", first)
    with subprocess.Popen(pinging, stdout=subprocess.PIPE, text=True) as ping:
        one.kill()
        restart(one)
        assert " 0% packet loss" in ping.communicate()[0]
    two.kill()
    wait_until(lambda: states(one)["n2"] == "down", seconds=16, what="the loss of n2")
    wait_until(lambda: second not in routes(one), what="the end of the routes")
    restart(two)
    reaches(one, "a", second)
    for node, sandbox in zip(nodes3, "abc", strict=True):
        node.cli("network", "disconnect", "app", "--netns", f"/run/netns/{sandbox}")
    wait_until(lambda: not one.cli("network", "rm", "app", check=False).returncode, what="the removal")
    for node in nodes3:
        wait_until(lambda node=node: "app" not in node.out("network", "ls"), what="its end everywhere")
        assert routes(node) == ""
        assert "10.80" not in node.host.sh("nft list ruleset")
        assert "kernel and store agree" in node.out("system", "check")


def test_a_node_leaves_the_link_and_comes_back(nodes3: list[Node], wire: Host) -> None:
    one, _, three = nodes3
    create(nodes3)
    first, third = connect(one, "a"), connect(three, "c")
    reaches(one, "a", third)
    three.host.sh(f"ip addr add {UNDERLAY}.3/32 dev eth0; ip addr del {UNDERLAY}.3/24 dev eth0;"
                  f"ip route add {UNDERLAY}.0/24 dev eth0; ip route replace default via {UNDERLAY}.254")  # fmt: skip
    try:
        wait_until(lambda: not routes(one) and not routes(three), what="the end of the routes")
        with counted(wire) as packets:
            assert pings(one, "a", third)
            assert pings(three, "c", first)
            assert pings(one, "", six_of(three, "c"))
        assert packets["plain"] == 0
        assert packets["tunnel"] >= 6
        for node in (one, three):
            assert "kernel and store agree" in node.out("system", "check")
    finally:
        three.host.sh(f"ip route del {UNDERLAY}.0/24 dev eth0; ip addr add {UNDERLAY}.3/24 dev eth0;"
                      f"ip addr del {UNDERLAY}.3/32 dev eth0; ip route replace default via {UNDERLAY}.254")  # fmt: skip
    wait_until(lambda: third in routes(one) and first in routes(three), what="the routes")
    with counted(wire) as packets:
        assert pings(one, "a", third)
    assert packets == {"tunnel": 0, "plain": 2}


def test_an_underlay_of_ipv6(etcd3: Etcd3, nodes3: list[Node], wire: Host) -> None:
    """Two more machines that tell each other their IPv6 addresses: IPv4 and IPv6 of endpoints go there plainly, by them."""
    with pair_of_ipv6(etcd3, nodes3, (17, 18)) as pair:
        seven, eight = pair
        create(pair)
        first = connect(seven, "a", "app", "--label", "tier=web")
        second = connect(eight, "b", "app", "--label", "tier=web", "-p", "8080:7777", "--mesh")
        connect(nodes3[0], "c", "app", "--label", "tier=web")
        reaches(seven, "a", second)
        with counted(wire) as packets:
            assert pings(seven, "a", second)
            assert pings(seven, "a", six_of(eight, "b"))
            assert pings(eight, "b", first, "-M", "do", "-s", str(1500 - 70 - 28))
            assert pings(seven, "", second)
            assert pings(seven, "", six_of(eight, "b"))
        assert packets == {"tunnel": 0, "plain": 10}
        with answering(eight, "b"):
            assert seen_as(seven, "a", second) == first, "no address is translated"
            assert seen_as(seven, "a", six_of(eight, "b")) == six_of(seven, "a")
            own = seen_as(seven, "", second)
            assert own.startswith("10.80.")
            assert asks(wire, f"{UNDERLAY}.17", 8080) == own
        seven.cli("service", "create", "web", "--network", "app", "-l", "tier=web")
        wait_until(
            lambda: status(seven, "web").keys() == status(eight, "web").keys() == {"a", "b"}, what="its endpoints"
        )
        wait_until(lambda: "web" in nodes3[0].out("service", "ls"), what="the service")
        assert status(nodes3[0], "web").keys() == {"c"}, "who cannot be reached is not chosen"
        # The other nodes, whose addresses are IPv4, have the network, too, for its port; nothing passes to them.
        for node in (*pair, *nodes3):
            assert node.out("system", "check") == "kernel and store agree"
        checked = seven.cli("network", "check", "app", check=False).stdout
        between = [line.split()[3] for line in checked.splitlines() if len({"n17", "n18"} & set(line.split()[:2])) == 2]
        assert between == ["ok", "ok"]
        assert "address is IPv6 (fd00:198::17), and nothing passes" in seven.cli("system", "info").stderr
        assert "not: n17 (fd00:198::17), n18 (fd00:198::18); correct" in nodes3[0].cli("system", "info").stderr

        # What is not near any more goes by tunnels; what comes from the link in an endpoint's name is not heard.
        stranger = etcd3.underlay.machine(19)
        stranger.sh(f"ip -6 addr add fd00:198::19/64 dev eth0 nodad; ip -6 route add fd00:80::/64 via fd00:198::17;"
                    f"ip route add 10.80.0.0/16 via {UNDERLAY}.17")  # fmt: skip
        assert stranger.run("ping", "-c1", "-W1", first, check=False).returncode
        assert stranger.run("ping", "-c1", "-W1", six_of(seven, "a"), check=False).returncode
        eight.host.sh("ip link set eth0 down; ip link set eth0 up; ip -6 addr add fd00:198::18/64 dev eth0 nodad;"
                      f"ip route add default via {UNDERLAY}.254")  # fmt: skip
        wait_until(lambda: first in routes(eight), what="the routes")
        reaches(eight, "b", first)
        reaches(eight, "b", six_of(seven, "a"))
        eight.host.sh("ip -6 addr del fd00:198::18/64 dev eth0; ip -6 addr add fd00:198::18/128 dev eth0 nodad;"
                      "ip -6 route add fd00:198::/64 dev eth0")  # fmt: skip
        wait_until(lambda: not routes(seven) and not routes(eight), what="the end of the routes")
        with counted(wire) as packets:
            assert pings(seven, "a", second)
            assert pings(seven, "a", six_of(eight, "b"))
        assert packets["plain"] == 0
        assert packets["tunnel"] >= 4
        seven.cli("service", "rm", "web")
        for node, name in ((seven, "a"), (eight, "b"), (nodes3[0], "c")):
            node.cli("network", "disconnect", "app", "--netns", f"/run/netns/{name}")
        wait_until(lambda: not seven.cli("network", "rm", "app", check=False).returncode, what="its removal")


def test_nobody_else_is_heard(etcd3: Etcd3, nodes3: list[Node], wire: Host) -> None:
    one, two, three = nodes3
    create(nodes3)
    first, second = connect(one, "a"), connect(two, "b")
    reaches(one, "a", second)
    one.cli("network", "create", "-d", "overlay", "--subnet", "10.81.0.0/16", "other")
    known(nodes3, "other")
    connect(one, "d", "other")
    assert not pings(one, "d", second), "not from another network"
    stranger = etcd3.underlay.machine(9)
    stranger.sh(f"ip route add 10.80.0.0/16 via {UNDERLAY}.1")
    assert stranger.run("ping", "-c1", "-W1", first, check=False).returncode
    one.host.sh("ip netns exec a nft 'add table ip w; add chain ip w c { type filter hook input priority 0; };"
                " add rule ip w c icmp type echo-request counter'")  # fmt: skip
    mac, theirs, own = (
        host.sh("ip -o link show eth0 | grep -o 'link/ether [0-9a-f:]*'").split()[1]
        for host in (one.host, two.host, stranger)
    )
    stranger.run(sys.executable, "-c", SPEAK, second, first, mac, own)
    assert "packets 0 " in one.host.sh("ip netns exec a nft list table ip w"), "not with an endpoint's address"
    stranger.run(sys.executable, "-c", SPEAK, second, first, mac, theirs)  # what is not guaranteed: forged MACs
    assert "packets 1 " in one.host.sh("ip netns exec a nft list table ip w")

    # Policies are judged as on tunnels.
    with answering(two, "b"):
        assert seen_as(one, "a", second) == first
        three.cli("policy", "create", "--network", "app", "--action", "deny", "--from", f"cidr={first}/32", "shut")
        wait_until(lambda: seen_as(one, "a", second) == "", what="the policy")
        three.cli("policy", "rm", "shut")
        wait_until(lambda: seen_as(one, "a", second) == first, what="its end")


def test_what_does_not_go_together(nodes3: list[Node]) -> None:
    for option in ("encrypted=true", "com.docker.network.bridge.enable_icc=false", "isolate=strict"):
        refused = nodes3[0].cli(
            "network", "create", "-d", "overlay", "-o", "direct=true", "-o", option, "app", check=False
        )
        assert refused.returncode == 1
        assert f"false together with {option}" in refused.stderr
