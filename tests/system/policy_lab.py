"""What tests of policies share: servers and clients in namespaces, on networks of a node."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest
from conftest import Node

# Answers "PORT" on TCP and echoes on UDP, both families, at every port given.
SERVER = """
import socket, sys, threading
def tcp(s):
    while True:
        c, _ = s.accept()
        threading.Thread(target=talk, args=(c,), daemon=True).start()
def talk(c):
    with c:
        c.sendall(b"%d\\n" % c.getsockname()[1])
        while data := c.recv(4096):
            c.sendall(data)
def udp(s):
    while True:
        data, who = s.recvfrom(65536)
        s.sendto(data, who)
for port in map(int, sys.argv[1:]):
    s = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    threading.Thread(target=tcp, args=(s,), daemon=True).start()
    u = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    u.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    u.bind(("::", port))
    threading.Thread(target=udp, args=(u,), daemon=True).start()
print("ready", flush=True)
threading.Event().wait()
"""
ASK_TCP = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3])) as s:
        print(s.recv(100).decode().strip())
except OSError:
    print("no")
"""
ASK_UDP = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM) as s:
    s.settimeout(float(sys.argv[3]))
    s.sendto(b"x" * int(sys.argv[4]), (sys.argv[1], int(sys.argv[2])))
    try:
        print(len(s.recv(65536)))
    except OSError:
        print("no")
"""


class Lab:
    """Namespaces attached to networks, with servers in them."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.servers: list[subprocess.Popen[str]] = []
        self.found: dict[str, dict[str, str]] = {}

    def attach(self, name: str, network: str, *labels: str, publish: str = "") -> None:
        self.node.host.netns(name)
        flags = [part for label in labels for part in ("--label", label)]
        flags += ["-p", publish] if publish else []
        self.node.cli("network", "connect", "--netns", f"/run/netns/{name}", "--name", name, *flags, network)
        found = json.loads(self.node.out("endpoint", "ls", "--filter", f"name={name}", "--format", "json"))[0]
        self.found[name] = {"id": found["id"]} | {
            "6" if ":" in text else "4": text.split("/")[0] for text in found["status"]["addresses"]
        }

    def serve(self, name: str, *ports: int) -> None:
        command = self.node.host.command(*self._inside(name), "python3", "-c", SERVER, *map(str, ports))
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.servers.append(server)
        assert server.stdout
        assert server.stdout.readline() == "ready\n"

    @staticmethod
    def _inside(name: str) -> list[str]:
        return ["ip", "netns", "exec", name] if name else []

    def run(self, name: str, *args: str) -> str:
        return self.node.host.run(*self._inside(name), *args, check=False).stdout.strip()

    def tcp(self, name: str, target: str, port: int, *, seconds: float = 0.4) -> bool:
        return self.run(name, "python3", "-c", ASK_TCP, target, str(port), str(seconds)) != "no"

    def udp(self, name: str, target: str, port: int, *, size: int = 10, seconds: float = 0.4) -> bool:
        return self.run(name, "python3", "-c", ASK_UDP, target, str(port), str(seconds), str(size)) == str(size)

    def ping(self, name: str, target: str) -> bool:
        return "1 received" in self.run(name, "ping", "-c1", "-W1", target)

    def address(self, name: str, family: str = "4") -> str:
        return self.found[name][family]


@pytest.fixture
def lab(node: Node) -> Iterator[Lab]:
    lab = Lab(node)
    yield lab
    for server in lab.servers:
        server.kill()
        server.wait()
        assert server.stdout
        server.stdout.close()


def app(lab: Lab, *flags: str) -> None:
    """Make network app with web, db and other."""
    lab.node.cli("network", "create", "--ipv6", *flags, "app")
    lab.attach("web", "app", "tier=web")
    lab.attach("db", "app", "tier=db")
    lab.attach("other", "app")
    lab.serve("db", 5432, 6000, 8005)
    lab.serve("web", 80)


def elements(lab: Lab) -> list[str]:
    """Return every element of our tables that does not expire."""
    found = []
    for table in ("inet netstore", "bridge netstore"):
        for entry in json.loads(lab.node.host.sh(f"nft -j list table {table}"))["nftables"]:
            for kind, value in entry.items():
                if kind in ("set", "map") and value["name"] not in ("flows", "flows6", "talks", "talks6"):
                    found += [f"{value['name']} {json.dumps(element)}" for element in value.get("elem", [])]
    return found


def rules(lab: Lab) -> int:
    return lab.node.host.sh("nft -a list ruleset").count("# handle")
