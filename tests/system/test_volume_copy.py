"""volume cp, stats and verify, on volumes that are used."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import grpc
import pytest
from conftest import Node

from netstore.api.v1 import archive_pb2 as pb
from netstore.client import BlockingClient as Client


def names(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


def test_cp_in_and_out_as_docker_does(node: Node, image: str, place: Path) -> None:
    node.cli("volume", "create", "-d", "image", "--size", "32M", "v")
    node.cli("run", "-d", "--name", "c", "-v", "v:/v", image)
    tree = place / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "file").write_text("hello")
    os.chown(tree / "file", 1234, 1234)
    (tree / "sub/su").write_text("x")
    (tree / "sub/su").chmod(0o4755)

    def inside(script: str) -> list[str]:
        return node.out("exec", "c", "sh", "-c", script).split()

    node.cli("volume", "cp", str(tree), "v:/new")  # becomes one that is not there
    assert inside("cd /v/new; ls; cat file; echo; stat -c '%u' file; stat -c '%a' sub/su") == [
        "file",
        "sub",
        "hello",
        "0",
        "755",
    ]
    node.cli("volume", "cp", "-a", str(tree), "v:/new")  # goes into one that is
    assert inside("stat -c '%u' /v/new/tree/file; stat -c %a /v/new/tree/sub/su") == ["1234", "4755"]
    node.cli("volume", "cp", f"{tree}/.", "v:/")  # what is in it
    assert inside("ls /v")[:1] == ["file"]
    node.cli("volume", "cp", str(tree / "file"), "v:/new/renamed")
    node.cli("volume", "cp", str(tree / "file"), "v:/new/sub/")
    assert inside("cat /v/new/renamed /v/new/sub/file") == ["hellohello"]
    assert "no directory" in node.cli("volume", "cp", str(tree / "file"), "v:/nosuch/", check=False).stderr
    assert "no such volume" in node.cli("volume", "cp", str(tree / "file"), "nosuch:/x", check=False).stderr
    assert node.cli("volume", "cp", str(tree), "v:/new/renamed", check=False).returncode == 2

    out = place / "out"
    node.cli("volume", "cp", "v:/new", str(out))
    assert names(out)[:3] == ["file", "renamed", "sub"]
    (place / "there").mkdir()
    node.cli("volume", "cp", "v:/new/sub", str(place / "there"))
    assert names(place / "there") == ["sub", "sub/file", "sub/su"]
    node.cli("volume", "cp", "v:/new/file", str(place / "one"))
    node.cli("volume", "cp", "-a", "v:/new/tree/file", str(place / "there"))
    assert (place / "one").read_text() == "hello"
    assert (place / "there/file").stat().st_uid == 1234
    assert "no such path" in node.cli("volume", "cp", "v:/nosuch", str(place / "x"), check=False).stderr
    streamed = node.host.sh(f"{Path(node.command('netstore')[0])} -H {node.address} volume cp v:/new/sub - | tar -t")
    assert streamed.split() == ["./", "./file", "./su"]
    assert node.out("system", "check") == "kernel and store agree"


def test_links_in_a_volume_lead_nowhere_else(node: Node, client: Client, image: str, place: Path) -> None:
    node.cli(
        "run",
        "-d",
        "--name",
        "c",
        "-v",
        "v:/v",
        image,
        "sh",
        "-c",
        "ln -s / /v/root; ln -s ../../../../etc /v/etc; sleep 1000",
    )
    (place / "evil").write_text("x")
    refused = node.cli("volume", "cp", str(place / "evil"), "v:/etc/evil", check=False)
    assert refused.returncode != 0
    assert not Path("/etc/evil").exists()
    node.cli("volume", "cp", str(place / "evil"), "v:/root/evil")  # / is the volume's root
    assert node.out("exec", "c", "cat", "/v/evil") == "x"
    assert not Path("/evil").exists()
    with pytest.raises(grpc.RpcError):
        client.archives.GetPath(pb.GetPathRequest(volume="v", path="/root/../../etc/passwd"))
    node.cli("volume", "cp", "v:/etc", str(place / "link"))
    assert os.readlink(place / "link") == "../../../../etc"


def test_stats_show_use(node: Node, image: str) -> None:
    node.cli("volume", "create", "-d", "image", "--size", "32M", "v")
    node.cli("volume", "create", "plain")
    node.cli(
        "run",
        "-d",
        "--name",
        "c",
        "-v",
        "v:/v",
        image,
        "sh",
        "-c",
        "head -c 8000000 /dev/urandom > /v/f; sync; sleep 1000",
    )
    node.cli("exec", "c", "sh", "-c", "while [ ! -s /v/f ]; do sleep 0.1; done; sleep 0.5")
    header, row = (line.split() for line in node.out("volume", "stats", "--no-stream").splitlines())
    assert header == ["VOLUME", "NAME", "USED", "SIZE", "USED", "%", "INODES", "CHANGE"]
    assert row[0] == "v"
    assert 20 < int(row[3]) < 60


def test_verify_finds_what_is_wrong(node: Node, image: str) -> None:
    node.cli("volume", "create", "-d", "image", "--size", "16M", "v")
    node.cli("volume", "create", "plain")
    node.cli("run", "-d", "--name", "c", "-v", "v:/v", image, "sh", "-c", "echo x > /v/file; sync; sleep 1000")
    shown = node.out("volume", "verify", "v")
    assert "e2fsck -f -n of the image" in shown
    assert "v: nothing wrong" in shown
    node.cli("volume", "snapshot", "create", "v", "s")
    assert "nothing wrong" in node.out("volume", "verify", "v@s")
    assert "every file was read (0B)" in node.out("volume", "verify", "plain")
    file = next((node.place / "state/volumes/image").glob("*/snapshots/*"))
    with file.open("r+b") as damaged:  # the bitmaps of the first group
        for block in range(2, 40):
            damaged.seek(block * 1024)
            damaged.write(os.urandom(512))
    found = node.cli("volume", "verify", "v@s", check=False)
    assert found.returncode == 1
    assert "wrong: checking the filesystem" in found.stdout
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert stat.S_ISREG(file.stat().st_mode)
    assert subprocess.run(["e2fsck", "-n", file], capture_output=True).returncode != 0
