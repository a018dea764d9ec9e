"""btrfs by ioctl (kernel: include/uapi/linux/btrfs.h): subvolumes, snapshots, quotas, without a process for each."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import uuid
from pathlib import Path

from netstore.errors import KernelError
from netstore.kernel.paths import closing

__all__ = [
    "SUPER_MAGIC",
    "create_subvolume",
    "delete_subvolume",
    "enable_quota",
    "is_btrfs",
    "is_subvolume",
    "limit",
    "referenced",
    "snapshot",
]

SUPER_MAGIC = 0x9123683E
BTRFS_IOC_SUBVOL_CREATE, BTRFS_IOC_SNAP_DESTROY, BTRFS_IOC_SNAP_CREATE_V2 = 0x5000940E, 0x5000940F, 0x50009417
BTRFS_IOC_QUOTA_CTL, BTRFS_IOC_QGROUP_LIMIT = 0xC0109428, 0x8030942B
BTRFS_IOC_FS_INFO, BTRFS_IOC_INO_LOOKUP = 0x8400941F, 0xD0009412
BTRFS_QUOTA_CTL_ENABLE, BTRFS_QUOTA_CTL_ENABLE_SIMPLE_QUOTA = 1, 4
BTRFS_QGROUP_LIMIT_MAX_RFER, BTRFS_SUBVOL_RDONLY, BTRFS_FIRST_FREE_OBJECTID = 1, 2, 256
_NO_LIMIT = (1 << 64) - 1


def is_btrfs(path: Path) -> bool:
    """Say whether a path is on btrfs: its control ioctl answers."""
    try:
        _fsid(path)
    except KernelError:
        return False
    return True


def is_subvolume(path: Path) -> bool:
    """Say whether a directory on btrfs is a subvolume's root."""
    try:
        return path.lstat().st_ino == BTRFS_FIRST_FREE_OBJECTID
    except FileNotFoundError:
        return False


def create_subvolume(path: Path) -> None:
    """Make a subvolume; its parent directory exists."""
    _on_directory(path.parent, BTRFS_IOC_SUBVOL_CREATE, struct.pack("=q4088s", 0, path.name.encode()), "making", path)


def delete_subvolume(path: Path) -> None:
    """Remove a subvolume; the kernel frees its blocks in the background. One that is gone is a success."""
    try:
        arguments = struct.pack("=q4088s", 0, path.name.encode())
        _on_directory(path.parent, BTRFS_IOC_SNAP_DESTROY, arguments, "removing", path)
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise


def snapshot(source: Path, target: Path, *, read_only: bool) -> None:
    """Make a snapshot of a subvolume: all of it at one moment."""
    with closing(_open(source)) as descriptor:
        flags = BTRFS_SUBVOL_RDONLY if read_only else 0
        arguments = struct.pack("=qQQ32s4040s", descriptor, 0, flags, b"", target.name.encode())
        _on_directory(target.parent, BTRFS_IOC_SNAP_CREATE_V2, arguments, "making the snapshot", target)


def enable_quota(path: Path) -> str:
    """Turn quotas on, simple ones (Linux 6.7) where the kernel has them; returns which, "" when it has none."""
    with closing(_open(path)) as descriptor:
        for command, name in ((BTRFS_QUOTA_CTL_ENABLE_SIMPLE_QUOTA, "simple"), (BTRFS_QUOTA_CTL_ENABLE, "full")):
            try:
                fcntl.ioctl(descriptor, BTRFS_IOC_QUOTA_CTL, struct.pack("=QQ", command, 0))
                return name
            except OSError as error:
                if error.errno == errno.EEXIST:
                    return name
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY):
                    raise KernelError(error.errno or 0, "turning quotas on at", str(path)) from error
    return ""


def limit(path: Path, size_bytes: int) -> None:
    """Set the most that a subvolume may refer to; 0 is no limit."""
    value = size_bytes or _NO_LIMIT
    arguments = struct.pack("=QQQQQQ", 0, BTRFS_QGROUP_LIMIT_MAX_RFER, value, 0, 0, 0)
    _on_directory(path, BTRFS_IOC_QGROUP_LIMIT, arguments, "limiting", path)


def referenced(path: Path) -> int | None:
    """Return the bytes that a subvolume refers to, or with simple quotas owns; None without quotas."""
    arguments = bytearray(4096)
    struct.pack_into("=QQ", arguments, 0, 0, BTRFS_FIRST_FREE_OBJECTID)
    with closing(_open(path)) as descriptor:
        try:
            fcntl.ioctl(descriptor, BTRFS_IOC_INO_LOOKUP, arguments)
        except OSError as error:
            raise KernelError(error.errno or 0, "looking up", str(path)) from error
    (tree,) = struct.unpack_from("=Q", arguments)
    try:
        return int(Path(f"/sys/fs/btrfs/{_fsid(path)}/qgroups/0_{tree}/referenced").read_text())
    except (OSError, ValueError):
        return None


def _fsid(path: Path) -> uuid.UUID:
    arguments = bytearray(1024)
    with closing(_open(path)) as descriptor:
        try:
            fcntl.ioctl(descriptor, BTRFS_IOC_FS_INFO, arguments)
        except OSError as error:
            raise KernelError(error.errno or 0, "asking btrfs at", str(path)) from error
    return uuid.UUID(bytes=bytes(arguments[16:32]))


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(error.errno or 0, "opening", str(path)) from error


def _on_directory(directory: Path, request: int, arguments: bytes, doing: str, to: Path) -> None:
    with closing(_open(directory)) as descriptor:
        try:
            fcntl.ioctl(descriptor, request, bytearray(arguments))
        except OSError as error:
            raise KernelError(error.errno or 0, doing, str(to)) from error
