"""Drivers of volumes on a state directory of their own, and a disk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel.volumes import MIB
from netstore.kernel import loop
from netstore.kernel.filesystems import mounts_below, unmount_all
from netstore.volumes.drivers.base import Node, VolumeDriver, load_drivers


@pytest.fixture
def disk(place: Path) -> Iterator[str]:
    """A block device with an ext4, such as a disk would be."""
    (place / "disk").touch()
    os.truncate(place / "disk", 32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", place / "disk"], check=True)
    with loop.attached(place / "disk") as device:
        yield device


@pytest.fixture
def drivers(place: Path) -> Iterator[dict[str, VolumeDriver]]:
    (place / "state").mkdir()
    found = load_drivers(Node(place / "state", {"btrfs_pool": "512M"}))
    for each in found.values():
        each.start()
    yield found
    for path in sorted(mounts_below(place), reverse=True):
        unmount_all(Path(path), lazy=True)
