"""The driver `btrfs`: each volume a subvolume of one pool; snapshots and clones take no time and no space.

The pool is a device or a file (`[volumes] btrfs-pool`), or the state directory itself where that is on btrfs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from netstore.drivers.options import size_bytes
from netstore.errors import FailedPrecondition, InvalidArgument, KernelError
from netstore.kernel import btrfs, loop
from netstore.kernel.devices import signature
from netstore.kernel.files import allocate, exchange, remove_tree
from netstore.kernel.filesystems import MAKERS, make_filesystem, mount, space, unmount_all
from netstore.kernel.mounts import is_mount_point
from netstore.model import Volume, VolumeSpec, new_id
from netstore.volumes.drivers.base import OWNER, Capability, Node, Observed, Usage, VolumeDriver, os_error

__all__ = ["BtrfsDriver"]

_LEAST = 1 << 20


class BtrfsDriver(VolumeDriver):
    """`<id>/_data` and `<id>/snapshots/<snapshot id>` are subvolumes of the pool, which stays mounted."""

    name = "btrfs"
    options = OWNER

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._place = node.state_dir / "volumes" / "btrfs-pool"
        self._file = node.state_dir / "volumes" / "btrfs-pool.img"
        self._pool = node.settings.get("btrfs_pool", "")
        self.root = self._place / "volumes"
        self._quota: str | None = None
        self._lock = threading.Lock()
        self.capabilities = frozenset({Capability.SNAPSHOT, Capability.CLONE, Capability.SIZE, Capability.GROW,
                                       Capability.SHRINK})  # fmt: skip

    @property
    def available(self) -> str:
        """Say why there is no pool, "" when there is one."""
        if self._pool or self._file.exists() or btrfs.is_btrfs(self.node.state_dir):
            return ""
        return "no btrfs pool: set btrfs-pool in [volumes] of the configuration to a device, or a size such as 50G"

    def validate(self, spec: VolumeSpec) -> None:
        """Check a spec: an empty subvolume counts too, and with less nothing could be written."""
        super().validate(spec)
        if 0 < spec.size_bytes < _LEAST:
            raise InvalidArgument("spec.size_bytes", spec.size_bytes, f"at least {_LEAST}, or 0 for no limit")

    def start(self) -> None:
        """Mount the pool that is configured, or that has volumes."""
        if self._pool or self._place.exists():
            self._mount_pool()

    def cannot_hold_size(self) -> str:
        """Say why the pool holds no sizes."""
        if self.available or self._quota is None:
            return self.available or "the pool is not mounted"
        return "" if self._quota else "this kernel's btrfs has no quotas"

    def stages(self, volume: Volume) -> bool:
        """No: the pool stays mounted."""
        return False

    def enforcement(self, volume: Volume) -> str:
        """Name it."""
        return "a btrfs quota" if volume.spec.size_bytes else ""

    def create(self, volume: Volume) -> None:
        """Make the subvolume, and limit it."""
        self._mount_pool()
        data = self.mountpoint(volume)
        if btrfs.is_subvolume(data):
            return
        with self._whole_or_nothing(volume, "making the subvolume of"):
            draft = data.with_name("draft")
            btrfs.delete_subvolume(draft)
            btrfs.create_subvolume(draft)
            self._finish(draft, volume)

    def _finish(self, draft: Path, volume: Volume) -> None:
        self._limit(draft, volume.spec)
        draft.rename(self.mountpoint(volume))

    def _limit(self, subvolume: Path, spec: VolumeSpec) -> None:
        if not spec.size_bytes:
            return
        if not self._quota:
            raise FailedPrecondition(
                f"spec.size_bytes: the driver btrfs: {self.cannot_hold_size()}", hint="take another driver, or no size",
                reason="NO_QUOTA",
            )  # fmt: skip
        btrfs.limit(subvolume, spec.size_bytes)

    def remove(self, volume: Volume) -> None:
        """Remove the subvolumes."""
        if self.available or not self._mounted_if_any():
            return
        directory = self.directory(volume)
        for snapshot_id in self.snapshots(volume):
            self.remove_snapshot(volume, snapshot_id)
        for name in ("_data", "draft") if directory.exists() else ():
            btrfs.delete_subvolume(directory / name)
        remove_tree(directory)

    def stage(self, volume: Volume) -> None:
        """Mount the pool, where it is not."""
        self._mount_pool()

    def unstage(self, volume: Volume) -> None:
        """Do nothing."""

    def observe(self) -> Observed:
        """Mount the pool where it has volumes, and look."""
        return super().observe() if not self.available and self._mounted_if_any() else Observed()

    def _is_whole(self, directory: Path) -> bool:
        return btrfs.is_subvolume(directory / "_data")

    def usage(self, volume: Volume) -> Usage:
        """Ask the quota."""
        used = btrfs.referenced(self.mountpoint(volume)) if self._quota else None
        return Usage(used, None, volume.spec.size_bytes)

    def resize(self, volume: Volume, size_bytes: int) -> None:
        """Change the quota, down to what is used."""
        self._mount_pool()
        used = self.usage(volume).used_bytes or 0
        if 0 < size_bytes < used:
            raise InvalidArgument("spec.size_bytes", size_bytes, f"at least what is used, {used}")
        self._limit(self.mountpoint(volume), VolumeSpec(size_bytes=size_bytes or (1 << 63)))

    def snapshot(self, volume: Volume, snapshot_id: str) -> None:
        """Make a read-only snapshot."""
        target = self._snapshot(volume, snapshot_id)
        if not btrfs.is_subvolume(target):
            target.parent.mkdir(exist_ok=True, mode=0o700)
            btrfs.snapshot(self.mountpoint(volume), target, read_only=True)

    def remove_snapshot(self, volume: Volume, snapshot_id: str) -> None:
        """Remove a snapshot."""
        target = self._snapshot(volume, snapshot_id)
        if target.parent.exists():
            btrfs.delete_subvolume(target)

    def snapshots(self, volume: Volume) -> set[str]:
        """Return the ids of the snapshots that there are."""
        place = self.directory(volume) / "snapshots"
        return set(os.listdir(place)) if place.exists() else set()

    def snapshot_bytes(self, volume: Volume, snapshot_id: str) -> int:
        """Return what only the snapshot holds."""
        return btrfs.referenced(self._snapshot(volume, snapshot_id)) or 0

    def restore(self, volume: Volume, snapshot_id: str) -> None:
        """Put a writable snapshot of the snapshot in the data's place, in one step; then remove the old data."""
        data = self.mountpoint(volume)
        draft = data.with_name("draft")
        btrfs.delete_subvolume(draft)
        btrfs.snapshot(self._snapshot(volume, snapshot_id), draft, read_only=False)
        self._limit(draft, volume.spec)
        try:
            exchange(draft, data)
        finally:
            btrfs.delete_subvolume(draft)

    def clone(self, source: Volume, snapshot_id: str, target: Volume) -> None:
        """Make a writable snapshot as another volume."""
        if btrfs.is_subvolume(self.mountpoint(target)):
            return
        origin = self._snapshot(source, snapshot_id) if snapshot_id else self.mountpoint(source)
        with self._whole_or_nothing(target, "cloning into"):
            draft = self.directory(target) / "draft"
            btrfs.delete_subvolume(draft)
            btrfs.snapshot(origin, draft, read_only=False)
            self._finish(draft, target)

    def health(self, volume: Volume) -> str:
        """Say whether the pool is there and can be written."""
        if self.available or (self._pool and not is_mount_point(self._place)):
            return self.available or "the btrfs pool is not mounted"
        wrong = super().health(volume)
        if not wrong and space(self.root).read_only:
            wrong = "the pool is read-only after an error: see the kernel's log"
        return wrong

    @contextmanager
    def _whole_or_nothing(self, volume: Volume, doing: str) -> Iterator[None]:
        try:
            self.directory(volume).mkdir(exist_ok=True, mode=0o711)
            yield
        except BaseException as error:
            self.remove(volume)
            if isinstance(error, OSError):
                raise os_error(error, doing, volume) from error
            raise

    def _mounted_if_any(self) -> bool:
        """Mount the pool if it was ever made; False when it was not."""
        if not self._place.exists() and not self._file.exists():
            return False
        self._mount_pool()
        return True

    def _mount_pool(self) -> None:
        """Make the pool and mount it, where that is not done; turn quotas on."""
        with self._lock:
            if self._quota is not None and (not self._pool or is_mount_point(self._place)):
                return
            if self.available:
                raise FailedPrecondition(f"the driver btrfs: {self.available}", reason="NO_POOL")
            try:
                self._place.mkdir(parents=True, exist_ok=True, mode=0o711)
                fresh = bool(self._pool) and not is_mount_point(self._place)
                if fresh:
                    self._mount()
                self._claim(fresh=fresh)
                self.root.mkdir(exist_ok=True, mode=0o711)
            except OSError as error:
                raise KernelError(error.errno or 0, "making the btrfs pool at", str(self._place)) from error
            self._quota = btrfs.enable_quota(self._place)

    def _mount(self) -> None:
        if self._pool.startswith("/"):
            self._check_device(self._pool)
            mount(self._pool, self._place, "btrfs")
            return
        if not self._file.exists():
            draft = self._file.with_suffix(".draft")
            try:
                with draft.open("wb") as file:
                    allocate(file.fileno(), _size(self._pool))
                make_filesystem("btrfs", str(draft))
                draft.rename(self._file)
            finally:
                draft.unlink(missing_ok=True)
        with loop.attached(self._file) as device:
            mount(device, self._place, "btrfs", "nodiscard")

    def _check_device(self, device: str) -> None:
        found = signature(device)
        if found and found != "btrfs":
            raise FailedPrecondition(
                f"[volumes] btrfs-pool: {device} holds {found}", hint="take a blank device, or wipe it (wipefs -a)",
                reason="DEVICE_HAS_SIGNATURE",
            )  # fmt: skip
        if not found:
            make_filesystem("btrfs", device, zeroed=False)

    def _claim(self, *, fresh: bool) -> None:
        """Mark the pool as this node's: what another netstored keeps in it must not be taken for garbage."""
        mine, there = self._place.with_name("btrfs-pool.id"), self._place / ".netstore"
        if not mine.exists():
            mine.write_text(new_id())
        if not there.exists():
            there.write_text(mine.read_text())
        if there.read_text() != mine.read_text():
            if fresh:
                unmount_all(self._place, lazy=True)
            raise FailedPrecondition(
                "[volumes] btrfs-pool: the pool is another netstored's", hint=f"remove {there} to take it over",
                reason="FOREIGN_POOL",
            )  # fmt: skip

    def _snapshot(self, volume: Volume, snapshot_id: str) -> Path:
        return self.directory(volume) / "snapshots" / snapshot_id


def _size(text: str) -> int:
    try:
        size = size_bytes(text)
    except ValueError:
        size = 0
    if size < MAKERS["btrfs"][2]:
        raise FailedPrecondition(
            f"[volumes] btrfs-pool: {text!r} is not accepted", hint="a device such as /dev/sdb, or a size such as 50G"
        )
    return size
