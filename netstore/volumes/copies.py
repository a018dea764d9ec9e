"""How the data of volumes is copied: by the driver where it can, else image by image, else file by file.

Everything is built under another name and put in place by one rename, so that a crash leaves all of it or nothing.
What is not of a driver with snapshots of its own lies in the volume's directory, below `snapshots`: an image as a file,
everything else as a directory. All of it blocks.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from netstore.errors import Exhausted, FailedPrecondition, InUse, KernelError, NetstoreError, Unsupported
from netstore.kernel import loop
from netstore.kernel.files import allocate, copy_data, exchange, remove_tree, sync_directory
from netstore.kernel.filesystems import mount, renew_uuid, unmount_all
from netstore.kernel.freeze import frozen, thaw
from netstore.kernel.mounts import is_mount_point, sync_file_system
from netstore.kernel.paths import closing
from netstore.model import Consistency, Volume, new_id
from netstore.volumes.drivers.base import Capability, VolumeDriver
from netstore.volumes.trees import copy_tree

__all__ = [
    "Taken",
    "drop",
    "fill",
    "of_one_moment",
    "put_back",
    "reading",
    "refuse_content",
    "snapshot_file",
    "sweep",
    "take",
    "taken",
]

_DRAFT = "draft"
_FREEZING = "freezing"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_renewing = threading.Lock()  # of two readers of a snapshot one renews its UUID
_READ_ONLY = {"ext4": "ro,noload", "xfs": "ro,norecovery,nouuid", "btrfs": "ro"}


@dataclass(frozen=True, slots=True)
class Taken:
    """A copy: of what consistency, how long the filesystem was frozen for it, and the bytes that it takes."""

    consistency: Consistency
    frozen_seconds: float = 0.0
    size_bytes: int = 0


def of_one_moment(driver: VolumeDriver, volume: Volume) -> bool:
    """Say whether a snapshot of a volume that is used is of one moment."""
    return Capability.SNAPSHOT in driver.capabilities or _image(driver, volume) is not None


def take(driver: VolumeDriver, volume: Volume, snapshot_id: str, *, used: bool) -> Taken:
    """Make a snapshot; `used` says that somebody may write meanwhile.

    Raises:
        Exhausted: no space is left; there is no snapshot.
        NetstoreError: it cannot be made; there is none.
    """
    if Capability.SNAPSHOT in driver.capabilities:
        driver.snapshot(volume, snapshot_id)
        return Taken(Consistency.MOMENT, 0.0, driver.snapshot_bytes(volume, snapshot_id))
    place = _place(driver, volume)
    draft = place / f".{snapshot_id}"
    with _tidy(volume, "making a snapshot of", draft):
        place.mkdir(exist_ok=True, mode=0o700)
        if _image(driver, volume):
            found = _copy_image(driver, volume, draft)
        else:
            found = _copy_files(driver, volume, draft, used=used)
        draft.rename(place / snapshot_id)
        sync_directory(place)
    return found


def drop(driver: VolumeDriver, volume: Volume, snapshot_id: str) -> None:
    """Remove a snapshot; one that is gone is a success."""
    if Capability.SNAPSHOT in driver.capabilities:
        driver.remove_snapshot(volume, snapshot_id)
        return
    found, draft = _place(driver, volume) / snapshot_id, _place(driver, volume) / f".{snapshot_id}"
    if found.exists():
        found.rename(draft)
    _remove(draft)


def taken(driver: VolumeDriver, volume: Volume) -> set[str]:
    """Return the ids of the snapshots that there are."""
    if Capability.SNAPSHOT in driver.capabilities:
        return driver.snapshots(volume)
    try:
        return {name for name in os.listdir(_place(driver, volume)) if not name.startswith(".")}
    except FileNotFoundError:
        return set()


def put_back(driver: VolumeDriver, volume: Volume, snapshot_id: str) -> None:
    """Make the volume's data that of a snapshot; the volume is not used by anybody.

    Raises:
        InUse: a process still has the volume's filesystem open.
        Unsupported: the data is on a filesystem that is not ours alone.
    """
    if Capability.SNAPSHOT in driver.capabilities:
        driver.restore(volume, snapshot_id)
        return
    origin = _place(driver, volume) / snapshot_id
    draft = driver.directory(volume) / _DRAFT
    if image := _image(driver, volume):
        _refuse_open(volume, image)
        with _tidy(volume, "restoring", draft):
            _copy_file(origin, draft)
            _allocate(draft, image)
            draft.rename(image)
            sync_directory(image.parent)
        if origin.stat().st_size < volume.spec.size_bytes:  # it has grown since
            driver.resize(volume, volume.spec.size_bytes)
        return
    if driver.stages(volume) or is_mount_point(driver.mountpoint(volume)):
        raise Unsupported(
            f"restoring volume {volume.name}: its data is on a filesystem that it does not own",
            hint="clone the snapshot into a new volume instead", reason="NO_RESTORE",
        )  # fmt: skip
    with _tidy(volume, "restoring", draft):
        draft.mkdir(mode=0o700)
        with closing(os.open(origin, _DIRECTORY)) as source, closing(os.open(draft, _DIRECTORY)) as target:
            copy_tree(source, target)
            sync_file_system(target)
        exchange(draft, driver.mountpoint(volume))
        sync_directory(draft.parent)


def fill(
    driver: VolumeDriver, source: Volume, snapshot_id: str, maker: VolumeDriver, target: Volume, *, used: bool
) -> Taken:
    """Make the storage of `target` with the data of a volume, or of its snapshot unless `snapshot_id` is "".

    Raises:
        Exhausted: no space is left.
        NetstoreError: it cannot be made; the caller removes what there is.
    """
    same = driver.name == maker.name and dict(source.spec.options) == dict(target.spec.options)
    if same and Capability.CLONE in driver.capabilities:
        driver.clone(source, snapshot_id, target)
        return Taken(Consistency.MOMENT)
    image = _image(driver, source)
    if same and image and target.spec.size_bytes >= source.spec.size_bytes:
        copy = maker.directory(target) / _DRAFT
        with _tidy(target, "cloning into", copy):
            copy.parent.mkdir(exist_ok=True, mode=0o711, parents=True)
            if snapshot_id:
                found = Taken(Consistency.MOMENT, 0.0, _copy_file(_place(driver, source) / snapshot_id, copy))
            else:
                found = _copy_image(driver, source, copy)
            _allocate(copy, image)
            if not source.spec.block:
                renew_uuid(driver.parsed(source.spec)["fs"], copy, maker.mountpoint(target))
            copy.rename(copy.with_name(image.name))
            sync_directory(copy.parent)
        if copy.with_name(image.name).stat().st_size < target.spec.size_bytes:
            maker.resize(target, target.spec.size_bytes)
        return found
    return _fill_files(driver, source, snapshot_id, maker, target, used=used)


def _fill_files(
    driver: VolumeDriver, source: Volume, snapshot_id: str, maker: VolumeDriver, target: Volume, *, used: bool
) -> Taken:
    maker.create(target)
    maker.stage(target)
    try:
        refuse_content(maker, target)
        with (
            reading(driver, source, snapshot_id) as origin,
            closing(os.open(origin, _DIRECTORY)) as tree,
            closing(os.open(maker.mountpoint(target), _DIRECTORY)) as copy,
        ):
            size = copy_tree(tree, copy, live=used and not snapshot_id)
            sync_file_system(copy)
    except OSError as error:
        raise _said(error, "cloning into", target) from error
    finally:
        maker.unstage(target)
    return Taken(Consistency.LIVE if used and not snapshot_id else Consistency.UNUSED, 0.0, size)


def refuse_content(driver: VolumeDriver, volume: Volume) -> None:
    """Refuse to fill a staged volume that brought data of its own, as a disk may.

    Raises:
        FailedPrecondition: it did.
    """
    if set(os.listdir(driver.mountpoint(volume))) - {"lost+found"}:
        raise FailedPrecondition(
            f"volume {volume.name}: there is data on what it is to be made on", hint="take an empty device",
            reason="NOT_EMPTY",
        )  # fmt: skip


@contextmanager
def reading(driver: VolumeDriver, volume: Volume, snapshot_id: str) -> Iterator[Path]:
    """Show the data of a snapshot, or of the volume itself for "", at the path that it yields.

    Raises:
        NetstoreError: it cannot be mounted.
    """
    if not snapshot_id:
        there = driver.staged(volume)
        if there:
            driver.ask(volume)
        driver.stage(volume)
        try:
            yield driver.mountpoint(volume)
        finally:
            if not there:
                driver.unstage(volume)
        return
    found = _place(driver, volume) / snapshot_id
    if found.is_dir():
        yield found
        return
    target = _place(driver, volume) / f".{snapshot_id}.{new_id()[:12]}"
    target.mkdir(mode=0o700)
    try:
        _mount_image(driver.parsed(volume.spec)["fs"], found, target)
        yield target
    finally:
        unmount_all(target, lazy=True)
        target.rmdir()


def _mount_image(kind: str, image: Path, target: Path) -> None:
    """Mount the image that a snapshot is, which has the UUID of its volume."""
    with _renewing:
        try:
            with loop.attached(image, read_only=True) as device:
                mount(device, target, kind, _READ_ONLY[kind])
            return
        except KernelError as error:
            if kind != "btrfs" or error.errno != errno.EEXIST:
                raise
        renew_uuid(kind, image, target)  # before Linux 6.7 a UUID is mounted once
        with loop.attached(image, read_only=True) as device:
            mount(device, target, kind, _READ_ONLY[kind])


def snapshot_file(driver: VolumeDriver, volume: Volume, snapshot_id: str) -> Path | None:
    """Return the image that a snapshot is, None where it is a directory."""
    found = _place(driver, volume) / snapshot_id
    return found if snapshot_id and found.is_file() else None


def sweep(driver: VolumeDriver, volume: Volume, known: set[str], *, repair: bool) -> list[str]:
    """Find what a crash left in a volume's directory: halves, snapshots without a row, a frozen filesystem."""
    directory, found = driver.directory(volume), []
    marks = [directory / _FREEZING] if (directory / _FREEZING).exists() else []
    halves = [directory / _DRAFT] if os.path.lexists(directory / _DRAFT) else []
    if Capability.SNAPSHOT not in driver.capabilities and _place(driver, volume).is_dir():
        halves += [path for path in _place(driver, volume).iterdir() if path.name.startswith(".")]
    orphans = taken(driver, volume) - known
    if marks:
        found.append("its filesystem may be frozen")
    if halves or orphans:
        found.append("a crash left a part of a copy")
    if repair:
        for mark in marks:
            thaw(driver.mountpoint(volume))
            mark.unlink()
        for path in halves:
            unmount_all(path, lazy=True)
            _remove(path)
        for snapshot_id in orphans:
            drop(driver, volume, snapshot_id)
    return found


def _place(driver: VolumeDriver, volume: Volume) -> Path:
    return driver.directory(volume) / "snapshots"


def _image(driver: VolumeDriver, volume: Volume) -> Path | None:
    """Return the file that holds the volume's filesystem, None where there is none."""
    image = driver.directory(volume) / "image"
    return image if driver.name == "image" and image.exists() else None


def _copy_image(driver: VolumeDriver, volume: Volume, draft: Path) -> Taken:
    image = driver.directory(volume) / "image"
    if not driver.staged(volume):
        _refuse_open(volume, image)
        return Taken(Consistency.UNUSED, 0.0, _copy_file(image, draft))
    mark = driver.directory(volume) / _FREEZING
    mark.touch()
    try:
        with _open_pair(image, draft) as (source, target, size):
            with frozen(driver.mountpoint(volume)) as freeze:
                copy_data(source, target, size)
            os.fsync(target)
            return Taken(Consistency.MOMENT, freeze.seconds, os.fstat(target).st_blocks * 512)
    finally:
        mark.unlink()


def _copy_file(origin: Path, draft: Path) -> int:
    with _open_pair(origin, draft) as (source, target, size):
        copy_data(source, target, size)
        os.fsync(target)
        return os.fstat(target).st_blocks * 512


@contextmanager
def _open_pair(origin: Path, draft: Path) -> Iterator[tuple[int, int, int]]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with (
        closing(os.open(origin, os.O_RDONLY | os.O_CLOEXEC)) as source,
        closing(os.open(draft, flags, 0o600)) as target,
    ):
        yield source, target, os.fstat(source).st_size


def _copy_files(driver: VolumeDriver, volume: Volume, draft: Path, *, used: bool) -> Taken:
    draft.mkdir(mode=0o700)
    with (
        reading(driver, volume, "") as data,
        closing(os.open(data, _DIRECTORY)) as source,
        closing(os.open(draft, _DIRECTORY)) as target,
    ):
        if used:  # what writers hold back counts too
            sync_file_system(source)
        size = copy_tree(source, target, live=used)
        sync_file_system(target)
    return Taken(Consistency.LIVE if used else Consistency.UNUSED, 0.0, size)


def _allocate(draft: Path, image: Path) -> None:
    """Give the copy of an image that is allocated in full its own blocks, as many as the image has."""
    status = image.stat()
    if status.st_blocks * 512 >= status.st_size:
        with closing(os.open(draft, os.O_RDWR | os.O_CLOEXEC)) as descriptor:
            allocate(descriptor, os.fstat(descriptor).st_size)


def _refuse_open(volume: Volume, image: Path) -> None:
    if loop.find(image):
        raise InUse(f"volume {volume.name}: a process still uses its filesystem", hint="end it, then try again")


@contextmanager
def _tidy(volume: Volume, doing: str, draft: Path) -> Iterator[None]:
    """Remove a draft before and after, and say what the kernel said."""
    _remove(draft)
    try:
        yield
    except OSError as error:
        raise _said(error, doing, volume) from error
    finally:
        _remove(draft)


def _said(error: OSError, doing: str, volume: Volume) -> NetstoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Exhausted(f"{doing} volume {volume.name}: no space is left", hint="free some on this node")
    return KernelError(error.errno or errno.EIO, doing, f"volume {volume.name}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)
