"""Names: what Docker answers, and where questions go that are not ours; asked with dig from inside."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from conftest import Node, wait_until

from netstore.api.v1 import endpoint_pb2
from netstore.client import BlockingClient as Client

UPSTREAM = """
import socketserver, sys
from dnslib import DNSRecord, RR, QTYPE, A, RCODE
class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        data, sock = self.request
        question = DNSRecord.parse(data)
        reply = question.reply()
        if sys.argv[2] == "SERVFAIL":
            reply.header.rcode = RCODE.SERVFAIL
        else:
            reply.add_answer(RR(question.q.qname, QTYPE.A, rdata=A(sys.argv[2])))
        sock.sendto(reply.pack(), self.client_address)
with socketserver.UDPServer((sys.argv[1], 53), Handler) as server:
    print("ready", flush=True)
    server.serve_forever()
"""


def upstreams(node: Node, **answers: str) -> list[subprocess.Popen[bytes]]:
    """Start a name server on each address of the neighbour, which gives everything one answer."""
    started = []
    for address, answer in answers.items():
        address = address.removeprefix("a").replace("_", ".")
        node.host.sh(f"ip -n neighbour addr add {address}/24 dev eth0 2>/dev/null || true")
        inside = ["ip", "netns", "exec", "neighbour", sys.executable, "-c", UPSTREAM, address, answer]
        server = subprocess.Popen(node.host.command(*inside), stdout=subprocess.PIPE)
        assert server.stdout
        server.stdout.readline()
        started.append(server)
    return started


def stop(servers: list[subprocess.Popen[bytes]]) -> None:
    for server in servers:
        server.kill()
        server.communicate()


def dig(node: Node, container: str, *question: str) -> str:
    """Ask 127.0.0.11 from a container's network namespace."""
    path = json.loads(node.out("inspect", container))[0]["status"]["sandbox_path"]
    return node.host.run("nsenter", f"--net={path}", "dig", "@127.0.0.11", "+tries=1", "+time=4", *question).stdout


def test_split_servers_and_health(node: Node, image: str) -> None:
    servers = upstreams(
        node, a203_0_113_2="10.0.0.1", a203_0_113_53="10.0.0.2", a203_0_113_54="10.0.0.3", a203_0_113_55="SERVFAIL"
    )
    try:
        node.cli("network", "create", "--dns", "corp.example=203.0.113.53", "app")
        node.cli("run", "-d", "--name", "c", "--network", "app", image)
        assert dig(node, "c", "+short", "www.example.org").strip() == "10.0.0.1"
        assert dig(node, "c", "+short", "db.CORP.example").strip() == "10.0.0.2"
        assert dig(node, "c", "+short", "notcorp.example").strip() == "10.0.0.1"
        node.cli("network", "update", "--dns-add", "203.0.113.55", "--dns-add", "203.0.113.54", "app")
        assert dig(node, "c", "+short", "www.example.org").strip() == "10.0.0.3"  # the next after SERVFAIL
        node.cli("network", "update", "--dns-drop", "203.0.113.54", "app")
        assert "SERVFAIL" in dig(node, "c", "www.example.org")
        node.cli("run", "-d", "--name", "own", "--network", "app", "--dns", "203.0.113.54", image)
        assert dig(node, "own", "+short", "www.example.org").strip() == "10.0.0.3"
        assert dig(node, "own", "+short", "db.corp.example").strip() == "10.0.0.2"
        assert "nameserver 127.0.0.11" in node.out("exec", "own", "cat", "/etc/resolv.conf")
        # A silent server costs one wait, then it is asked last.
        node.cli("network", "create", "--dns", "203.0.113.99", "--dns", "203.0.113.54", "slow")
        node.cli("run", "-d", "--name", "s", "--network", "slow", image)
        dig(node, "s", "one.example.org")
        answer = dig(node, "s", "two.example.org")
        assert int(answer.split("Query time: ")[1].split()[0]) < 1000
    finally:
        stop(servers)


def test_records(node: Node, client: Client, image: str) -> None:
    node.cli("network", "create", "--ipv6", "app")
    node.cli("network", "create", "--internal", "back")
    node.cli("run", "-d", "--name", "c", "--network", "app", "--network", "back", image)
    for index in range(3):
        node.cli(
            "run",
            "-d",
            "--name",
            f"w{index}",
            "--network",
            "name=app,alias=web",
            "--network",
            "name=back,alias=web",
            image,
        )
    found = dig(node, "c", "+short", "web").split()
    assert len(found) == 6  # every address on every network that both share
    assert len(dig(node, "c", "+short", "web.app").split()) == 3
    assert len({dig(node, "c", "+short", "web").split()[0] for _ in range(12)}) > 2  # round robin
    whole = dig(node, "c", "web")
    assert "EDNS: version: 0" in whole
    assert "IN\tA" in whole
    assert "\t1\t" in whole or " 1 " in whole  # seconds to live
    assert len(dig(node, "c", "+short", "AAAA", "web").split()) == 3
    nothing = dig(node, "c", "MX", "web")
    assert "NOERROR" in nothing
    assert "ANSWER: 0" in nothing
    assert dig(node, "c", "+tcp", "+short", "w0.back").strip()
    back = dig(node, "c", "+short", "w0.back").strip()
    assert dig(node, "c", "+short", "-x", back).strip() == "w0.back."
    node.host.sh("for i in $(seq 0 39); do echo netns add n$i; done | ip -batch -")
    endpoints = [
        {
            "spec": {
                "network": "app",
                "sandbox": {"netns_path": f"/run/netns/n{index}"},
                "name": f"n{index}",
                "aliases": ["many"],
            }
        }
        for index in range(40)
    ]
    client.endpoints.AttachEndpoints(endpoint_pb2.AttachEndpointsRequest(endpoints=endpoints))
    truncated = dig(node, "c", "+noedns", "+ignore", "many")
    assert " tc " in truncated or " tc;" in truncated
    assert len(dig(node, "c", "+noedns", "+short", "many").split()) == 40  # dig asks again over TCP
    node.cli("network", "disconnect", "app", "c")
    nobody = dig(node, "c", "www.example.org")  # behind an internal network alone
    assert "NXDOMAIN" in nobody
    assert "SOA" in nobody


def test_services_and_what_there_is_not(node: Node, image: str) -> None:
    node.cli("network", "create", "--ipv6", "app")
    node.cli("run", "-d", "--name", "c", "--network", "app", image)
    node.cli("run", "-d", "--name", "web", "--network", "app", "--expose", "80", "--expose", "7000-7002/udp",
             "-p", "127.0.0.1::443", "--hostname", "box", "--domainname", "example.org",
             "-l", "netstore.service.metrics=9100", image)  # fmt: skip
    assert dig(node, "c", "+short", "SRV", "_http._tcp.web").strip() == "0 0 80 web.app."
    assert dig(node, "c", "+short", "SRV", "_https._tcp.WEB.app").strip() == "0 0 443 web.app."
    assert dig(node, "c", "+short", "SRV", "_7001._udp.web").strip() == "0 0 7001 web.app."
    assert dig(node, "c", "+short", "SRV", "_metrics._tcp.box").strip() == "0 0 9100 web.app."
    helpful = dig(node, "c", "SRV", "_http._tcp.web").split("ADDITIONAL SECTION:")[1]
    assert "172.18.0.3" in helpful
    assert "fd" in helpful
    for question in (("SRV", "_smtp._tcp.web"), ("TXT", "web"), ("A", "_http._tcp.web")):
        nothing = dig(node, "c", *question)
        assert "NOERROR" in nothing
        assert "ANSWER: 0, AUTHORITY: 1" in nothing
        assert "SOA" in nothing
    identity = node.out("inspect", "-f", "{{.Id}}", "web")[:12]
    for name in (identity, "BOX", "box.example.org", "box.app"):
        assert dig(node, "c", "+short", name).strip() == "172.18.0.3"
    assert "WeB.aPp." in dig(node, "c", "WeB.aPp")
    six = dig(node, "c", "+short", "AAAA", "web").strip()
    assert dig(node, "c", "+short", "-x", six).strip() == "web.app."
    assert "NXDOMAIN" in dig(node, "c", "-x", "172.18.9.9")  # of our own network: nobody else can know
    node.cli("stop", "-t", "0", "web")
    assert not dig(node, "c", "+short", "SRV", "_http._tcp.web").strip()


def test_files_of_etc(node: Node, image: str) -> None:
    node.cli("network", "create", "app")
    node.cli("network", "create", "two")
    node.cli("run", "-d", "--name", "c", "--network", "app", "--hostname", "box", "--domainname", "example.org",
             "--add-host", "db:10.9.9.9", "--add-host", "up=host-gateway", "--add-host", "six:[fd00::9]",
             "--dns-search", "corp.example", "--dns-option", "ndots:2", image)  # fmt: skip
    hosts = node.out("exec", "c", "cat", "/etc/hosts")
    for line in ("172.18.0.2\tbox.example.org box", "10.9.9.9\tdb", "172.18.0.1\tup", "fd00::9\tsix"):
        assert line in hosts
    assert node.out("exec", "c", "cat", "/etc/hostname") == "box"
    assert node.out("exec", "c", "cat", "/etc/resolv.conf").splitlines()[1:] == [
        "nameserver 127.0.0.11", "search corp.example", "options ndots:2"
    ]  # fmt: skip
    node.cli("network", "connect", "--ip", "172.19.0.9", "two", "c")
    assert "172.19.0.9\tbox" in node.out("exec", "c", "cat", "/etc/hosts")
    node.cli("network", "disconnect", "two", "c")
    assert "172.19.0.9" not in node.out("exec", "c", "cat", "/etc/hosts")
    node.cli("run", "-d", "--name", "plain", "--dns", "203.0.113.53", image)
    assert "nameserver 203.0.113.53" in node.out("exec", "plain", "cat", "/etc/resolv.conf")
    assert "172.17.0.1\thost.docker.internal host.netstore.internal" in node.out("exec", "plain", "cat", "/etc/hosts")
    assert node.out("exec", "c", "nslookup", "host.docker.internal").endswith("172.18.0.1")


def test_a_container_keeps_port_53_and_new_names_are_quick(node: Node, image: str) -> None:
    node.cli("network", "create", "app")
    node.cli("run", "-d", "--name", "c", "--network", "app", image)
    path = json.loads(node.out("inspect", "c"))[0]["status"]["sandbox_path"]
    bind = 'import socket; [socket.socket(type=t).bind(("", 53)) for t in (1, 2)]; print(1)'
    assert node.host.run("nsenter", f"--net={path}", sys.executable, "-c", bind).stdout == "1\n"
    node.host.netns("n")
    node.cli("network", "connect", "--netns", "/run/netns/n", "--name", "late", "app")
    late = dig(node, "c", "late")
    assert "ANSWER: 1" in late
    assert int(late.split("Query time: ")[1].split()[0]) < 500  # benchmarks/dns.py measures it
    node.cli("network", "disconnect", "app", "--netns", "/run/netns/n")
    wait_until(lambda: not dig(node, "c", "+short", "late").strip(), seconds=2, what="the name to go")
    # Whoever is root inside may flush the firewall there; a check finds it, and repairs it.
    node.host.run("nsenter", f"--net={path}", "nft", "flush", "ruleset")
    assert "names lead nowhere inside" in node.cli("system", "check", check=False).stdout
    node.cli("system", "check", "--repair")
    assert dig(node, "c", "+short", "c").strip()


FIREWALL = """
table inet mine {
 chain o { type filter hook output priority 0; policy drop
  ct state established,related accept
  ct state new ip daddr 127.0.0.11 accept
 }
 chain i { type filter hook input priority 0; policy drop
  ct state established,related accept
  ct state new iifname lo accept
 }
}"""


def test_names_cost_no_conntrack_and_pass_a_firewall_inside(node: Node, image: str) -> None:
    node.cli("network", "create", "app")
    node.cli("run", "-d", "--name", "c", "--network", "app", image)
    inside = ("nsenter", f"--net={json.loads(node.out('inspect', 'c'))[0]['status']['sandbox_path']}")
    rules = node.host.run(*inside, "nft", "list", "table", "ip", "netstore").stdout
    for protocol in ("udp", "tcp"):
        asked, port = re.findall(rf"ip daddr 127.0.0.11 {protocol} dport (53) {protocol} dport set (\d+)\n", rules)[0]
        assert f"ip saddr 127.0.0.11 {protocol} sport {port} {protocol} sport set {asked}\n" in rules
    assert dig(node, "c", "+short", "c").strip()
    tracked = ("cat", "/proc/net/nf_conntrack")
    assert node.host.run(*inside, *tracked).stdout == ""
    node.host.run(*inside, "nft", FIREWALL)
    assert dig(node, "c", "+short", "c").strip()
    assert dig(node, "c", "+short", "+tcp", "c").strip()
    assert "UNREPLIED" not in node.host.run(*inside, *tracked).stdout


def test_the_host_and_the_default_network(node: Node, image: str) -> None:
    node.cli("network", "create", "app")
    names = "host.docker.internal host.netstore.internal"
    node.cli("run", "-d", "--name", "plain", "--add-host", "up:host-gateway", image)
    hosts = node.out("exec", "plain", "cat", "/etc/hosts")
    assert f"172.17.0.1\t{names}" in hosts
    assert "172.17.0.1\tup" in hosts
    node.cli("run", "-d", "--name", "on-host", "--network", "host", image)
    assert f"127.0.0.1\t{names}" in node.out("exec", "on-host", "cat", "/etc/hosts")
    # One that comes from the default network to another: from then on names are answered.
    node.cli("network", "connect", "--alias", "web", "app", "plain")
    assert "nameserver 127.0.0.11" in node.out("exec", "plain", "cat", "/etc/resolv.conf")
    for name in names.split():
        assert node.out("exec", "plain", "nslookup", name).endswith("172.17.0.1")
    assert dig(node, "plain", "+short", "web").strip() == "172.18.0.2"
    node.cli("network", "disconnect", "app", "plain")
    assert "127.0.0.11" not in node.out("exec", "plain", "cat", "/etc/resolv.conf")
    assert f"172.17.0.1\t{names}" in node.out("exec", "plain", "cat", "/etc/hosts")
    # Without a way out the host is still itself, and a name server on that very network may be asked.
    node.cli("network", "create", "--internal", "--subnet", "10.5.0.0/24", "--dns", "10.5.0.9", "back")
    node.cli("run", "-d", "--name", "inside", "--network", "back", image)
    assert dig(node, "inside", "+short", "host.docker.internal").strip() == "10.5.0.1"
    node.host.netns("ns")
    node.cli("network", "connect", "--netns", "/run/netns/ns", "--ip", "10.5.0.9", "back")
    command = ["ip", "netns", "exec", "ns", sys.executable, "-c", UPSTREAM, "10.5.0.9", "10.7.7.7"]
    server = subprocess.Popen(node.host.command(*command), stdout=subprocess.PIPE)
    try:
        assert server.stdout
        server.stdout.readline()
        assert dig(node, "inside", "+short", "corp.example").strip() == "10.7.7.7"
    finally:
        stop([server])


def test_links(node: Node, image: str) -> None:
    node.cli("network", "create", "app")
    node.cli("run", "-d", "--name", "db", "--network", "app", image)
    node.cli("run", "-d", "--name", "c", "--network", "app", "--link", "db:Store", "--link", "later", image)
    node.cli("run", "-d", "--name", "other", "--network", "app", image)
    assert dig(node, "c", "+short", "store").strip() == dig(node, "c", "+short", "db").strip() == "172.18.0.2"
    assert not dig(node, "other", "+short", "store").strip()  # its own alone
    node.cli("run", "-d", "--name", "later", "--network", "app", image)
    assert dig(node, "c", "+short", "later").strip() == "172.18.0.5"
    node.cli("network", "create", "two")
    node.cli("network", "connect", "two", "later")
    node.cli("network", "connect", "--link", "later:mate", "--alias", "here", "two", "db")
    assert dig(node, "db", "+short", "mate").strip() == "172.19.0.2"
    assert dig(node, "later", "+short", "here").strip() == "172.19.0.3"
    assert not dig(node, "c", "+short", "here").strip()  # an alias is its network's
    # On the default network: /etc/hosts and variables.
    node.cli("run", "-d", "--name", "old", "--expose", "5432", "-e", "KEY=value", image)
    node.cli("run", "-d", "--name", "new", "--link", "old:db", image)
    identity = node.out("inspect", "-f", "{{.Id}}", "old")[:12]
    assert f"172.17.0.2\tdb {identity} old" in node.out("exec", "new", "cat", "/etc/hosts")
    variables = node.out("exec", "new", "env").splitlines()
    assert {"DB_PORT=tcp://172.17.0.2:5432", "DB_PORT_5432_TCP_ADDR=172.17.0.2", "DB_NAME=/new/db",
            "DB_ENV_KEY=value"} <= set(variables)  # fmt: skip
    refused = node.cli("run", "-d", "--link", "nosuch", image, check=False)
    assert "nosuch" in refused.stderr
    refused = node.cli("run", "-d", "--network", "host", "--link", "old", image, check=False)
    assert "links" in refused.stderr


def test_what_a_container_writes_into_etc_stays(node: Node, image: str) -> None:
    for name in ("app", "two"):
        node.cli("network", "create", name)
    node.cli("run", "-d", "--name", "c", "--network", "app", "--hostname", "box.example.org", image)
    assert "172.18.0.2\tbox.example.org box" in node.out("exec", "c", "cat", "/etc/hosts")
    node.cli("exec", "c", "sh", "-c", "echo 10.9.9.9 mine >> /etc/hosts; echo nameserver 9.9.9.9 > /etc/resolv.conf")
    node.cli("network", "connect", "two", "c")
    hosts = node.out("exec", "c", "cat", "/etc/hosts")
    assert "172.19.0.2\tbox.example.org box" in hosts
    assert "10.9.9.9 mine" in hosts
    node.cli("network", "disconnect", "app", "c")
    hosts = node.out("exec", "c", "cat", "/etc/hosts")
    assert "172.18.0.2" not in hosts
    assert "10.9.9.9 mine" in hosts
    assert node.out("exec", "c", "cat", "/etc/resolv.conf") == "nameserver 9.9.9.9"
    node.cli("exec", "c", "sh", "-c", "cat /dev/zero | head -c 2000000 > /etc/hosts")  # whatever it is
    node.cli("network", "connect", "app", "c")
    node.cli("run", "-d", "--name", "joined", "--network", "container:c", image)
    assert node.out("exec", "joined", "hostname") == "box.example.org"
    assert node.out("exec", "joined", "cat", "/etc/resolv.conf") == "nameserver 9.9.9.9"  # the files are shared
    node.cli("rm", "-f", "joined")
    node.cli("stop", "-t", "0", "c")
    node.cli("start", "c")
    assert "mine" not in node.out("exec", "c", "cat", "/etc/hosts")
    assert "nameserver 127.0.0.11" in node.out("exec", "c", "cat", "/etc/resolv.conf")


def test_the_hosts_resolv_conf_is_followed(node: Node, image: str) -> None:
    node.kill()
    node.host.sh(f"cp /etc/resolv.conf {node.place}/conf; mount --bind {node.place}/conf /etc/resolv.conf")
    node.host.sh("echo nameserver 127.0.0.53 > /etc/resolv.conf")
    node.start()
    node.cli("run", "-d", "--name", "plain", image)
    node.cli("network", "create", "app")
    node.cli("run", "-d", "--name", "named", "--network", "app", image)
    # A stub that only the host reaches is not passed on.
    assert "127.0.0.53" not in node.out("exec", "plain", "cat", "/etc/resolv.conf")
    node.host.sh("printf 'search corp.example\nnameserver 203.0.113.7\n' > /etc/resolv.conf")
    wait_until(lambda: "203.0.113.7" in node.out("exec", "plain", "cat", "/etc/resolv.conf"), what="the change")
    named = node.out("exec", "named", "cat", "/etc/resolv.conf")
    assert "search corp.example" in named
    assert "203.0.113.7" not in named


def test_the_host_where_the_gateway_is_another_machine(node: Node, image: str) -> None:
    lan = ("network", "create", "-d", "macvlan", "-o", "parent=uplink", "--subnet", "192.0.2.0/24")
    node.cli(*lan, "--gateway", "192.0.2.1", "lan")
    node.cli("run", "-d", "--name", "c", "--network", "lan", "--add-host", "up:host-gateway", image)
    nobody = dig(node, "c", "host.docker.internal")
    assert "NOERROR" in nobody
    assert "ANSWER: 0" in nobody
    assert "192.0.2.1" not in node.out("exec", "c", "cat", "/etc/hosts")
    node.cli("network", "create", "app")
    node.cli("network", "connect", "app", "c")
    assert dig(node, "c", "+short", "host.docker.internal").strip() == "172.18.0.1"
    node.cli("rm", "-f", "c")
    node.cli("network", "rm", "lan")
    node.cli(*lan, "-o", "host_access=true", "--aux-address", "host=192.0.2.9", "lan")
    node.cli("run", "-d", "--name", "c", "--network", "lan", "--add-host", "up:host-gateway", image)
    assert dig(node, "c", "+short", "host.netstore.internal").strip() == "192.0.2.9"
    assert "192.0.2.9\tup" in node.out("exec", "c", "cat", "/etc/hosts")
