"""Filesystems: made, mounted (mount(2)), measured, grown. The one place where their errors become `KernelError`."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from netstore.errors import KernelError, NetstoreError, Unsupported
from netstore.kernel import loop
from netstore.kernel.mounts import is_mount_point, unmount
from netstore.kernel.paths import closing
from netstore.kernel.tools import run_tool

__all__ = [
    "CHECK_SECONDS",
    "MAKERS",
    "MOUNT_FLAGS",
    "Space",
    "grow",
    "make_filesystem",
    "mount",
    "mounts_below",
    "renew_uuid",
    "space",
    "trim",
    "unmount_all",
]

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC = 1, 32, 4096, 16384
# mount(8): words of an option list that are flags (set, cleared); all others go to the filesystem.
MOUNT_FLAGS: Mapping[str, tuple[int, int]] = {
    "defaults": (0, 0), "ro": (MS_RDONLY, 0), "rw": (0, MS_RDONLY), "nosuid": (2, 0), "suid": (0, 2),
    "nodev": (4, 0), "dev": (0, 4), "noexec": (8, 0), "exec": (0, 8), "sync": (16, 0), "async": (0, 16),
    "dirsync": (128, 0), "noatime": (1024, 0), "atime": (0, 1024), "nodiratime": (2048, 0),
    "relatime": (1 << 21, 0), "strictatime": (1 << 24, 0), "lazytime": (1 << 25, 0),
    "bind": (MS_BIND, 0), "rbind": (MS_BIND | MS_REC, 0), "remount": (MS_REMOUNT, 0),
}  # fmt: skip

_ZEROED = "lazy_itable_init=1,nodiscard,assume_storage_prezeroed=1"
MAKERS: Mapping[str, tuple[str, Sequence[str], int]] = {
    "ext4": ("e2fsprogs", ("mkfs.ext4", "-q", "-F", "-m", "0", "-E", _ZEROED), 8 << 20),
    "xfs": ("xfsprogs", ("mkfs.xfs", "-q", "-f", "-K"), 300 << 20),
    "btrfs": ("btrfs-progs", ("mkfs.btrfs", "-q", "-f", "-K", "-m", "single"), 128 << 20),
}
"""Filesystem: its package, the command that makes it without discarding what is allocated, its least size in bytes."""

CHECK_SECONDS = 24 * 3600.0
"""What reads all of a filesystem's metadata may take so long: a large one must not be given up half done."""

FITRIM = 0xC0185879
_RANGE = struct.Struct("=QQQ")  # struct fstrim_range: start, length, least extent

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Space:
    """What statvfs(3) says: bytes and inodes, whole and used; `read_only` is as mounted."""

    size_bytes: int
    used_bytes: int
    free_bytes: int
    inodes: int
    inodes_used: int
    read_only: bool


def make_filesystem(
    kind: str, device: str, options: Sequence[str] = (), *, zeroed: bool = True, timeout: float = 300.0
) -> None:
    """Make a filesystem on a device or in a file; `zeroed` says that it reads as zeros; `options` go to its tool.

    Raises:
        Unsupported: its tools are not installed.
        NetstoreError: they failed.
    """
    package, command, _ = MAKERS[kind]
    if not zeroed:
        command = [part.replace(",assume_storage_prezeroed=1", "") for part in command]
    run_tool([*command, *options, device], f"making {kind} on {device}", package=package, timeout=timeout)


def mount(source: str, target: Path, kind: str, options: str = "") -> None:
    """Mount a filesystem at a directory; `options` are those of mount(8) -o.

    Raises:
        Unsupported: the kernel has no such filesystem.
        KernelError: it refused.
    """
    flags, data = 0, []
    for word in options.split(","):
        on, off = MOUNT_FLAGS.get(word, (0, 0))
        flags = (flags | on) & ~off
        data += [word] if word and word not in MOUNT_FLAGS else []
    _mount(source, target, kind, flags, ",".join(data))
    if flags & MS_BIND and flags & ~(MS_BIND | MS_REC):  # a bind takes its flags from a second call
        try:
            _mount("none", target, "", (flags & ~MS_REC) | MS_REMOUNT, "")
        except KernelError:
            unmount(target, lazy=True)
            raise


def _mount(source: str, target: Path, kind: str, flags: int, data: str) -> None:
    encoded = [os.fsencode(each) for each in (source, target, kind)]
    if _libc.mount(encoded[0], encoded[1], encoded[2], flags, os.fsencode(data)) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.ENODEV:
        known = [line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines()]
        raise Unsupported(
            f"mounting {source}: this kernel has no filesystem {kind}",
            hint=f"load its module, or use one of {', '.join(sorted(known))}", reason="NO_FILESYSTEM",
        )  # fmt: skip
    hints = {
        errno.EINVAL: f"wrong options ({data}), or no {kind} on it" if data else f"there may be no {kind} on it",
        errno.EBUSY: "something else uses the device",
        errno.ENOTBLK: "the device must be a block device",
    }
    raise KernelError(code, f"mounting {source} at", str(target), hint=hints.get(code, ""))


def unmount_all(target: Path, *, lazy: bool = False) -> None:
    """Unmount everything that is at a path.

    Raises:
        KernelError: EBUSY when it is in use and `lazy` is not set.
    """
    while is_mount_point(target):
        unmount(target, lazy=lazy)


def mounts_below(directory: Path) -> set[str]:
    """Return the paths of all mount points below a directory (proc_pid_mountinfo(5))."""
    found = set()
    prefix = f"{directory}/"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        path = line.split(" ")[4].encode().decode("unicode_escape")
        if path.startswith(prefix):
            found.add(path)
    return found


def space(path: Path) -> Space:
    """Measure the filesystem that a path is on."""
    try:
        found = os.statvfs(path)
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "measuring", str(path)) from error
    return Space(
        size_bytes=found.f_blocks * found.f_frsize,
        used_bytes=(found.f_blocks - found.f_bfree) * found.f_frsize,
        free_bytes=found.f_bavail * found.f_frsize,
        inodes=found.f_files,
        inodes_used=found.f_files - found.f_ffree,
        read_only=bool(found.f_flag & os.ST_RDONLY),
    )


def grow(kind: str, device: str, target: Path) -> None:
    """Let a mounted filesystem fill its device.

    Raises:
        Unsupported: this kernel, or our rights, do not let it grow while it is mounted.
        NetstoreError: its tool failed.
    """
    commands = {
        "ext4": ["resize2fs", device],
        "xfs": ["xfs_growfs", str(target)],
        "btrfs": ["btrfs", "filesystem", "resize", "max", str(target)],
    }
    try:
        run_tool(commands[kind], f"growing the {kind} at {target}", package=MAKERS[kind][0])
    except NetstoreError as error:
        if kind == "ext4" and "ermission denied" in error.what:
            raise Unsupported(
                f"growing the ext4 at {target} while it is mounted needs CAP_SYS_RESOURCE",
                hint="stop the containers that use it, then grow it", reason="NO_ONLINE_GROW",
            ) from error  # fmt: skip
        raise


def trim(target: Path) -> int:
    """Tell the device of a mounted filesystem which blocks hold nothing (FITRIM: include/uapi/linux/fs.h); returns the
    bytes that it gave up.

    Raises:
        Unsupported: the device has no use for it.
        KernelError: the kernel refused.
    """
    asked = bytearray(_RANGE.pack(0, (1 << 64) - 1, 0))
    try:
        with closing(os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as descriptor:
            fcntl.ioctl(descriptor, FITRIM, asked)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
            raise Unsupported(f"trimming {target}: its device, or its filesystem, takes no trim") from error
        raise KernelError(error.errno or errno.EIO, "trimming", str(target)) from error
    return int(_RANGE.unpack(asked)[1])


def renew_uuid(kind: str, image: Path, target: Path) -> None:
    """Give the filesystem in a file, a copy of another, a UUID of its own. `target` is a name that is free meanwhile: a
    copy of a frozen xfs replays its log first.

    Raises:
        NetstoreError: its tool failed.
    """
    commands = {
        "ext4": (["e2fsck", "-f", "-y", str(image)], ["tune2fs", "-U", "random", str(image)]),
        "xfs": (["xfs_admin", "-U", "generate", str(image)],),
        "btrfs": (["btrfstune", "-f", "-m", str(image)],),
    }
    if kind == "xfs":
        target.mkdir()
        with loop.attached(image) as device:
            mount(device, target, kind, "nouuid")
        unmount_all(target)
        target.rmdir()
    for command in commands[kind]:
        accepted = (0, 1) if command[0] == "e2fsck" else (0,)
        doing = f"giving a UUID to {image}"
        run_tool(command, doing, package=MAKERS[kind][0], accepted=accepted, timeout=CHECK_SECONDS)
