"""Published ports: ::1, flows that end with their port, and who reaches it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network

import pytest
from conftest import BIN, Node, wait_until
from sctp import INIT
from test_bridge import HELLO, HTTPD, curl, dual_stack_neighbour

Talking = Callable[..., subprocess.Popen[str]]


def test_ipv6_loopback_is_relayed(node: Node, image: str) -> None:
    """A port published on every address, or on ::1, answers there: also of IPv4 alone, in a range, with netstored dead."""
    node.cli("network", "create", "app")
    node.cli("network", "create", "--ipv4=false", "--ipv6", "six")
    both = "httpd -p 80 -h /data; httpd -p 9001 -h /data; exec httpd -f -p 81 -h /data"
    node.cli("run", "-d", "--name", "web", "--network", "app", "-p", "8080:80", "-p", "[::1]:8081:81",
             "-p", "9000-9002:9000-9002", "-p", "127.0.0.1:8082:80", image, "sh", "-c", both)  # fmt: skip
    node.cli("run", "-d", "--name", "web6", "--network", "six", "-p", "8086:80", image, *HTTPD)
    wait_until(lambda: curl(node, "http://127.0.0.1:8080/hello"), what="httpd")
    for port in (8080, 8081, 9001, 8086):
        assert curl(node, f"http://[::1]:{port}/hello") == HELLO, port
    for url in ("[::1]:8082", "127.0.0.1:8081", "203.0.113.1:8081", "[::1]:9000"):
        assert curl(node, f"http://{url}/hello") == "", url
    node.kill()
    assert curl(node, "http://[::1]:8080/hello") == HELLO
    node.start()
    assert curl(node, "http://[::1]:8080/hello") == HELLO
    assert node.resolver
    node.resolver.kill()
    node.resolver.wait()
    node.start_resolver()
    assert curl(node, "http://[::1]:8080/hello") == HELLO  # it waited in the socket that netstored kept
    node.resolver.kill()
    node.resolver.wait()
    code = "curl -gso /dev/null -m 20 http://[::1]:8080/hello; echo $?"
    assert node.host.sh(code) == "56\n", "with no resolver for longer it is reset"
    assert curl(node, "http://127.0.0.1:8080/hello") == HELLO
    node.start_resolver()
    wait_until(lambda: curl(node, "http://[::1]:8080/hello") == HELLO, what="the relay")
    node.cli("port", "unpublish", "web", "8080:80")
    assert curl(node, "http://[::1]:8080/hello") == ""
    node.host.sh("nft flush ruleset")
    wait_until(lambda: curl(node, "http://[::1]:8086/hello") == HELLO, what="the repair")


def test_relay_carries_much_and_many(node: Node, image: str) -> None:
    node.cli("run", "-d", "--name", "web", "-p", "8080:80", image, "sh", "-c",
             "head -c 20000000 /dev/zero > /data/big; exec httpd -f -p 80 -h /data")  # fmt: skip
    wait_until(lambda: curl(node, "http://[::1]:8080/hello") == HELLO, what="httpd")
    script = "for i in $(seq 40); do curl -gsS -m 20 http://[::1]:8080/big | wc -c & done; wait"
    assert node.host.sh(script).split() == ["20000000"] * 40


SERVER = """
import socket, sys, threading
udp, name = sys.argv[1] == "udp", sys.argv[2].encode()
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM)  # of both families
s.bind(("", 53))
def converse(connection):
    while connection.recv(99):
        connection.send(name)
if not udp:
    s.listen()
print(flush=True)
while udp:
    data, client = s.recvfrom(99)
    s.sendto(name, client)
while True:
    threading.Thread(target=converse, args=[s.accept()[0]]).start()
"""
CLIENT = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[2] else socket.AF_INET
s = socket.socket(family, socket.SOCK_DGRAM if sys.argv[1] == "udp" else socket.SOCK_STREAM)
s.settimeout(2)
s.connect((sys.argv[2], 5300))
for line in sys.stdin:
    try:
        s.send(b"x")
        print(s.recv(9).decode() or "end", flush=True)
    except OSError as error:
        print("failed", flush=True)
"""


@pytest.fixture
def talking(node: Node) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts servers and clients in the host or in a namespace; all are killed in the end."""
    started: list[subprocess.Popen[str]] = []

    def start(*args: str, netns: str = "", serves: bool = False) -> subprocess.Popen[str]:
        inside = ["ip", "netns", "exec", netns] if netns else []
        command = node.host.command(*inside, sys.executable, "-c", *args)
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True))
        if serves:
            assert started[-1].stdout
            assert started[-1].stdout.readline() == "\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_established_flows_end_with_their_port(node: Node, talking: Talking, kind: str) -> None:
    """Unpublished, or its endpoint gone: who is connected is so no longer; who talks to another port stays."""
    node.cli("network", "create", "app")
    node.host.netns("one")
    node.cli("network", "connect", "--netns", "/run/netns/one", "--name", "one", "app")
    endpoint = json.loads(node.out("endpoint", "ls", "--format", "json"))[0]["id"]
    talking(SERVER, kind, "one", netns="one", serves=True)
    places = [("203.0.113.1", "neighbour"), ("127.0.0.1", ""), *([("::1", "")] if kind == "tcp" else [])]
    for how in ("unpublish", "range", "disconnect"):
        port = "5300:53" if how != "range" else "5298-5307:51-60"
        node.cli("endpoint", "publish", endpoint, f"{port}/{kind}")
        clients = [talking(CLIENT, kind, address, netns=netns) for address, netns in places]
        assert [says(client) for client in clients] == ["one"] * len(clients)
        node.cli("endpoint", "publish", endpoint, f"5400:53/{kind}")
        node.cli("endpoint", "unpublish", endpoint, f"5400:53/{kind}")
        assert [says(client) for client in clients] == ["one"] * len(clients)
        if how == "disconnect":
            node.cli("network", "disconnect", "--netns", "/run/netns/one", "app")
        else:
            node.cli("endpoint", "unpublish", endpoint, f"{port}/{kind}")
        flows = node.host.sh("cat /proc/net/nf_conntrack")
        assert ("172.18.0.2" if how == "disconnect" else "dport=5300") not in flows, how
        assert "one" not in [says(client) for client in clients], how


def test_flows_that_began_while_the_tables_were_gone(node: Node, talking: Talking) -> None:
    """A UDP client that talks all the while is served again after `nft flush ruleset`."""
    node.cli("network", "create", "app")
    node.host.netns("one")
    node.cli("network", "connect", "--netns", "/run/netns/one", "-p", "5300:53/udp", "--name", "one", "app")
    talking(SERVER, "udp", "one", netns="one", serves=True)
    assert node.daemon
    node.daemon.send_signal(signal.SIGSTOP)  # else a busy machine has them back before the client begins
    node.host.sh("nft flush ruleset")
    client = talking(CLIENT, "udp", "203.0.113.1", netns="neighbour")
    assert says(client) != "one"
    node.daemon.send_signal(signal.SIGCONT)
    wait_until(lambda: says(client) == "one", what="the repair")


def test_sctp_flows_follow_a_port(node: Node) -> None:
    """An INIT chunk (RFC 9260, section 3.3.2) from outside, by a raw socket: sockets need a module, translation does not."""
    node.cli("network", "create", "app")
    node.host.netns("one")
    node.cli("network", "connect", "--netns", "/run/netns/one", "-p", "5300:53/sctp", "--name", "one", "app")
    node.host.run("ip", "netns", "exec", "neighbour", sys.executable, "-c", INIT, "203.0.113.1", "5300")
    flows = node.host.sh("cat /proc/net/nf_conntrack")
    assert "sctp" in flows
    assert "src=172.18.0.2 dst=203.0.113.2 sport=53 dport=4444" in flows
    endpoint = json.loads(node.out("endpoint", "ls", "--format", "json"))[0]["id"]
    node.cli("endpoint", "unpublish", endpoint, "5300:53/sctp")
    assert "sctp" not in node.host.sh("cat /proc/net/nf_conntrack")


MODE = "com.docker.network.bridge.gateway_mode_ipv4"
TRUSTED = "com.docker.network.bridge.trusted_host_interfaces"


@pytest.mark.parametrize(
    ("options", "flags", "shown"),
    [
        ({}, "5300:53", "anyone"),
        ({}, "127.0.0.1:5300:53", "this host"),
        ({}, "[::1]:5300:53", "this host"),
        ({}, "203.0.113.1:5300:53", "anyone"),
        ({}, "published=5300,target=53,from=203.0.113.0/25", "this host, 203.0.113.0/25"),
        ({}, "published=5300,target=53,from=198.51.100.0/24", "this host, 198.51.100.0/24"),
        ({MODE: "routed"}, "5300:53", "anyone at 10.8.0.2:53"),
        ({MODE: "routed"}, "published=5300,target=53,from=198.51.100.0/24", "this host, 198.51.100.0/24 at 10.8.0.2:53"),
        ({MODE: "nat-unprotected"}, "5300:53", "anyone; anyone at 10.8.0.2:53"),
        ({"isolate": "strict"}, "5300:53", "anyone"),
        ({TRUSTED: "uplink"}, "127.0.0.1:5300:53", "this host; this host, interface uplink at 10.8.0.2:53"),
    ],
)  # fmt: skip
def test_who_reaches_a_port_is_said_and_true(
    node: Node, talking: Talking, options: dict[str, str], flags: str, shown: str
) -> None:
    node.host.sh("ip -n neighbour route add 10.0.0.0/8 via 203.0.113.1")
    given = [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
    node.cli("network", "create", "--subnet", "10.8.0.0/24", *given, "app")
    node.cli("network", "create", "--subnet", "10.9.0.0/24", "other")
    for name, network, publish in (("one", "app", ["-p", flags]), ("two", "other", [])):
        node.host.netns(name)
        node.cli("network", "connect", "--netns", f"/run/netns/{name}", *publish, "--name", name, network)
    talking(SERVER, "tcp", "one", netns="one", serves=True)
    published = json.loads(node.out("network", "inspect", "app"))[0]["status"]["ports"][0]
    assert published["endpoint_name"] == "one"
    places = {each["address"]: each["sources"] for each in published["port"]["reach"]}
    row = node.out("port", "ls").splitlines()[1]
    assert row.split("   ")[-1].strip() == shown

    def said(client: str, address: str, place: str) -> bool:
        everywhere = [f"{wide}:5300" for wide in ("*", "0.0.0.0") if "::" not in place and place.endswith(":5300")]
        sources = [source for each in (place, *everywhere) for source in places.get(each, [])]
        nets = [ip_network(source) for source in sources if "/" in source]
        return (
            {"": "node", "two": "networks", "neighbour": "anyone"}[client] in sources
            or (client == "neighbour" and "interface uplink" in sources)
            or (client != "" and any(ip_address(address) in each for each in nets))
        )

    code = "import socket; socket.create_connection(({!r}, {}), timeout=0.7)"
    for client, address in (("", "203.0.113.1"), ("two", "10.9.0.2"), ("neighbour", "203.0.113.2")):
        targets = [("203.0.113.1", 5300), *([("10.8.0.2", 53)] if client else [("127.0.0.1", 5300), ("::1", 5300)])]
        for host, port in targets:
            inside = ["ip", "netns", "exec", client] if client else []
            done = node.host.run(*inside, sys.executable, "-c", code.format(host, port), check=False)
            place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            assert (done.returncode == 0) == said(client, address, place), (client, place, places, done.stderr[-80:])


def test_ipv6_flows_end_with_their_endpoints(node: Node, talking: Talking) -> None:
    """Those of several endpoints that go at once, and of no other."""
    dual_stack_neighbour(node)
    node.cli("network", "create", "--ipv6", "app")
    for index, name in enumerate(("one", "two", "three")):
        node.host.netns(name)
        node.cli("network", "connect", "--netns", f"/run/netns/{name}", "-p", f"530{index}:53", "--name", name, "app")
        talking(SERVER, "tcp", name, netns=name, serves=True)
    clients = [talking(CLIENT.replace("5300", f"530{n}"), "tcp", "2001:db8::1", netns="neighbour") for n in range(3)]
    assert [says(client) for client in clients] == ["one", "two", "three"]
    found = json.loads(node.out("endpoint", "ls", "--filter", "network=app", "--format", "json"))
    held = {each["name"]: ip_address(each["status"]["addresses"][1].split("/")[0]).exploded for each in found}
    node.host.sh(
        "for each in one two; do "
        f"{BIN}/netstore -H {node.address} network disconnect --netns /run/netns/$each app & done; wait"
    )
    flows = node.host.sh("cat /proc/net/nf_conntrack")
    assert held["one"] not in flows
    assert held["two"] not in flows
    assert held["three"] in flows
    assert says(clients[2]) == "three"


def test_ports_beside_the_way_out(node: Node, image: str) -> None:
    """A published port answers whichever network is the way out; what fails leaves it as it was."""
    host = node.host
    for name in ("one", "two"):
        node.cli("network", "create", "--ipv6", name)
    host.sh("ip -6 addr add 2001:db8::1/64 dev uplink nodad; ip -n neighbour -6 addr add 2001:db8::2/64 dev eth0 nodad")
    node.cli("run", "-d", "--name", "web", "--network", "one", image, "httpd", "-f", "-p", "80", "-h", "/data")

    def asked() -> list[str]:
        urls = "203.0.113.1:8080/hello", "[2001:db8::1]:8080/hello", "203.0.113.1:8081/hello"
        return [host.sh(f"ip netns exec neighbour curl -gs -m 2 http://{each} || true") for each in urls]

    def way_out() -> str:
        return "".join(node.out("exec", "web", "ip", *six, "route", "show", "default") for six in ((), ("-6",)))

    node.cli("network", "connect", "two", "web", "-p", "8080:80")
    node.cli("port", "publish", "web", "8081:80", "--network", "one")
    assert "eth0" in way_out()
    wait_until(lambda: asked() == [HELLO] * 3, what="answers by both networks")
    assert host.sh("curl -gs -m 2 http://203.0.113.1:8080/hello") == HELLO
    assert node.out("system", "check") == "kernel and store agree"
    node.cli("network", "disconnect", "two", "web")

    # It moves, and comes back when what it moved to goes, or cannot be.
    wrong = ("--driver-opt", "com.docker.network.endpoint.sysctls=net.ipv4.conf.IFNAME.nonsense=1")
    before = way_out()
    refused = node.cli("network", "connect", "--gw-priority", "1", *wrong, "two", "web", check=False)
    assert "nonsense" in refused.stderr
    assert way_out() == before
    assert node.out("system", "check") == "kernel and store agree"
    node.cli("network", "connect", "--gw-priority", "1", "two", "web", "-p", "8080:80")
    assert "eth1" in way_out()
    assert asked() == [HELLO] * 3
    assert node.out("system", "check") == "kernel and store agree"
    node.cli("network", "disconnect", "two", "web")
    assert way_out() == before
    assert asked() == ["", "", HELLO]
    assert node.out("system", "check") == "kernel and store agree"
