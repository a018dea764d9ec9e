"""Hosts that cannot: a disk that is full, and one that is read-only."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from kernel.volumes import MIB, fill
from netstore.errors import (
    Exhausted,
    KernelError,
)
from netstore.kernel import loop
from netstore.kernel.filesystems import mount, unmount_all
from netstore.model import Volume, VolumeSpec, new_id
from netstore.volumes.drivers.base import Node, load_drivers


def small_disk(place: Path, options: str = "") -> Path:
    image, target = place / "small", place / "state"
    image.touch()
    os.truncate(image, 24 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", image], check=True)
    target.mkdir()
    with loop.attached(image) as device:
        mount(device, target, "ext4", options)
    return target


def test_a_full_host_is_a_clear_error(place: Path) -> None:
    state = small_disk(place)
    try:
        driver = load_drivers(Node(state))["image"]
        volume = Volume(id=new_id(), name="v", spec=VolumeSpec(driver="image", size_bytes=64 * MIB))
        with pytest.raises(Exhausted, match="volume v: no room for its size"):
            driver.create(volume)
        assert not driver.observe().present
        assert shutil.disk_usage(state).free > 15 * MIB  # not even for a moment: nothing was taken
        kept = Volume(id=new_id(), name="kept", spec=VolumeSpec(driver="image", size_bytes=12 * MIB))
        driver.create(kept)
        driver.stage(kept)
        with pytest.raises(Exhausted, match="growing volume kept"):
            driver.resize(kept, 64 * MIB)
        sparse = replace(volume, spec=replace(volume.spec, options={"sparse": "true"}))
        driver.create(sparse)  # larger than the host: it promises nothing
        assert driver.health(sparse) == ""
        assert fill(state / "full") == errno.ENOSPC
        assert "the node is nearly full" in driver.health(sparse)
        driver.remove(sparse)
        with pytest.raises(Exhausted, match="no room"):
            driver.create(sparse)
        (driver.mountpoint(kept) / "file").write_bytes(bytes(4 * MIB))  # its space is its own
        descriptor = os.open(driver.mountpoint(kept) / "file", os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)
        driver.remove(kept)
    finally:
        unmount_all(state, lazy=True)


def test_a_read_only_host_is_a_clear_error(place: Path) -> None:
    state = small_disk(place)
    drivers = load_drivers(Node(state))
    try:
        mount("none", state, "", "remount,ro")
        for name, size in (("local", 0), ("image", 16 * MIB)):
            volume = Volume(id=new_id(), name="v", spec=VolumeSpec(driver=name, size_bytes=size))
            with pytest.raises(KernelError, match=r"volume v: Read-only file system.*writable"):
                drivers[name].create(volume)
            assert not drivers[name].observe().present
            drivers[name].remove(volume)
    finally:
        unmount_all(state, lazy=True)
