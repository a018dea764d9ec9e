"""Bridge networks: both families, gateway modes, live ports; read back with ip, nft, curl and ping."""

from __future__ import annotations

import json
import subprocess
import sys
from ipaddress import ip_address, ip_network

import pytest
from conftest import Node, wait_until

HTTPD = ("httpd", "-f", "-v", "-p", "80", "-h", "/data")
HELLO = "from the image\n"


def curl(node: Node, url: str, *, netns: str = "", seconds: int = 3) -> str:
    inside = ["ip", "netns", "exec", netns] if netns else []
    return node.host.run(*inside, "curl", "-gsS", "-m", str(seconds), url, check=False).stdout


def addresses(node: Node, name: str) -> dict[str, str]:
    """Return the addresses of a container's first endpoint: {"4": …, "6": …}."""
    found = json.loads(node.out("inspect", name))[0]["status"]["endpoints"][0]["status"]["addresses"]
    return {"6" if ":" in text else "4": text.split("/")[0] for text in found}


def dual_stack_neighbour(node: Node) -> None:
    node.host.sh(
        "ip -6 addr add 2001:db8::1/64 dev uplink nodad; ip -n neighbour -6 addr add 2001:db8::2/64 dev eth0 nodad"
    )


def test_dual_stack(node: Node, image: str) -> None:
    dual_stack_neighbour(node)
    node.cli("network", "create", "--ipv6", "app")
    node.cli("run", "-d", "--name", "web", "--network", "app", "-p", "8080:80", image, *HTTPD)
    node.cli("run", "-d", "--name", "peer", "--network", "app", "--ip6", "", image)
    ula = ip_address(addresses(node, "web")["6"])
    assert ula in ip_network("fd00::/8")
    wait_until(lambda: curl(node, "http://127.0.0.1:8080/hello"), what="httpd")
    assert curl(node, "http://203.0.113.1:8080/hello", netns="neighbour") == HELLO
    assert curl(node, "http://[2001:db8::1]:8080/hello", netns="neighbour") == HELLO
    assert "2001:db8::2" in node.cli("logs", "web").stderr
    assert curl(node, "http://[2001:db8::1]:8080/hello") == HELLO
    assert node.out("exec", "peer", "wget", "-qO-", f"http://[{ula}]/hello") == HELLO.strip()
    assert str(ula) in node.out("exec", "peer", "nslookup", "-type=AAAA", "web")
    assert "web.app" in node.out("exec", "peer", "nslookup", str(ula))
    # NAT66 outwards: the neighbour knows no way to the ULA.
    assert node.cli("exec", "peer", "ping", "-6", "-c1", "-W2", "2001:db8::2").returncode == 0
    # No duplicate address detection was waited for, and router advertisements are not heard.
    shown = node.out("exec", "web", "ip", "-6", "addr", "show", "eth0")
    assert "tentative" not in shown
    assert "fe80::" in shown
    assert node.out("exec", "web", "cat", "/proc/sys/net/ipv6/conf/eth0/accept_ra") == "0"
    assert node.host.sh("cat /proc/sys/net/ipv6/conf/uplink/accept_ra").strip() == "2"
    # The node's own /48 stays the same.
    node.cli("network", "create", "--ipv6", "two")
    two = json.loads(node.out("network", "inspect", "two"))[0]["status"]["ipam"][1]["subnet"]
    assert ip_network(two).supernet(new_prefix=48) == ip_network((ula, 48), strict=False)


def test_ipv6_only_several_subnets_and_static_addresses(node: Node, image: str) -> None:
    node.cli("network", "create", "--ipv4=false", "--ipv6", "six")
    node.cli("run", "-d", "--name", "a", "--network", "six", image)
    assert set(addresses(node, "a")) == {"6"}
    node.cli("network", "create", "--ipv6", "--subnet", "10.9.0.0/29", "--subnet", "10.9.1.0/24", "--subnet",
             "fd00:9::/64", "--aux-address", "router=10.9.0.3", "--gateway", "10.9.1.254", "multi")  # fmt: skip
    node.cli("run", "-d", "--name", "b", "--network", "name=multi,ip=10.9.1.77,ip6=fd00:9::77", image)
    assert addresses(node, "b") == {"4": "10.9.1.77", "6": "fd00:9::77"}
    assert "default via 10.9.1.254" in node.out("exec", "b", "ip", "route")
    assert "default via fd00:9::1" in node.out("exec", "b", "ip", "-6", "route")
    for index in range(6):  # .2 .4 .5 .6 of the first subnet, then the second
        node.host.netns(f"n{index}")
        node.cli("network", "connect", "--netns", f"/run/netns/n{index}", "--name", f"n{index}", "multi")
    found = json.loads(node.out("endpoint", "ls", "--filter", "network=multi", "--format", "json"))
    given = {each["status"]["addresses"][0] for each in found if each["name"].startswith("n")}
    assert given == {"10.9.0.2/29", "10.9.0.4/29", "10.9.0.5/29", "10.9.0.6/29", "10.9.1.1/24", "10.9.1.2/24"}
    refused = node.cli("network", "connect", "--ip6", "fd00:8::1", "--netns", "/run/netns/n0", "six", check=False)
    assert "spec.ipv6_address" in refused.stderr


@pytest.mark.parametrize("six", [False, True])
def test_gateway_modes(node: Node, image: str, six: bool) -> None:
    """Who reaches an endpoint at its own address from the next machine: nobody, everybody, or for published ports."""
    dual_stack_neighbour(node)
    host = "[2001:db8::1]" if six else "203.0.113.1"
    version, option = ("6", "ipv6") if six else ("4", "ipv4")
    node.host.sh("ip -n neighbour route add 10.0.0.0/8 via 203.0.113.1")
    node.host.sh("ip -n neighbour -6 route add fd00::/8 via 2001:db8::1")
    reached = {}
    for index, mode in enumerate(("nat", "nat-unprotected", "routed")):
        subnets = ("--subnet", f"10.8.{index}.0/24", "--subnet", f"fd00:8:{index}::/64")
        key = f"com.docker.network.bridge.gateway_mode_{option}={mode}"
        node.cli("network", "create", "--ipv6", *subnets, "-o", key, mode)
        node.cli("run", "-d", "--name", mode, "--network", mode, "-p", f"{8000 + index}:80", image, "sh", "-c",
                 "httpd -p 80 -h /data; httpd -f -p 81 -h /data")  # fmt: skip
        target = addresses(node, mode)[version]
        target = f"[{target}]" if six else target
        wait_until(lambda url=f"http://{target}:81/hello": curl(node, url), what="httpd")
        urls = (f"{host}:{8000 + index}", f"{target}:80", f"{target}:81")
        reached[mode] = [curl(node, f"http://{url}/hello", netns="neighbour", seconds=2) == HELLO for url in urls]
    assert reached == {
        "nat": [True, False, False],
        "nat-unprotected": [True, True, True],
        "routed": [False, True, False],
    }


def test_isolated_inhibited_and_trusted(node: Node, image: str) -> None:
    isolated = "com.docker.network.bridge.gateway_mode_ipv4=isolated"
    node.cli("network", "create", "--internal", "-o", isolated, "--subnet", "10.8.1.0/24", "alone")
    node.cli("run", "-d", "--name", "a", "--network", "alone", image)
    node.cli("run", "-d", "--name", "b", "--network", "alone", image)
    assert node.cli("exec", "a", "ping", "-c1", "-W1", "b").returncode == 0
    assert "10.8.1.1/" not in node.host.sh("ip -4 addr")
    inhibit = "com.docker.network.bridge.inhibit_ipv4=true"
    node.cli("network", "create", "-o", inhibit, "--subnet", "10.8.2.0/24", "foreign")
    assert "10.8.2.1/" not in node.host.sh("ip -4 addr")
    trusted = "com.docker.network.bridge.trusted_host_interfaces=uplink"
    node.cli("network", "create", "-o", trusted, "--subnet", "10.8.3.0/24", "open")
    node.cli("run", "-d", "--name", "web", "--network", "open", "-p", "8080:80", image, *HTTPD)
    node.host.sh("ip -n neighbour route add 10.8.0.0/16 via 203.0.113.1")
    url = f"http://{addresses(node, 'web')['4']}/hello"
    wait_until(lambda: curl(node, url), what="httpd")
    assert curl(node, url, netns="neighbour") == HELLO
    source = "com.docker.network.host_ipv4=203.0.113.7"
    node.host.sh("ip addr add 203.0.113.7/24 dev uplink")
    node.cli("network", "create", "-o", source, "fixed")
    node.cli("run", "-d", "--name", "c", "--network", "fixed", image)
    node.host.sh(
        f"ip netns exec neighbour busybox httpd -v -f -p 9999 >/dev/null 2> {node.place}/seen & echo $! > {node.place}/pid"
    )
    wait_until(lambda: node.cli("exec", "c", "wget", "-qO-", "http://203.0.113.2:9999/x", check=False).returncode)
    wait_until(lambda: "203.0.113.7" in (node.place / "seen").read_text(), what="the client's address")
    node.host.sh(f"kill $(cat {node.place}/pid)")


def test_ports_live_ranges_choices_and_sources(node: Node, image: str) -> None:
    node.cli("network", "create", "app")
    node.cli("run", "-d", "--name", "web", "--network", "app", image, *HTTPD)
    assert node.out("port", "publish", "web", "8080:80") == "0.0.0.0:8080"
    wait_until(lambda: curl(node, "http://203.0.113.1:8080/hello", netns="neighbour"), what="httpd")
    assert node.out("port", "publish", "web", "8080:80") == ""  # again: the same
    assert node.out("port", "web") == "80/tcp -> 0.0.0.0:8080"
    assert node.out("port", "web", "80") == "0.0.0.0:8080"
    node.cli("port", "unpublish", "web", "8080:80")
    assert curl(node, "http://203.0.113.1:8080/hello", netns="neighbour", seconds=1) == ""
    # A range onto the same numbers is one element; a range onto one port takes a free one.
    node.cli("port", "publish", "web", "20000-20999:20000-20999")
    ruleset = node.host.sh("nft list map inet netstore ranges")
    assert "20000-20999 : 172.18.0.2" in ruleset
    clash = node.cli("port", "publish", "web", "20500:80", check=False)
    assert "host port 0.0.0.0:20500/tcp is taken by endpoint web" in clash.stderr
    assert node.out("port", "publish", "web", "20999-21005:80") == "0.0.0.0:21000"
    node.cli("port", "publish", "web", "9000-9002:79-81")
    assert curl(node, "http://203.0.113.1:9001/hello", netns="neighbour") == HELLO
    # Only who is let in gets in; the host itself always may.
    node.cli("port", "publish", "--from", "198.51.100.0/24", "web", "8081:80")
    assert curl(node, "http://203.0.113.1:8081/hello", netns="neighbour", seconds=1) == ""
    assert curl(node, "http://203.0.113.1:8081/hello") == HELLO
    listed = node.out("port", "ls", "web")
    assert "this host, 198.51.100.0/24" in listed
    assert "0.0.0.0:20000-20999" in listed
    node.cli("stop", "-t", "0", "web")
    elements = node.host.sh("nft -j list table inet netstore")
    assert "20000" not in elements
    assert "198.51.100.0" not in elements


def test_a_port_of_a_host_process_is_refused_by_name(node: Node, image: str) -> None:
    code = "import socket, time; s = socket.socket(type={}); s.bind(('', {})); {} print(flush=True); time.sleep(60)"
    servers = [
        subprocess.Popen(node.host.command(sys.executable, "-c", code.format(*each)), stdout=subprocess.PIPE)
        for each in (("socket.SOCK_STREAM", 8080, "s.listen();"), ("socket.SOCK_DGRAM", 5353, ""))
    ]
    for server in servers:
        assert server.stdout
        server.stdout.readline()
    for published in ("8080:80", "5353:53/udp", "8000-8100:8000-8100"):
        refused = node.cli("run", "-d", "-p", published, image, check=False)
        assert refused.returncode == 125
        assert f"taken by process {servers['5353' in published].pid} (python" in refused.stderr
    for server in servers:
        server.kill()
        server.communicate()
    assert node.out("run", "-d", "-p", "8080:80", image)


def test_null_ipam_endpoint_options_and_overlaps(node: Node, image: str) -> None:
    node.cli("network", "create", "--ipam-driver", "null", "bare")
    node.host.netns("c")
    node.cli("network", "connect", "--netns", "/run/netns/c", "bare")
    shown = node.host.sh("ip -n c addr show eth0")
    assert "UP" in shown
    assert "inet " not in shown
    sysctl = "com.docker.network.endpoint.sysctls=net.ipv4.conf.IFNAME.log_martians=1"
    node.cli("network", "connect", "--netns", "/run/netns/c", "--driver-opt", sysctl, "bridge")
    assert node.host.sh("ip netns exec c cat /proc/sys/net/ipv4/conf/eth1/log_martians").strip() == "1"
    nosuch = "com.docker.network.endpoint.sysctls=net.ipv4.conf.IFNAME.nosuch=1"
    node.host.netns("d")
    refused = node.cli("network", "connect", "--netns", "/run/netns/d", "--driver-opt", nosuch, "bridge", check=False)
    assert "spec.options[com.docker.network.endpoint.sysctls]: 'net.ipv4.conf.eth0.nosuch" in refused.stderr.replace(
        "IFNAME", "eth0"
    )
    assert "eth0" not in node.host.sh("ip -n d link")
    warned = node.cli("network", "create", "--subnet", "203.0.113.128/25", "near")
    assert "overlaps the host's route 203.0.113.0/24 on uplink" in warned.stderr
    refused = node.cli("network", "create", "--strict", "--subnet", "203.0.113.64/26", "nearer", check=False)
    assert refused.returncode == 1


def test_update_live(node: Node, image: str) -> None:
    node.cli("network", "create", "--subnet", "10.8.0.0/30", "app")
    node.cli("run", "-d", "--name", "a", "--network", "app", image)
    full = node.cli("run", "-d", "--name", "b", "--network", "app", image, check=False)
    assert "no free address in 10.8.0.0/30" in full.stderr
    node.cli("network", "update", "--subnet-add", "10.8.1.0/24", "--label-add", "tier=web", "app")
    node.cli("run", "-d", "--name", "b", "--network", "app", image)
    assert addresses(node, "b")["4"] == "10.8.1.2"
    assert node.cli("exec", "a", "ping", "-c1", "-W2", "10.8.1.2").returncode == 0
    bridge = "com.docker.network.bridge."
    node.cli("network", "update", "-o", f"{bridge}enable_icc=false", "-o", "com.docker.network.driver.mtu=1400", "app")
    assert node.cli("exec", "a", "ping", "-c1", "-W1", "10.8.1.2", check=False).returncode
    assert "mtu 1400" in node.out("exec", "a", "ip", "link", "show", "eth0")
    assert "mtu 1400" in node.host.sh("ip link show type bridge | grep -A0 nsbr-; ip link show type veth | grep nsv-")
    node.cli("network", "update", "-o", f"{bridge}enable_icc=true", "-o", f"{bridge}enable_ip_masquerade=false", "app")
    assert node.cli("exec", "a", "ping", "-c1", "-W1", "10.8.1.2").returncode == 0
    assert node.cli("exec", "a", "ping", "-c1", "-W1", "203.0.113.2", check=False).returncode  # no way back
    refused = node.cli("network", "update", "-o", f"{bridge}name=other", "app", check=False)
    assert "cannot change after create" in refused.stderr
    assert node.out("network", "inspect", "-f", "{{.Labels.tier}}", "app") == "web"


def test_drift_is_repaired_and_told(node: Node, image: str) -> None:
    node.cli("network", "create", "app")
    node.cli("run", "-d", "--name", "web", "--network", "app", "-p", "8080:80", image, *HTTPD)
    wait_until(lambda: curl(node, "http://203.0.113.1:8080/hello", netns="neighbour"), what="httpd")
    for meddling in (
        "nft flush ruleset",
        "nft delete table inet netstore",
        "ip link del $(ip -o link | grep -o 'nsbr-[0-9a-f]*' | tail -1)",
    ):
        node.host.sh(meddling)
        wait_until(
            lambda: curl(node, "http://203.0.113.1:8080/hello", netns="neighbour", seconds=2) == HELLO, what=meddling
        )
    events = [
        json.loads(line)
        for line in node.out("system", "events", "--since", "0", "--until-now", "--format", "json").splitlines()
    ]
    told = [event for event in events if event["action"] == "repair"]
    assert any(event["kind"] == "RESOURCE_KIND_NODE" for event in told)
    assert any(event["resource_name"] == "app" for event in told)


def test_spoofing_is_dropped(node: Node, image: str) -> None:
    node.cli("network", "create", "--ipv6", "app")
    for name in ("a", "b"):
        node.host.netns(name)
        node.cli("network", "connect", "--netns", f"/run/netns/{name}", "--name", name, "app")
    inside = "ip -n a"
    ping = ("ip", "netns", "exec", "a", "ping", "-c1", "-W1")
    assert node.host.run(*ping, "172.18.0.3").returncode == 0
    node.host.sh(f"{inside} addr add 172.18.0.77/16 dev eth0; {inside} -6 addr add fd77::1/64 dev eth0 nodad")
    assert node.host.run(*ping, "-I", "172.18.0.77", "172.18.0.3", check=False).returncode
    node.cli("network", "update", "-o", "netstore.bridge.spoof_guard=false", "app")
    assert node.host.run(*ping, "-I", "172.18.0.77", "172.18.0.3").returncode == 0
    node.cli("network", "update", "-o", "netstore.bridge.spoof_guard=true", "app")
    assert node.host.run(*ping, "-I", "172.18.0.77", "172.18.0.3", check=False).returncode
    node.host.sh(f"{inside} link set eth0 address 02:00:00:00:00:99")
    assert node.host.run(*ping, "172.18.0.3", check=False).returncode


THEFT = """
import socket, struct, sys
mine, theirs = (bytes.fromhex(each.replace(":", "")) for each in sys.argv[1:])
sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
sender.bind(("eth0", 0))
ether = b"\\xff" * 6 + theirs
arp = struct.pack("!HHBBH6s4s6s4s", 1, 0x800, 6, 4, 1, theirs, bytes(4), bytes(6), bytes((172, 18, 0, 9)))
sender.send(ether + b"\\x08\\x06" + arp)
nd = b"\\x87" + bytes(7) + bytes.fromhex("fe80" + "00" * 13 + "09")
six = struct.pack("!IHBB", 6 << 28, len(nd), 58, 255) + bytes(16) + bytes.fromhex("ff0200000000000000000001ff000009")
sender.send(bytes.fromhex("3333ff000009") + theirs + b"\\x86\\xdd" + six + nd)
udp = struct.pack("!HHHH", 68, 67, 8, 0)
four = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, 17, 0, bytes(4), b"\\xff" * 4)
sender.send(ether + b"\\x08\\x00" + four + udp)
"""


def test_nobody_takes_the_mac_of_another(node: Node) -> None:
    """What a sender without an address may send, as who looks for one, moves no forwarding entry of a neighbour's."""
    node.cli("network", "create", "--ipv6", "app")
    for name in ("a", "b"):
        node.host.netns(name)
        node.cli("network", "connect", "--netns", f"/run/netns/{name}", "--name", name, "app")
    macs = [json.loads(node.host.sh(f"ip -n {name} -j link show eth0"))[0]["address"] for name in ("a", "b")]
    bridge = node.out("network", "inspect", "-f", "{{.Status.Interface}}", "app")
    macs.append(json.loads(node.host.sh(f"ip -j link show {bridge}"))[0]["address"])

    def ways() -> set[tuple[str, str]]:
        found = json.loads(node.host.sh(f"bridge -j fdb show br {bridge}"))
        return {(each["mac"], each["ifname"]) for each in found if each["mac"] in macs}

    for name in ("a", "b"):
        node.host.run("ip", "netns", "exec", name, "ping", "-c1", "-W5", "172.18.0.1")
    before = ways()
    assert len(before) == len(macs)
    for theirs in macs[1:]:
        node.host.run("ip", "netns", "exec", "a", sys.executable, "-c", THEFT, macs[0], theirs)
    assert ways() == before


def test_udp_flows_follow_a_port(node: Node, image: str) -> None:
    """A client that keeps its source port reaches the container published after its first datagram, and its successor."""
    node.cli("network", "create", "app")
    echo = "import socket; s = socket.socket(type=2); s.bind(('', 53)); print(flush=True)\nwhile 1: d, c = s.recvfrom(99); s.sendto(b'NAME', c)"
    servers = []
    for name in ("one", "two"):
        node.host.netns(name)
        node.cli("network", "connect", "--netns", f"/run/netns/{name}", "--name", name, "app")
        code = echo.replace("NAME", name)
        server = subprocess.Popen(
            node.host.command("ip", "netns", "exec", name, sys.executable, "-c", code), stdout=subprocess.PIPE
        )
        assert server.stdout
        server.stdout.readline()
        servers.append(server)
    ask = "import socket; s = socket.socket(type=2); s.bind(('', 4444)); s.settimeout(1); s.sendto(b'x', ('203.0.113.1', 5300)); print(s.recv(9).decode())"

    def answer() -> str:
        return node.host.run("ip", "netns", "exec", "neighbour", sys.executable, "-c", ask, check=False).stdout.strip()

    ids = {each["name"]: each["id"] for each in json.loads(node.out("endpoint", "ls", "--format", "json"))}
    try:
        assert answer() == ""
        for name in ("one", "two", "one"):
            node.cli("endpoint", "publish", ids[name], "5300:53/udp")
            assert answer() == name
            node.cli("endpoint", "unpublish", ids[name], "5300:53/udp")
            assert answer() == ""
    finally:
        for server in servers:
            server.kill()
            server.communicate()


def test_publish_all(node: Node, image: str) -> None:
    node.cli(
        "run",
        "-d",
        "--name",
        "web",
        "-P",
        "--expose",
        "80",
        "--expose",
        "9000-9001/udp",
        "-p",
        "8088:81",
        image,
        *HTTPD,
    )
    shown = node.out("port", "web").splitlines()
    assert "81/tcp -> 0.0.0.0:8088" in shown
    assert [line.split()[0] for line in shown] == ["81/tcp", "80/tcp", "9000/udp", "9001/udp"]
    host = next(line.split(" -> ")[1] for line in shown if line.startswith("80/"))
    wait_until(lambda: curl(node, f"http://{host}/hello") == HELLO, what="httpd")
    refused = node.cli("run", "-d", "-P", "--expose", "x", image, check=False)
    assert "spec.exposed_ports[0]" in refused.stderr


def test_bandwidth_both_ways_and_live(node: Node, image: str) -> None:
    node.cli("network", "create", "app")
    for name in ("a", "b"):
        node.host.netns(name)
    node.cli("network", "connect", "--netns", "/run/netns/a", "--name", "a", "--bandwidth-in", "40mbit",
             "--bandwidth-out", "20mbit", "app")  # fmt: skip
    node.cli("network", "connect", "--netns", "/run/netns/b", "--name", "b", "app")
    found = json.loads(node.out("endpoint", "ls", "--format", "json"))
    ids = {each["name"]: each["id"] for each in found}
    code = """
import socket, sys, time
if sys.argv[1] == "sink":
    with socket.create_server(("", 9)) as server:
        print(flush=True)
        connection, _ = server.accept()
        received, started = 0, 0.0
        while data := connection.recv(1 << 20):
            received += len(data)
            if not started and received > 1 << 19:  # the bucket, and slow start, are past
                received, started = 0, time.monotonic()
        print(received * 8 / (time.monotonic() - started) / 1e6)
else:
    with socket.create_connection((sys.argv[2], 9)) as connection:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            connection.send(bytes(1 << 15))
"""

    def megabits(source: str, target: str, address: str) -> float:
        inside = ["ip", "netns", "exec", target, sys.executable, "-c", code, "sink"]
        sink = subprocess.Popen(node.host.command(*inside), stdout=subprocess.PIPE)
        assert sink.stdout
        sink.stdout.readline()
        node.host.run("ip", "netns", "exec", source, sys.executable, "-c", code, "source", address)
        return float(sink.communicate()[0])

    assert 5 <= megabits("a", "b", "172.18.0.3") <= 22  # a machine that has much else to do keeps below
    assert 23 <= megabits("b", "a", "172.18.0.2") <= 44
    node.cli("endpoint", "update", "--bandwidth-in", "80mbit", "--bandwidth-out", "0", ids["a"])
    assert 45 <= megabits("b", "a", "172.18.0.2") <= 88
    assert megabits("a", "b", "172.18.0.3") > 30
    refused = node.cli("endpoint", "update", "--bandwidth-in", "fast", ids["a"], check=False)
    assert "netstore.endpoint.bandwidth_in" in refused.stderr


def test_further_routes(node: Node, image: str) -> None:
    node.cli("network", "create", "--ipv6", "--subnet", "10.8.0.0/24", "--subnet", "fd00:8::/64", "--route",
             "198.51.100.0/24,10.8.0.9", "--route", "2001:db8:9::/48,fd00:8::9", "app")  # fmt: skip
    node.cli("run", "-d", "--name", "c", "--network", "app", image)
    assert "198.51.100.0/24 via 10.8.0.9 dev eth0" in node.out("exec", "c", "ip", "route")
    assert "2001:db8:9::/48 via fd00:8::9 dev eth0" in node.out("exec", "c", "ip", "-6", "route")
    for route, field in (
        ("x,10.8.0.9", "destination"),
        ("198.51.100.0/24,fd00::1", "gateway"),
        ("198.51.100.0/24,10.7.0.1", "gateway"),
    ):
        refused = node.cli("network", "create", "--subnet", "10.9.0.0/24", "--route", route, "bad", check=False)
        assert f"spec.routes[0].{field}" in refused.stderr
