"""dockerd with br_netfilter on and FORWARD dropping: TCP, UDP and SCTP ports, --ip6, --mac-address."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Node, wait_until
from dockerd import NEEDS_DOCKERD, Docker
from sctp import INIT
from test_docker import HELLO, HTTPD, create, docker, fetch, plugged

__all__ = ["docker", "plugged"]  # fixtures

pytestmark = NEEDS_DOCKERD

ECHO = """
import socket
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
link.bind(("0.0.0.0", 53))
while True:
    data, peer = link.recvfrom(100)
    link.sendto(peer[0].encode() + b" says " + data, peer)
"""
ASK = """
import socket, sys
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
link.settimeout(1)
link.sendto(b"hello", (sys.argv[1], 5300))
try:
    print(link.recv(100).decode())
except TimeoutError:
    pass
"""


@pytest.mark.timeout(240)
def test_every_protocol_and_address(plugged: Node, docker: Docker, place: Path) -> None:
    host = plugged.host
    for family in ("iptables", "ip6tables"):
        if host.run("sysctl", "-qw", f"net.bridge.bridge-nf-call-{family}=1", check=False).returncode:
            pytest.skip("no br_netfilter in this kernel: tests/lab has it")
    assert "-P FORWARD DROP" in host.sh("iptables -S FORWARD")
    create(docker, "app", "--subnet", "10.9.0.0/24", "--ipv6", "--subnet", "fd09::/64")
    asked = ("--ip", "10.9.0.40", "--ip6", "fd09::40", "--mac-address", "02:42:0a:09:00:99")
    ports = ("-p", "8080:80", "-p", "5300:53/udp", "-p", "5300:53/sctp", "-p", "7000-7002:7000-7002")
    docker.out("run", "-d", "--name", "web", "--network", "app", *asked, *ports, *HTTPD)
    docker.out("run", "-d", "--name", "peer", "--network", "app", "bb", "sleep", "1000")
    shown = json.loads(docker.out("inspect", "web"))[0]
    settings = shown["NetworkSettings"]["Networks"]["app"]
    assert (settings["IPAddress"], settings["GlobalIPv6Address"]) == ("10.9.0.40", "fd09::40")
    inside = docker.out("exec", "web", "ip", "addr", "show", "eth0")
    for each in ("02:42:0a:09:00:99", "10.9.0.40/24", "fd09::40/64"):
        assert each in inside
    wait_until(lambda: fetch(host, 8080) == HELLO, what="the published port")
    for url in ("http://web/hello", "http://10.9.0.40/hello", "http://[fd09::40]/hello"):  # bridged, and filtered
        assert docker.out("exec", "peer", "wget", "-qO-", url) == HELLO
    assert docker(("exec", "peer", "ping", "-c1", "-W2", "203.0.113.2")).returncode == 0

    server = subprocess.Popen(
        host.command("nsenter", "-t", str(shown["State"]["Pid"]), "-n", sys.executable, "-c", ECHO)
    )
    try:
        ask = ("ip", "netns", "exec", "neighbour", sys.executable, "-c", ASK, "203.0.113.1")
        wait_until(lambda: host.run(*ask).stdout == "203.0.113.2 says hello\n", what="UDP from outside")
        assert "says hello" in host.run(sys.executable, "-c", ASK, "127.0.0.1").stdout
    finally:
        server.kill()
        server.wait()
    host.run("ip", "netns", "exec", "neighbour", sys.executable, "-c", INIT, "203.0.113.1", "5300")
    assert "src=10.9.0.40 dst=203.0.113.2 sport=53 dport=4444" in host.sh("cat /proc/net/nf_conntrack")
    assert len(plugged.out("port", "ls", "-q").split()) >= 4 or "7000-7002" in plugged.out("port", "ls")
    taken = docker(("run", "--rm", "--network", "app", "-p", "5300:9/udp", "bb", "true"), check=False)
    assert "5300/udp is taken" in taken.stderr
    twin = docker(("run", "--rm", "--network", "app", "--mac-address", "02:42:0a:09:00:99", "bb", "true"), check=False)
    assert "02:42:0a:09:00:99" in twin.stderr
    docker.out("rm", "-f", "web", "peer")
    docker.out("network", "rm", "app")
    assert plugged.out("endpoint", "ls", "-q") == ""
    assert plugged.out("system", "check") == "kernel and store agree"
