"""A DHCP server on the neighbour's link, and what is done to leases; for tests of them."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import subprocess

from conftest import Node

ROUTER = "203.0.113.2"


class Dnsmasq:
    """The router's DHCP server; a lease is 120 s, its least: to be renewed after 60 and, by any server, 105."""

    def __init__(self, node: Node) -> None:
        self.node, self.process = node, None
        self.log = node.place / "dnsmasq.log"

    def start(self) -> None:
        """Serve the neighbour's link."""
        command = [
            "ip", "netns", "exec", "neighbour", "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0",
            "--interface=eth0", "--dhcp-authoritative", "--no-ping", "--log-dhcp", f"--log-facility={self.log}",
            "--dhcp-range=203.0.113.100,203.0.113.120,120", f"--dhcp-option=option:router,{ROUTER}",
            "--dhcp-option=option:dns-server,203.0.113.77", f"--dhcp-leasefile={self.node.place}/leases",
            "--user=root",
        ]  # fmt: skip
        self.process = subprocess.Popen(self.node.host.command(*command))

    def stop(self) -> None:
        """End it."""
        if self.process:
            self.process.terminate()
            self.process.wait()

    def heard(self, kind: str) -> int:
        """Count messages of a kind (DHCPACK) in its log."""
        return len(re.findall(rf"{kind}\(eth0\)", self.log.read_text())) if self.log.exists() else 0

    def leases(self) -> list[list[str]]:
        """Return expiry, MAC, address, name and identifier of each."""
        return [line.split() for line in (self.node.place / "leases").read_text().splitlines()]


def inside(node: Node, netns: str) -> str:
    found = json.loads(node.host.sh(f"ip -n {netns} -j addr show eth0"))[0]["addr_info"]
    return next((each["local"] for each in found if each["family"] == "inet"), "")


def pass_time(node: Node, seconds: int) -> None:
    """Kill netstored, and start another so many seconds later, as far as the leases can tell."""
    node.kill()
    with contextlib.closing(sqlite3.connect(node.place / "state" / "netstore.db")) as database, database:
        for key in ("obtained", "uptime"):
            earlier = f"json_set(body, '$.lease.{key}', json_extract(body, '$.lease.{key}') - ?)"
            database.execute(f"UPDATE endpoints SET body = {earlier}", [seconds])
    node.start()
