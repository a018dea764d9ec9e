"""The clock is set a day forward, and back: nothing that counts seconds takes notice (libfaketime is netstored's clock)."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from balanced import serving
from conftest import BIN, Host, Node, wait_until
from dhcp import Dnsmasq, inside, pass_time
from shifted import LIBRARY, environment, shift

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="needs faketime(1): scripts/setup installs it")


class Shifted(Node):
    """A node whose daemon has a clock of its own; what it starts has the same."""

    def command(self, name: str, *flags: str) -> list[str]:
        return ["env", *environment(self.place), *super().command(name, *flags)]

    def shift(self, days: int) -> None:
        """Set the clock so far from the right time."""
        shift(self.place, days)


@pytest.fixture
def node(host: Host, place: Path) -> Iterator[Shifted]:
    """See `Shifted`."""
    node = Shifted(host, place)
    node.shift(0)
    node.start_resolver()
    node.start()
    yield node
    if containers := node.out("ps", "-aq").split():
        node.cli("rm", "-f", "-v", *containers)
    node.stop()


def events(node: Node) -> list[str]:
    return node.out("system", "events", "--since", "0", "--until-now").splitlines()


def snapshots(node: Node) -> set[str]:
    return {each["id"] for each in json.loads(node.out("volume", "snapshot", "ls", "v", "--format", "json"))}


def test_leases_last_as_long_as_they_do(node: Shifted) -> None:
    server = Dnsmasq(node)
    server.start()
    try:
        node.cli("network", "create", "-d", "macvlan", "--ipam-driver", "dhcp", "-o", "parent=uplink", "lan")
        node.cli("network", "connect", "lan", "--netns", node.host.netns("a"))
        address = inside(node, "a")
        for days in (1, -1, 0):  # it looks at the lease anew at each start
            node.shift(days)
            acknowledged = server.heard("DHCPACK")
            pass_time(node, 61)
            wait_until(lambda than=acknowledged: server.heard("DHCPACK") > than, what=f"the renewal, {days} days off")
            assert inside(node, "a") == address
        assert node.out("system", "check") == "kernel and store agree"
        assert not [line for line in events(node) if "lease-lost" in line or "lease-unanswered" in line]
        assert server.heard("DHCPDISCOVER") == 1
    finally:
        server.stop()


def test_schedules_the_trash_and_logs_go_on(node: Shifted, busybox_tar: Path) -> None:
    node.cli("image", "import", str(busybox_tar), "bb", "--cmd", "sleep 1000")
    node.cli("volume", "create", "--snapshot-schedule", "@every 1s", "--keep", "4", "v")
    node.cli("volume", "create", "gone")
    node.cli("volume", "rm", "--trash", "1h", "gone")
    node.cli(
        "run", "-d", "--name", "talks", "bb", "sh", "-c", "i=0; while sleep 0.2; do i=$((i+1)); echo line $i; done"
    )
    following = subprocess.Popen(
        node.host.command("sh", "-c", f"exec {BIN}/netstore -H {node.address} logs -f talks"),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    heard: list[str] = []
    try:
        assert following.stdout
        for days in (1, -1, 0):
            before = snapshots(node)
            node.shift(days)
            what = f"new snapshots alone, {days} days off"
            wait_until(lambda were=before: not snapshots(node) & were, seconds=40, what=what)
            heard += [following.stdout.readline() for _ in range(5)]
        assert heard == [f"line {i + 1}\n" for i in range(15)]
        assert "gone" in node.out("volume", "trash", "ls")
        assert not [line for line in events(node) if "snapshot-failed" in line]
        assert node.out("logs", "--tail", "1", "talks").startswith("line ")
        node.cli("stop", "-t", "0", "talks")
        assert re.search(r"Exited \(\d+\)", node.out("ps", "-a"))
    finally:
        following.kill()
        following.communicate()


def test_health_checks_go_on(node: Shifted) -> None:
    node.cli("network", "create", "app")
    node.cli("network", "connect", "app", "--netns", node.host.netns("b"), "--name", "b", "--label", "tier=web")
    node.cli("service", "create", "web", "--network", "app", "-l", "tier=web", "--health", "tcp:80",
             "--health-interval", "1s", "--health-retries", "1")  # fmt: skip

    def healthy() -> bool:
        shown = json.loads(node.out("service", "inspect", "web"))[0]["status"]["endpoints"]
        return bool(shown[0]["healthy"])

    for days in (1, -1):
        with serving(node, "b"):
            wait_until(healthy, what="health")
            node.shift(days)
            wait_until(healthy, what="health")
        wait_until(lambda: not healthy(), what=f"the end to be seen, {days} days off")
