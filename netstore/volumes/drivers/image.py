"""The driver `image`: a filesystem in a file, on whatever the state directory is on; its size always holds.

The file is allocated in full, so that a full disk never eats what a container was told is written; `sparse=true` takes
only what is used, and the manager watches that enough stays free.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from pathlib import Path

from netstore.drivers.options import Option, boolean, choice
from netstore.errors import Exhausted, InUse, InvalidArgument, KernelError, NetstoreError, Unsupported
from netstore.kernel import loop
from netstore.kernel.files import allocate, remove_tree, spare_bytes, sync_directory
from netstore.kernel.filesystems import (
    CHECK_SECONDS,
    MAKERS,
    MOUNT_FLAGS,
    grow,
    make_filesystem,
    mount,
    space,
    trim,
    unmount_all,
)
from netstore.kernel.mounts import is_mount_point
from netstore.kernel.paths import closing
from netstore.kernel.tools import run_tool
from netstore.model import Volume, VolumeSpec
from netstore.volumes.drivers.base import OWNER, Capability, VolumeDriver, os_error

__all__ = ["ImageDriver"]

_UNIT = 4096
_LARGEST = 1 << 44  # 16 TiB: ext4's largest file

_FLAGS = sorted(set(MOUNT_FLAGS) - {"defaults", "ro", "rw", "bind", "rbind", "remount"})
_TUNING = {
    "ext4": "data=(ordered|journal|writeback)|commit=[0-9]{1,4}",
    "xfs": "allocsize=[0-9]{1,7}[km]|logbsize=[0-9]{1,3}k|inode32|inode64|largeio|swalloc",
    "btrfs": "compress(-force)?=(zlib|lzo|zstd)(:[0-9]{1,2})?|commit=[0-9]{1,4}|autodefrag|nodatacow|nodatasum",
}
"""What `o` takes beside flags: nothing that names a device, trims what is allocated, or loses what is written."""
_MAKING = {"ext4": "-[bIiNmO]", "xfs": "-[bimns]", "btrfs": "-[nsO]"}
"""Flags of mkfs that `mkfs` takes: none that names a device or a file."""


class ImageDriver(VolumeDriver):
    """`image` in the volume's directory, mounted at `_data` through a loop device with direct I/O."""

    name = "image"
    options = (
        Option("fs", choice("ext4", "xfs", "btrfs"), "ext4", "filesystem: ext4, xfs or btrfs"),
        Option("sparse", boolean, False, "take space of the host only as it is used; a full host then stops writes"),
        Option("o", str, "", "mount options, separated by commas: noexec, nosuid, nodev, noatime, compress=zstd"),
        Option("mkfs", str, "", "flags of mkfs with their values, such as -i 8192 (ext4), -s size=4096 (xfs)"),
        *OWNER,
    )
    capabilities = frozenset({Capability.SIZE, Capability.GROW, Capability.BLOCK})

    def validate(self, spec: VolumeSpec) -> None:
        """Check a spec: the size is required, and at least what the filesystem needs."""
        super().validate(spec)
        values = self.parsed(spec)
        kind = values["fs"]
        for key in ("fs", "o", "mkfs") if spec.block else ():
            if key in spec.options:
                raise InvalidArgument(
                    f"spec.options[{key}]", values[key], "nothing: a device of mode BLOCK has no filesystem of ours"
                )
        _check_mount_options(kind, values["o"])
        _check_mkfs(kind, values["mkfs"])
        least = MAKERS[kind][2]
        if not least <= spec.size_bytes <= _LARGEST:
            raise InvalidArgument(
                "spec.size_bytes", spec.size_bytes, f"{least >> 20} MiB to 16 TiB for {kind}: an image needs a size"
            )

    def enforcement(self, volume: Volume) -> str:
        """Name the filesystem."""
        if volume.spec.block:
            return "a device of an image file"
        return f"{self.parsed(volume.spec)['fs']} in an image file"

    def image(self, volume: Volume) -> Path:
        """Return the image's path."""
        return self.directory(volume) / "image"

    def create(self, volume: Volume) -> None:
        """Allocate the image and make its filesystem, under another name until it is whole."""
        directory, image = self.directory(volume), self.image(volume)
        if image.exists():
            return
        values, draft = self.parsed(volume.spec), directory / "draft"
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o711)
            draft.unlink(missing_ok=True)
            _allocate(draft, volume.spec.size_bytes, sparse=values["sparse"])
            if not volume.spec.block:
                _make(values["fs"], draft, values["mkfs"])
                _allocate(draft, volume.spec.size_bytes, sparse=values["sparse"])  # on a tmpfs mkfs punches holes
            draft.rename(image)
            for place in (directory, self.root):
                sync_directory(place)
        except BaseException as error:
            remove_tree(directory)
            if isinstance(error, OSError):
                raise _said(error, "making the image of", volume) from error
            raise

    def remove(self, volume: Volume) -> None:
        """Unmount and remove the image."""
        self.unstage(volume)
        remove_tree(self.directory(volume))

    def stage(self, volume: Volume) -> None:
        """Mount the image."""
        target = self.mountpoint(volume)
        if is_mount_point(target):
            return
        values = self.parsed(volume.spec)
        own = "discard" if values["sparse"] else "nodiscard"
        options = [own, *(["nouuid"] if values["fs"] == "xfs" else []), values["o"]]
        try:
            if volume.spec.block:
                target.touch(mode=0o600)
                with loop.attached(self.image(volume), lasting=True) as device:
                    mount(device, target, "", "bind")
                return
            target.mkdir(exist_ok=True, mode=0o755)
            with loop.attached(self.image(volume)) as device:
                mount(device, target, values["fs"], ",".join(options))
        except OSError as error:
            raise _said(error, "mounting", volume) from error
        except BaseException:
            if not is_mount_point(target):
                self._clear(volume)
            raise
        lost = target / "lost+found"
        if values["fs"] == "ext4" and lost.is_dir() and not any(lost.iterdir()):
            lost.rmdir()

    def unstage(self, volume: Volume) -> None:
        """Unmount; the loop device ends by itself, and that of mode BLOCK here."""
        unmount_all(self.mountpoint(volume), lazy=True)
        self._clear(volume)

    def _clear(self, volume: Volume) -> None:
        target = self.mountpoint(volume)
        if target.is_dir():
            target.rmdir()
        elif target.exists():  # a file: what a device was bound to
            if device := loop.find(self.image(volume)):
                loop.detach(device)
            target.unlink()

    def _is_whole(self, directory: Path) -> bool:
        return (directory / "image").exists()

    def measure(self, volume: Volume) -> int:
        """Return what the image takes of the host."""
        try:
            return self.image(volume).stat().st_blocks * 512
        except FileNotFoundError:
            return 0

    def health(self, volume: Volume) -> str:
        """Say whether the kernel stopped writing after an error."""
        wrong = super().health(volume)
        if not wrong and not volume.spec.block and self.staged(volume) and space(self.mountpoint(volume)).read_only:
            wrong = "it is read-only after an error: see the kernel's log"
        if not wrong and self.thin(volume):
            if spare_bytes(self.root) < 0:
                wrong = "the node is nearly full: what is written to a sparse image may be lost. Free some space"
        elif not wrong and self.measure(volume) < volume.spec.size_bytes:
            wrong = "its image is no longer allocated in full: something trimmed it"
        return wrong

    def resize(self, volume: Volume, size_bytes: int) -> None:
        """Make the image longer and let the filesystem fill it, while it is mounted or not."""
        self._refuse_smaller(volume, size_bytes)
        values, image = self.parsed(volume.spec), self.image(volume)
        if not self.staged(volume) and loop.find(image):
            raise InUse(f"volume {volume.name}: a process still uses its filesystem", hint="end it, then try again")
        before, growing, grown = image.stat().st_size, self.directory(volume) / "growing", False
        try:
            # The file stays when we are killed: `fits` then says that it is not done. Its lock is the tools' too: who
            # still works on the image after that is waited for.
            with closing(os.open(growing, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                _allocate(image, size_bytes, sparse=values["sparse"])
                grown = not volume.spec.block
                if volume.spec.block:
                    if device := loop.find(image):
                        loop.refresh_size(device)
                elif self.staged(volume):
                    self._grow_mounted(volume, values["fs"])
                else:
                    self._grow_unmounted(volume, values["fs"], lock)
            growing.unlink()
        except BaseException as error:
            if not grown and not loop.find(image):  # else the filesystem may be as long as the image, or half of it
                os.truncate(image, before)
                growing.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise _said(error, "growing", volume) from error
            raise

    def _grow_mounted(self, volume: Volume, kind: str) -> None:
        device = loop.find(self.image(volume))
        loop.refresh_size(device)
        grow(kind, device, self.mountpoint(volume))

    def _grow_unmounted(self, volume: Volume, kind: str, lock: int) -> None:
        if kind == "ext4":
            image, doing = str(self.image(volume)), f"growing {volume.name}"
            check = ["e2fsck", "-f", "-y", image]
            run_tool(check, doing, accepted=(0, 1), package="e2fsprogs", keep=[lock], timeout=CHECK_SECONDS)
            run_tool(["resize2fs", image], doing, package="e2fsprogs", keep=[lock], timeout=CHECK_SECONDS)
            return
        self.stage(volume)
        try:
            self._grow_mounted(volume, kind)
        finally:
            self.unstage(volume)

    def fits(self, volume: Volume) -> bool:
        """Say whether the image has the size of the spec, and its filesystem fills it."""
        whole = not (self.directory(volume) / "growing").exists()
        return whole and self.image(volume).stat().st_size >= volume.spec.size_bytes

    def trim(self, volume: Volume) -> int:
        """Give blocks that the filesystem no longer uses back to the host: of a sparse image."""
        if volume.spec.block or not self.thin(volume):
            raise Unsupported(
                f"volume {volume.name} is allocated in full: it gives nothing back", hint="make it with -o sparse=true"
            )
        return trim(self.mountpoint(volume))

    def thin(self, volume: Volume) -> bool:
        """A sparse one is."""
        return bool(self.parsed(volume.spec)["sparse"])


def _check_mount_options(kind: str, text: str) -> None:
    for word in text.split(",") if text else ():
        if word not in _FLAGS and not re.fullmatch(_TUNING[kind], word):
            raise InvalidArgument("spec.options[o]", word, f"{', '.join(_FLAGS)}; for {kind} {_TUNING[kind]}")


def _check_mkfs(kind: str, text: str) -> None:
    words = text.split()
    for flag, value in zip(words[::2], [*words[1::2], ""], strict=False):
        if not re.fullmatch(_MAKING[kind], flag) or not re.fullmatch(r"[\w^][\w^=,.]*", value):
            raise InvalidArgument("spec.options[mkfs]", f"{flag} {value}", f"{_MAKING[kind]}, each with its value")


def _make(kind: str, image: Path, flags: str) -> None:
    try:
        make_filesystem(kind, str(image), flags.split())
    except NetstoreError as error:
        if flags and error.reason == "TOOL_FAILED":
            raise InvalidArgument("spec.options[mkfs]", flags, f"what mkfs.{kind} accepts: {error.what}") from error
        raise


def _allocate(path: Path, size_bytes: int, *, sparse: bool) -> None:
    """Make a file, or make it longer."""
    size = -(-size_bytes // _UNIT) * _UNIT
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not sparse:
            allocate(descriptor, size)
        elif os.fstat(descriptor).st_size < size:
            if spare_bytes(descriptor) < 0:  # it would be full before it is written
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)


def _said(error: OSError, doing: str, volume: Volume) -> KernelError | Exhausted:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Exhausted(
            f"{doing} volume {volume.name}: no room for its size on this node",
            hint="free some, ask for less, or take -o sparse=true",
        )
    return os_error(error, doing, volume)
