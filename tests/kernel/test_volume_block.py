"""Volumes on devices: the driver block, nodes of mode BLOCK, a pool on a disk."""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from kernel.volumes import MIB, block
from netstore.errors import (
    FailedPrecondition,
    InUse,
    InvalidArgument,
    NetstoreError,
)
from netstore.kernel import loop
from netstore.kernel.filesystems import mount, mounts_below, unmount_all
from netstore.model import Volume, VolumeSpec, new_id
from netstore.volumes.drivers.base import Node, VolumeDriver, load_drivers


def test_a_disk_is_formatted_only_when_asked_and_blank(drivers: dict[str, VolumeDriver], place: Path) -> None:
    driver = drivers["block"]
    (place / "blank").touch()
    os.truncate(place / "blank", 32 * MIB)
    with loop.attached(place / "blank") as device:
        with pytest.raises(FailedPrecondition, match=f"{device} holds no filesystem.*--format ext4"):
            driver.create(block(path=device))
        volume = block(path=device, format="ext4")
        driver.create(volume)
        driver.create(volume)
        with pytest.raises(InUse, match="another volume's already"):
            driver.create(block(path=device))
        driver.stage(volume)
        (driver.mountpoint(volume) / "file").write_text("kept")
        assert driver.health(volume) == ""
        driver.remove(volume)
        (place / "elsewhere").mkdir()
        mount(device, place / "elsewhere", "ext4")
        with pytest.raises(InUse, match=f"{device} is mounted or otherwise in use"):
            driver.create(block(path=device))
        unmount_all(place / "elsewhere")
        with pytest.raises(FailedPrecondition, match=f"{device} holds ext4.*wipefs"):
            driver.create(block(path=device, format="xfs"))
        raw = replace(block(path=device), spec=VolumeSpec(driver="block", options={"path": device}, block=True))
        with pytest.raises(FailedPrecondition, match="holds ext4"):
            driver.create(raw)
        assert not driver.observe().present
        subprocess.run(["e2label", device, "mine"], check=True)
        again = block(label="mine")
        driver.create(again)
        driver.stage(again)
        assert (driver.mountpoint(again) / "file").read_text() == "kept"
        driver.unstage(again)
        subprocess.run(["e2fsck", "-fy", device], check=True, capture_output=True)  # tune2fs wants one just checked
        subprocess.run(["tune2fs", "-U", "random", device], check=True, capture_output=True)
        with pytest.raises(FailedPrecondition, match="another filesystem"):
            driver.stage(again)
        assert not driver.mountpoint(again).exists()
        driver.remove(again)
    with pytest.raises(FailedPrecondition, match="no device with serial nosuch"):
        driver.create(block(serial="nosuch"))
    assert not driver.observe().present


def test_a_format_that_was_cut_short_is_done_again(drivers: dict[str, VolumeDriver], disk: str) -> None:
    driver, volume = drivers["block"], block(path=disk, format="xfs")
    with pytest.raises(FailedPrecondition, match="holds ext4"):
        driver.create(volume)
    driver.directory(volume).mkdir(parents=True)
    (driver.directory(volume) / "draft").write_text(disk)  # killed while mkfs ran: what is there is ours
    with pytest.raises(NetstoreError, match="making xfs"):  # 32 MiB are too few for xfs; but it was tried
        driver.create(volume)
    assert not driver.observe().present


@pytest.mark.parametrize("name", ["image", "block"])
def test_a_device_node_is_published(drivers: dict[str, VolumeDriver], place: Path, name: str) -> None:
    driver = drivers[name]
    (place / "blank").touch()
    os.truncate(place / "blank", 32 * MIB)
    with loop.attached(place / "blank") as device:
        options = {"path": device} if name == "block" else {}
        size = 16 * MIB if name == "image" else 0
        volume = Volume(
            id=new_id(), name="v", spec=VolumeSpec(driver=name, options=options, size_bytes=size, block=True)
        )
        driver.validate(volume.spec)
        driver.create(volume)
        for _ in range(2):
            driver.stage(volume)
        node = driver.mountpoint(volume)
        assert stat.S_ISBLK(node.stat().st_mode)
        descriptor = os.open(node, os.O_RDWR)
        os.pwrite(descriptor, b"written", 4096)
        os.fsync(descriptor)
        os.close(descriptor)
        if name == "image":
            driver.resize(volume, 2 * size)
            with node.open("rb") as opened:
                assert opened.seek(0, os.SEEK_END) == 2 * size
        for _ in range(2):
            driver.unstage(volume)
            assert not node.exists()
        driver.stage(volume)
        with node.open("rb") as opened:
            opened.seek(4096)
            assert opened.read(7) == b"written"
        assert driver.health(volume) == ""
        driver.remove(replace(volume, spec=VolumeSpec(driver=name)))  # its row is lost
        assert not driver.observe().present
        assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if volume.id in line]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "options"), ({"serial": "a", "wwn": "b"}, "options"), ({"path": "/etc/passwd"}, "path"),
        ({"path": "/dev/../etc"}, "path"), ({"serial": ""}, "serial"), ({"path": "/dev/x", "format": "vfat"}, "format"),
        ({"label": "x", "format": "ext4"}, "format"),
    ],
)  # fmt: skip
def test_options_of_block(drivers: dict[str, VolumeDriver], options: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidArgument, match=field):
        drivers["block"].validate(block(**options).spec)


def test_a_disk_is_trimmed(drivers: dict[str, VolumeDriver], disk: str) -> None:
    driver = drivers["block"]
    volume = Volume(id=new_id(), name="v", spec=VolumeSpec(driver="block", options={"path": disk}))
    driver.create(volume)
    driver.stage(volume)
    assert driver.trim(volume) > 16 * MIB
    driver.remove(volume)


def test_a_pool_is_a_device_of_one_netstored(place: Path, disk: str) -> None:
    (place / "pool").touch()
    os.truncate(place / "pool", 256 * MIB)

    def pool(name: str, device: str) -> VolumeDriver:
        (place / name).mkdir(exist_ok=True)
        return load_drivers(Node(place / name, {"btrfs_pool": device}))["btrfs"]

    try:
        with pytest.raises(FailedPrecondition, match=f"{disk} holds ext4.*wipefs"):
            pool("first", disk).start()
        with pytest.raises(FailedPrecondition, match="'12' is not accepted"):
            pool("first", "12").start()
        assert not mounts_below(place)
        with loop.attached(place / "pool") as device:
            first = pool("first", device)
            first.start()  # blank: it becomes a btrfs
            volume = Volume(id=new_id(), name="v", spec=VolumeSpec(driver="btrfs", size_bytes=32 * MIB))
            first.create(volume)
            again = pool("first", device)
            again.start()
            assert again.observe().whole == {volume.id}
            with pytest.raises(FailedPrecondition, match="another netstored's"):
                pool("second", device).start()
            assert not mounts_below(place / "second")
            assert first.observe().whole == {volume.id}
    finally:
        for path in sorted(mounts_below(place), reverse=True):
            unmount_all(Path(path), lazy=True)
