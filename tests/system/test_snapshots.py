"""Snapshots, restores and clones: of every driver, used and unused, and what is left when they fail."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest
from conftest import Node

SHAPES = {
    "local": [],
    "image": ["-d", "image", "--size", "32M"],
    "image-xfs": ["-d", "image", "-o", "fs=xfs", "--size", "320M"],
    "image-sparse": ["-d", "image", "-o", "sparse=true", "--size", "32M"],
}


@pytest.fixture(params=SHAPES)
def flags(request: pytest.FixtureRequest) -> list[str]:
    return SHAPES[request.param]


def sh(node: Node, container: str, script: str) -> str:
    return node.out("exec", container, "sh", "-c", script)


def snapshots(node: Node, volume: str) -> str:
    return node.out("volume", "snapshot", "ls", volume, "-q")


def test_a_snapshot_keeps_and_gives_back(node: Node, image: str, flags: list[str]) -> None:
    node.cli("volume", "create", *flags, "db")
    node.cli("run", "-d", "--name", "c", "-v", "db:/db", image)
    sh(
        node,
        "c",
        "cd /db; echo one > file; ln file twin; mkdir -p a/b; echo x > a/b/c; chown 1000:1000 file; ln -s file link",
    )
    made = node.cli("volume", "snapshot", "create", "db", "first")
    assert made.stdout == "db@first\n"
    assert ("frozen for" in made.stderr) == bool(flags)
    assert ("file by file" in made.stderr) != bool(flags)
    sh(node, "c", "cd /db; echo two > file; rm -r a; touch new")
    refused = node.cli("volume", "snapshot", "restore", "db@first", check=False)
    assert "volume db is in use by c" in refused.stderr
    assert "stop what uses it" in refused.stderr
    node.cli("stop", "-t", "0", "c")
    node.cli("volume", "snapshot", "restore", "db@first")
    node.cli("start", "c")
    shown = "cat file; cat a/b/c; ls; stat -c '%u %h' file; readlink link"
    assert sh(node, "c", f"cd /db; {shown}").split() == ["one", "x", "a", "file", "link", "twin", "1000", "2", "file"]
    node.cli("volume", "clone", "db@first", "copy")
    node.cli("volume", "clone", "db", "other")
    node.cli("run", "-d", "--name", "d", "-v", "copy:/db", "-v", "other:/other", image)
    for place in ("/db", "/other"):
        assert sh(node, "d", f"cd {place}; {shown}").split()[:2] == ["one", "x"]
    assert node.out("volume", "inspect", "-f", "{{.Status.State}}", "copy") == "VOLUME_STATE_ACTIVE"
    assert node.cli("volume", "snapshot", "create", "db", "first", check=False).returncode == 1
    node.cli("volume", "snapshot", "rm", "db@first")
    assert snapshots(node, "db") == ""
    assert node.out("system", "check") == "kernel and store agree"


def test_a_clone_may_be_larger_or_of_another_driver(node: Node, image: str) -> None:
    node.cli("volume", "create", "-d", "image", "--size", "16M", "small")
    node.cli("run", "--rm", "-v", "small:/v", image, "sh", "-c", "echo kept > /v/file")
    node.cli("volume", "clone", "small", "large", "--size", "64M")
    node.cli("volume", "clone", "small", "plain", "-d", "local")
    script = "cat /a/file /b/file; stat -f -c '%b %S' /a"
    kept, also, blocks, unit = node.out(
        "run", "--rm", "-v", "large:/a", "-v", "plain:/b", image, "sh", "-c", script
    ).split()
    assert (kept, also) == ("kept", "kept")
    assert int(blocks) * int(unit) > 40 << 20
    taken = node.cli("volume", "clone", "small", "plain", check=False)
    assert "volume plain exists" in taken.stderr
    tight = node.cli("volume", "clone", "plain", "tight", "-d", "image", "--size", "9M", check=False)
    assert tight.returncode == 0
    assert node.out("system", "check") == "kernel and store agree"


def test_what_does_not_fit_leaves_nothing(node: Node, image: str) -> None:
    node.cli("volume", "create", "big")
    node.cli("run", "--rm", "-v", "big:/v", image, "sh", "-c", "head -c 20000000 /dev/urandom > /v/file")
    full = node.cli("volume", "clone", "big", "tight", "-d", "image", "--size", "16M", check=False)
    assert "no space is left" in full.stderr
    assert node.out("volume", "ls", "-q") == "big"
    assert [path.name for path in (node.place / "state/volumes/image").iterdir()] == []
    assert node.out("system", "check") == "kernel and store agree"


def test_snapshots_are_sparse_and_listed(node: Node) -> None:
    node.cli("volume", "create", "v")
    data = Path(node.out("volume", "inspect", "-f", "{{.Status.Mountpoint}}", "v"))
    with (data / "holes").open("wb") as file:
        os.truncate(file.fileno(), 1 << 30)
        file.seek(1 << 29)
        file.write(b"middle")
    os.setxattr(data / "holes", "user.mark", b"kept")
    subprocess.run(["mkfifo", data / "pipe"], check=True)
    node.cli("volume", "snapshot", "create", "v", "--label", "why=test")
    name = snapshots(node, "v")
    assert name.startswith("v@20")
    assert "unused" in node.out("volume", "snapshot", "ls", "v")
    assert node.out("volume", "snapshot", "ls", "--filter", "label=why=other", "-q") == ""
    (data / "holes").unlink()
    node.cli("volume", "snapshot", "restore", name)
    found = (data / "holes").stat()
    assert (found.st_size, found.st_blocks < 100) == (1 << 30, True)
    assert os.getxattr(data / "holes", "user.mark") == b"kept"
    assert stat.S_ISFIFO((data / "pipe").stat().st_mode)
    node.cli("volume", "rm", "v")
    assert node.out("volume", "snapshot", "ls", "-q") == ""
