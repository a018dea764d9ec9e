"""Snapshots, restores and clones: of every driver, used and unused, and what is left when they fail."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
from conftest import Node

from netstore.api.v1 import archive_pb2, snapshot_pb2, volume_pb2
from netstore.cli.client import Client

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
    assert node.out("volume", "inspect", "-f", "{{.Status.State}}", "copy") == "active"
    assert node.cli("volume", "snapshot", "create", "db", "first", check=False).returncode == 1
    node.cli("volume", "snapshot", "rm", "db@first")
    assert snapshots(node, "db") == ""
    assert node.out("system", "check") == "kernel and store agree"


def test_clones_are_mounted_beside_their_source(node: Node, client: Client) -> None:
    """Of an image that is used: each has a UUID of its own, also the clone of a clone and of a snapshot."""

    def clone(source: str, name: str, snapshot: str = "") -> None:
        request = snapshot_pb2.CloneVolumeRequest(source_volume=source, source_snapshot=snapshot, volume={"name": name})
        client.snapshots.CloneVolume(request)

    def stage(name: str) -> Path:
        request = volume_pb2.StageVolumeRequest(volume=name, holder="looking")
        return Path(client.volumes.StageVolume(request).volume.status.mountpoint)

    names = ["v", "used", "again", "kept"]
    for kind, size in (("ext4", 32), ("xfs", 320), ("btrfs", 160)):
        spec = {"driver": "image", "options": {"fs": kind, "sparse": "true"}, "size_bytes": size << 20}
        client.volumes.CreateVolume(volume_pb2.CreateVolumeRequest(volume={"name": "v", "spec": spec}))
        node.host.sh(f"echo {kind} > {stage('v')}/file")
        clone("v", "used")
        clone("used", "again")
        client.snapshots.CreateSnapshot(
            snapshot_pb2.CreateSnapshotRequest(snapshot={"name": "s", "spec": {"volume": "v"}})
        )
        clone("v", "kept", "s")
        places = [stage(name) for name in names]
        assert node.host.sh(f"cat {' '.join(f'{each}/file' for each in places)}").split() == [kind] * len(names)
        images = [str(each.parent / "image") for each in places]
        uuids = {subprocess.check_output(["blkid", "-p", "-s", "UUID", "-o", "value", each]) for each in images}
        assert len(uuids) == len(names), kind
        for name in names:
            client.volumes.UnstageVolume(volume_pb2.UnstageVolumeRequest(volume=name, holder="looking"))
            client.volumes.DeleteVolume(volume_pb2.DeleteVolumeRequest(volume=name))


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


@pytest.fixture
def pool(node: Node) -> Node:
    """A node with a btrfs pool in a file."""
    node.stop()
    config = node.place / "pool.toml"
    config.write_text('[resolver]\nmanage = false\n[volumes]\nbtrfs-pool = "256M"\n')
    node.start_resolver()
    node.start("--config", str(config))
    return node


def test_btrfs_snapshots_are_the_drivers_own(pool: Node, image: str) -> None:
    node = pool
    node.cli("volume", "create", "-d", "btrfs", "--size", "64M", "v")
    node.cli("run", "-d", "--name", "c", "-v", "v:/v", image)
    sh(node, "c", "echo one > /v/file; head -c 3000000 /dev/urandom > /v/big; sync")
    made = node.cli("volume", "snapshot", "create", "v", "s")
    assert "of one moment" in made.stderr
    sh(node, "c", "echo two > /v/file; sync")
    node.cli("volume", "clone", "v@s", "copy")
    node.cli("volume", "export", "v@s", "-o", str(node.place / "v.tar.zst"))
    node.cli("volume", "import", "other", str(node.place / "v.tar.zst"), "-d", "btrfs", "--size", "64M")
    node.cli("rm", "-f", "c")
    node.cli("volume", "snapshot", "restore", "v@s")
    shown = node.out("run", "--rm", "-v", "v:/v", "-v", "copy:/copy", "-v", "other:/other", image,
                     "cat", "/v/file", "/copy/file", "/other/file")  # fmt: skip
    assert shown.split() == ["one"] * 3
    assert "a read-only scrub of the whole pool" in node.out("volume", "verify", "v")
    assert node.out("system", "check") == "kernel and store agree"
    node.cli("volume", "rm", "--trash", "1h", "v")
    node.cli("volume", "trash", "restore", "v")
    assert snapshots(node, "v") == "v@s"
    node.cli("volume", "rm", "v", "copy", "other")
    assert node.out("system", "check") == "kernel and store agree"
    node.host.sh(f"umount {node.place}/state/volumes/btrfs-pool")


def test_btrfs_refuses_a_size_that_holds_nothing(pool: Node) -> None:
    node = pool
    done = node.cli("volume", "create", "-d", "btrfs", "--size", "1", "v", check=False)
    assert done.returncode
    assert "at least 1048576" in done.stderr
    node.cli("volume", "create", "-d", "btrfs", "--size", "1M", "v")
    assert "at least 1048576" in node.cli("volume", "update", "--size", "1", "v", check=False).stderr
    node.cli("volume", "rm", "v")
    node.host.sh(f"umount {node.place}/state/volumes/btrfs-pool")


def test_an_export_of_what_is_used_is_of_one_moment(pool: Node, client: Client, place: Path) -> None:
    """Where the driver can; nothing of it is left, also after kill -9."""
    node, drivers = pool, {"btrfs": "1", "image": "1", "local": "3"}
    for driver in drivers:
        node.cli("volume", "create", "-d", driver, *([] if driver == "local" else ["--size", "64M"]), driver)
        data = node.out("volume", "stage", driver, "someone")
        node.host.sh(f"head -c 20000000 /dev/urandom > {data}/big; echo old > {data}/small; sync -f {data}")
        stream = client.archives.ExportVolume(
            archive_pb2.ExportVolumeRequest(volume=driver, compression="COMPRESSION_NONE")
        )
        start = next(stream).start
        assert str(start.consistency) == drivers[driver]
        assert bool(start.frozen_time.nanos) == (driver == "image")
        node.host.sh(f"echo new > {data}/small; sync -f {data}")
        archive = b"".join(response.chunk for response in stream)
        if driver != "local":
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                assert (member := tar.extractfile("./small"))
                assert member.read() == b"old\n"
        said = node.cli("volume", "export", driver, "-o", str(place / "v")).stderr
        assert {"btrfs": "of one moment", "image": "of one moment, frozen for", "local": "file by file"}[driver] in said
        stream = client.archives.ExportVolume(archive_pb2.ExportVolumeRequest(volume=driver))
        next(stream)
        node.kill()
        node.start("--config", str(node.place / "pool.toml"))
        assert node.out("system", "check") == "kernel and store agree"
        assert not list(node.place.glob("state/volumes/*/*/snapshots/*")), driver
        node.cli("volume", "unstage", driver, "someone")


def test_a_snapshot_of_a_btrfs_image_is_shown_beside_its_volume(node: Node) -> None:
    """They have the same UUID, which kernels before Linux 6.7 mount once: the lab's has 6.1."""
    node.cli("volume", "create", "-d", "image", "-o", "fs=btrfs", "-o", "sparse=true", "--size", "160M", "v")
    data = node.out("volume", "stage", "v", "someone")
    node.host.sh(f"echo old > {data}/file; sync -f {data}")
    node.cli("volume", "snapshot", "create", "v", "s")
    for source in ("v", "v@s", "v@s"):
        node.cli("volume", "export", source, "-o", str(node.place / "archive"))
    node.cli("volume", "verify", "v")
    node.cli("volume", "clone", "v@s", "copy")
    copy = node.out("volume", "stage", "copy", "someone")
    assert node.host.sh(f"cat {copy}/file; echo new > {data}/file; cat {data}/file").split() == ["old", "new"]
    node.cli("volume", "unstage", "v", "someone")
    node.cli("volume", "snapshot", "restore", "v@s")
    data = node.out("volume", "stage", "v", "someone")
    node.cli("volume", "export", "v@s", "-o", str(node.place / "archive"))
    assert node.host.sh(f"cat {data}/file").split() == ["old"]
    for name in ("v", "copy"):
        node.cli("volume", "unstage", name, "someone")
    assert node.out("system", "check") == "kernel and store agree"


def test_what_is_not_ours_is_copied_and_not_restored(node: Node, image: str) -> None:
    node.cli("volume", "create", "-d", "tmpfs", "--size", "16M", "v")
    node.cli("run", "-d", "--name", "c", "-v", "v:/v", image)
    sh(node, "c", "echo one > /v/file")
    assert "file by file" in node.cli("volume", "snapshot", "create", "v", "s").stderr
    node.cli("rm", "-f", "c")
    refused = node.cli("volume", "snapshot", "restore", "v@s", check=False)
    assert "clone the snapshot into a new volume instead" in refused.stderr
    node.cli("volume", "clone", "v@s", "copy", "-d", "local")
    assert node.out("run", "--rm", "-v", "copy:/v", image, "cat", "/v/file") == "one"
    assert node.out("system", "check") == "kernel and store agree"


def test_a_clone_of_what_is_mounted_from_elsewhere_is_a_copy(node: Node, image: str) -> None:
    outside = node.place / "outside"
    outside.mkdir()
    (outside / "file").write_text("there")
    options = ["-o", "type=none", "-o", f"device={outside}", "-o", "o=bind"]
    node.cli("volume", "create", *options, "v")
    node.cli("volume", "clone", "v", "copy")
    (outside / "file").write_text("changed")
    assert node.out("run", "--rm", "-v", "copy:/v", image, "cat", "/v/file") == "there"
    refused = node.cli("volume", "clone", "v", "other", "-d", "local", *options, check=False)
    assert "a volume with storage of its own to fill" in refused.stderr
    assert node.out("volume", "ls", "-q").split() == ["copy", "v"]
    node.cli("volume", "rm", "copy")
    assert (outside / "file").read_text() == "changed"
