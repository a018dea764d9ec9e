"""Endpoints that say who they are, and clients that count whom they reached; for tests of services."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from conftest import Node, wait_until

# Answers TCP as HTTP does, and UDP, with its name; GET /ill switches the status between 200 and 500.
_SERVER = """
import socket, sys, threading
name, status, lock = sys.argv[1], [200, 500], threading.Lock()
def udp(s):
    while True:
        s.sendto(name.encode(), s.recvfrom(99)[1])
for port in map(int, sys.argv[2:]):
    u = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    u.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    u.bind(("::", port))
    threading.Thread(target=udp, args=(u,), daemon=True).start()
def serve(s):
    while True:
        c, who = s.accept()
        with c:
            c.settimeout(2)
            try:
                if b"/ill" in c.recv(999):
                    status.reverse()
                c.sendall(b"HTTP/1.0 %d x\\r\\n\\r\\n%s" % (status[0], name.encode()))
            except OSError:
                pass
listening = [socket.create_server(("::", int(p)), family=socket.AF_INET6, dualstack_ipv6=True) for p in sys.argv[2:]]
print(flush=True)
for s in listening:
    threading.Thread(target=serve, args=(s,)).start()
"""
# Connects so many times, and says how often each name answered; "" where nobody did.
_CLIENT = """
import collections, json, socket, sys
kind, address, port, times = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
found = collections.Counter()
for _ in range(times):
    try:
        if kind == "udp":
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as s:
                s.settimeout(1)
                s.connect((address, port))
                s.send(b"x")
                found[s.recv(99).decode()] += 1
        else:
            with socket.create_connection((address, port), timeout=1) as s:
                s.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
                found[b"".join(iter(lambda: s.recv(99), b"")).split(b"\\r\\n\\r\\n")[-1].decode()] += 1
    except OSError:
        found[""] += 1
print(json.dumps(found))
"""


@contextmanager
def serving(node: Node, *names: str, ports: tuple[int, ...] = (80,)) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Let namespaces of a node, by their names, answer on ports; they end with the context."""
    found = {}
    for name in names:
        command = ["ip", "netns", "exec", name, sys.executable, "-c", _SERVER, name, *map(str, ports)]
        found[name] = subprocess.Popen(node.host.command(*command), stdout=subprocess.PIPE, text=True)
    try:
        for process in found.values():
            assert process.stdout
            assert process.stdout.readline() == "\n"
        yield found
    finally:
        for process in found.values():
            process.kill()
            process.communicate()


def reached(
    node: Node, netns: str, address: str, *, port: int = 80, times: int = 30, kind: str = "tcp"
) -> dict[str, int]:
    """Return how often each name answered a client in a namespace of a node, "" in the node itself."""
    inside = ["ip", "netns", "exec", netns] if netns else []
    done = node.host.run(*inside, sys.executable, "-c", _CLIENT, kind, address, str(port), str(times), timeout=60)
    return dict(json.loads(done.stdout))


def settles(node: Node, netns: str, address: str, names: set[str], *, port: int = 80) -> None:
    """Wait until exactly these names answer."""
    wait_until(lambda: reached(node, netns, address, port=port).keys() == names, what=f"{address} to be {names}")


def status(node: Node, service: str) -> dict[str, bool]:
    """Return the endpoints of a service, and whether they get connections."""
    found = json.loads(node.out("service", "inspect", service))[0]["status"]["endpoints"]
    return {each["name"]: each["healthy"] for each in found}


def virtual(node: Node, service: str) -> str:
    """Return a service's IPv4 address."""
    return str(json.loads(node.out("service", "inspect", service))[0]["status"]["addresses"][0])
