"""The driver image: filesystems in files, their loop devices, growth and trim."""

from __future__ import annotations

import os
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from kernel.volumes import MIB, image, local
from netstore.errors import (
    InvalidArgument,
    NetstoreError,
    Unsupported,
)
from netstore.kernel import loop, tools
from netstore.kernel.filesystems import mount
from netstore.model import Volume, VolumeSpec, new_id
from netstore.volumes.drivers.base import VolumeDriver


@pytest.mark.parametrize(
    ("kind", "size", "more", "mkfs"),
    [
        ("ext4", 16, "data=journal", "-N 64 -O ^huge_file"),
        ("xfs", 320, "inode64", "-s size=4096"),
        ("btrfs", 160, "compress=zstd", "-n 16384"),
    ],
)
def test_an_image_is_made_and_mounted_as_asked(
    drivers: dict[str, VolumeDriver], kind: str, size: int, more: str, mkfs: str
) -> None:
    driver = drivers["image"]
    volume = image(kind, size, o=f"noexec,nosuid,nodev,noatime,{more}", mkfs=mkfs)
    driver.validate(volume.spec)
    driver.create(volume)
    driver.stage(volume)
    place = driver.mountpoint(volume)
    shown = next(line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(place) in line)
    assert {"noexec", "nosuid", "nodev", "noatime"} <= set(shown.split()[5].split(","))
    assert more in shown
    if kind == "ext4":
        assert os.statvfs(place).f_files == 64
    driver.remove(volume)
    broken = image(kind, size, mkfs=mkfs.replace("4096", "7").replace("16384", "7").replace("^huge_file", "nonsense"))
    driver.validate(broken.spec)
    with pytest.raises(InvalidArgument, match=r"spec.options\[mkfs\]"):
        driver.create(broken)
    assert not driver.observe().present


@pytest.mark.parametrize(
    ("options", "field"),
    [({"o": word}, "o") for word in ("ro", "bind", "discard", "loop", "noatime,", "compress=zstd", "commit=x")]
    + [({"mkfs": text}, "mkfs") for text in ("-d name=/dev/sda", "-F", "-N", "-N 64 -E x", "-b /etc", "x y", "-N -F")],
)
def test_options_of_image(drivers: dict[str, VolumeDriver], options: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"spec.options\[{field}\]"):
        drivers["image"].validate(image("ext4", 16, **options).spec)


def test_a_loop_device_is_found_again(drivers: dict[str, VolumeDriver]) -> None:
    driver = drivers["image"]
    volume = Volume(id=new_id(), name="v", spec=VolumeSpec(driver="image", size_bytes=16 * MIB))
    driver.create(volume)
    image = driver.directory(volume) / "image"
    assert loop.find(image) == ""
    with loop.attached(image) as first, loop.attached(image) as second:  # never two for one file
        assert first == second == loop.find(image)
        assert Path(f"/sys/block/{first[5:]}/loop/dio").read_text() == "1\n"
        assert Path(f"/sys/block/{first[5:]}/loop/autoclear").read_text() == "1\n"
    assert loop.find(image) == ""
    driver.stage(volume)
    descriptor = os.open(driver.mountpoint(volume) / "open", os.O_CREAT | os.O_RDWR)
    driver.unstage(volume)  # a process goes on using the filesystem: the next mount is of the same device
    assert loop.find(image)
    with pytest.raises(NetstoreError, match="still uses"):
        driver.resize(volume, 32 * MIB)
    driver.stage(volume)
    (driver.mountpoint(volume) / "file").touch()
    os.close(descriptor)
    driver.remove(volume)


def test_a_look_for_a_loop_device_keeps_no_other(drivers: dict[str, VolumeDriver]) -> None:
    driver = drivers["image"]
    spec = VolumeSpec(driver="image", size_bytes=16 * MIB, options={"sparse": "true"})
    one, other = (Volume(id=new_id(), name="v", spec=spec) for _ in range(2))
    for volume in (one, other):
        driver.create(volume)
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            loop.find(driver.directory(one) / "image")

    looking = [threading.Thread(target=look) for _ in range(3)]
    for thread in looking:
        thread.start()
    try:
        for _ in range(60):
            driver.stage(other)
            driver.unstage(other)
            assert not loop.find(driver.directory(other) / "image")
    finally:
        ended.set()
        for thread in looking:
            thread.join()
    for volume in (one, other):
        driver.remove(volume)


def test_a_growth_that_was_cut_short_is_seen_and_done_again(drivers: dict[str, VolumeDriver]) -> None:
    driver = drivers["image"]
    volume = Volume(id=new_id(), name="v", spec=VolumeSpec(driver="image", size_bytes=16 * MIB))
    driver.create(volume)
    assert driver.fits(volume)
    image = driver.directory(volume) / "image"
    (driver.directory(volume) / "growing").touch()  # killed between the file's growth and the filesystem's
    os.truncate(image, 32 * MIB)
    grown = replace(volume, spec=replace(volume.spec, size_bytes=32 * MIB))
    assert not driver.fits(grown)
    with subprocess.Popen(["flock", driver.directory(volume) / "growing", "-c", "echo; sleep 1"], stdout=-1) as left:
        assert left.stdout
        left.stdout.read(1)
        driver.resize(grown, 32 * MIB)
        assert left.wait(timeout=0.7) == 0  # what a killed netstored left at work was waited for
    assert driver.fits(grown)
    driver.stage(grown)
    assert driver.usage(grown).size_bytes > 24 * MIB
    driver.remove(grown)


def test_a_growth_that_fails_takes_nothing_back_from_the_filesystem(
    drivers: dict[str, VolumeDriver], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = drivers["image"]
    volume = Volume(id=new_id(), name="v", spec=VolumeSpec(driver="image", size_bytes=16 * MIB))
    driver.create(volume)
    tool = place / "bin/resize2fs"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\n/sbin/resize2fs "$@"\nexit 1\n')
    tool.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setattr(tools, "_PATH", f"{tool.parent}:/sbin:/usr/sbin:/usr/bin:/bin")
        with pytest.raises(NetstoreError, match="growing v"):
            driver.resize(volume, 64 * MIB)
    driver.stage(volume)  # a shorter image would not do for it
    driver.unstage(volume)
    assert not driver.fits(volume)
    driver.resize(volume, 64 * MIB)
    driver.remove(volume)


def test_trim_gives_back(drivers: dict[str, VolumeDriver], place: Path) -> None:
    driver = drivers["image"]
    thin, whole = image("ext4", 32, sparse="true"), image("ext4", 32)
    for volume in (thin, whole):
        driver.create(volume)
        driver.stage(volume)
    file = driver.mountpoint(thin) / "file"
    file.write_bytes(os.urandom(16 * MIB))
    subprocess.run(["sync", "-f", file], check=True)
    assert driver.measure(thin) > 16 * MIB
    mount("none", driver.mountpoint(thin), "", "remount,nodiscard")  # it gives back by itself otherwise
    file.unlink()
    subprocess.run(["sync", "-f", file.parent], check=True)
    assert driver.measure(thin) > 16 * MIB
    assert driver.trim(thin) > 16 * MIB
    assert driver.measure(thin) < 8 * MIB
    with pytest.raises(Unsupported, match="allocated in full"):
        driver.trim(whole)
    assert driver.measure(whole) >= 32 * MIB
    with pytest.raises(Unsupported, match="local trims nothing"):
        drivers["local"].trim(local())
    for volume in (thin, whole):
        driver.remove(volume)
