"""Calls on volumes that wait for a server, or whose caller goes away: they hold nobody up, and leave nothing."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from conftest import BIN, Node, wait_until

from netstore.api.v1 import archive_pb2
from netstore.client import BlockingClient as Client

MOUNT = """#!/bin/sh
while [ -e {dead} ]; do sleep 0.1; done
exec mount -n -t tmpfs tmpfs "$2"
"""
STAT = """#!/bin/sh
while [ -e {dead} ]; do sleep 0.1; done
exec /usr/bin/stat "$@"
"""


@pytest.fixture
def dead(node: Node) -> Path:
    """No kernel here has NFS: programs stand for it that wait while this file is there. The daemon runs in their midst."""
    dead, programs = node.place / "dead", node.place / "programs"
    programs.mkdir()
    for name, text in (("mount.nfs", MOUNT), ("stat", STAT)):
        (programs / name).write_text(text.format(dead=dead))
        (programs / name).chmod(0o755)
    node.host.sh(f"mount -t overlay -o lowerdir={programs}:/usr/sbin overlay /usr/sbin")
    return dead


def nas(node: Node, name: str) -> None:
    node.cli("volume", "create", "-o", "type=nfs", "-o", "device=nas:/x", "-o", "o=ro", "-o", "timeout=20", name)


def test_servers_that_are_gone_hold_up_nobody_else(node: Node, image: str, dead: Path) -> None:
    dead.touch()
    names = [f"nas{number}" for number in range(8)]
    for name in names:
        nas(node, name)
    command = node.host.command(str(BIN / "netstore"), "-H", node.address, "volume", "stage")
    waiting = [subprocess.Popen([*command, name, "someone"], stderr=subprocess.DEVNULL) for name in names]
    wait_until(lambda: node.host.sh("pgrep -cf mount.nfs || true").strip() not in ("", "0"), what="the mounts")
    time.sleep(1)
    node.cli("run", "--rm", "-v", "plain:/plain", image, "ls", "/plain")
    assert [process.poll() for process in waiting] == [None] * len(waiting)
    dead.unlink()
    assert [process.wait(timeout=20) for process in waiting] == [0] * len(waiting)
    for name in names:
        node.cli("volume", "unstage", name, "someone")


def test_a_server_that_went_away_after_the_mount_is_asked_before_it_is_waited_for(
    node: Node, image: str, dead: Path
) -> None:
    nas(node, "nas")
    node.cli("run", "-d", "--name", "c", "-v", "nas:/nas", image)
    node.cli("run", "-d", "--name", "d", image)
    dead.touch()
    for command in (["run", "--rm", "-v", "nas:/nas", image, "ls"], ["volume", "attach", "nas", "d:/nas"],
                    ["volume", "export", "nas", "-o", os.devnull], ["volume", "snapshot", "create", "nas"]):  # fmt: skip
        refused = node.cli(*command, check=False)
        assert refused.returncode, command
        assert "asking the server: stat did not end in 5 s, and was killed" in refused.stderr, command
    node.kill()
    node.start()  # it takes up what runs without an answer
    assert '"holders"' in node.cli("volume", "inspect", "nas", check=False).stdout
    assert node.out("exec", "c", "ls", "/nas") == ""
    dead.unlink()
    node.cli("volume", "attach", "nas", "d:/nas")
    assert node.out("system", "check") == "kernel and store agree"


def test_a_caller_who_goes_away_leaves_nothing_mounted(node: Node, client: Client) -> None:
    node.cli("volume", "create", "-d", "image", "-o", "sparse=true", "--size", "16M", "v")
    node.cli("volume", "snapshot", "create", "v", "s")

    def mounted() -> str:
        return node.host.sh(f"grep -c {node.place}/state/volumes/image /proc/self/mountinfo || true").strip()

    for number in range(40):
        request = archive_pb2.ExportVolumeRequest(volume="v", snapshot="s" if number % 2 else "")
        call = client.archives.ExportVolume(request)
        time.sleep(0.001 * number)
        call.cancel()
        wait_until(lambda: mounted() == "0", what=f"the end of export {number}")
    assert node.out("system", "check") == "kernel and store agree"
    node.cli("volume", "rm", "v")
