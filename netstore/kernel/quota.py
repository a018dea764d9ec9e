"""Project quotas of ext4 and xfs (quotactl_fd(2), Linux 5.14; ioctl_xfs_fsgetxattr(2)): a size for a directory tree."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from netstore.errors import KernelError
from netstore.kernel.paths import closing, syscall

__all__ = ["Quota", "enforced", "get", "heed", "project", "set_limit", "set_project"]

SYS_capget, SYS_capset = {"x86_64": (125, 126)}.get(os.uname().machine, (90, 91))
SYS_quotactl_fd = 443
_CAPABILITY_VERSION_3, CAP_SYS_RESOURCE = 0x20080522, 24
PRJQUOTA, Q_GETQUOTA, Q_SETQUOTA, Q_XGETQSTATV = 2, 0x800007, 0x800008, 0x5808
FS_QUOTA_PDQ_ENFD, QIF_BLIMITS = 0x20, 1
FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR, FS_XFLAG_PROJINHERIT = 0x801C581F, 0x401C5820, 0x200
_DQBLK = struct.Struct("=8QI4x")  # struct if_dqblk
_FSXATTR = struct.Struct("=5I8s")


@dataclass(frozen=True, slots=True)
class Quota:
    """A project's limit and what it uses."""

    limit_bytes: int
    used_bytes: int
    inodes_used: int


def enforced(directory: Path) -> str:
    """Return "" when the filesystem of a directory holds project quotas, else why it does not."""
    buffer = ctypes.create_string_buffer(256)
    buffer[0] = b"\x01"  # FS_QSTATV_VERSION1
    result = _quotactl(directory, Q_XGETQSTATV, 0, buffer)
    if result == -errno.ENOSYS:
        return "the kernel has no quotas for this filesystem"
    if result < 0:
        return f"the filesystem has no project quotas ({os.strerror(-result)}): mount it with prjquota"
    (flags,) = struct.unpack_from("=H", buffer.raw, 2)
    return "" if flags & FS_QUOTA_PDQ_ENFD else "project quotas are not on: mount the filesystem with prjquota"


def get(directory: Path, project_id: int) -> Quota | None:
    """Return a project's quota; None when it has none."""
    buffer = ctypes.create_string_buffer(_DQBLK.size)
    result = _quotactl(directory, Q_GETQUOTA, project_id, buffer)
    if result == -errno.ENOENT:
        return None
    if result < 0:
        raise KernelError(-result, "reading the quota of", str(directory))
    hard, _, space, _, _, inodes, _, _, _ = _DQBLK.unpack(buffer.raw)
    return Quota(hard * 1024, space, inodes)


def set_limit(directory: Path, project_id: int, size_bytes: int) -> None:
    """Set the most bytes of a project; 0 is no limit."""
    blocks = -(-size_bytes // 1024)
    packed = _DQBLK.pack(blocks, blocks, 0, 0, 0, 0, 0, 0, QIF_BLIMITS)
    result = _quotactl(directory, Q_SETQUOTA, project_id, ctypes.create_string_buffer(packed, len(packed)))
    if result < 0:
        raise KernelError(-result, "setting the quota of", str(directory))


def heed() -> None:
    """Have quotas hold for this thread, and those that it starts: ext4 lets past them who has CAP_SYS_RESOURCE.

    Programs that are executed have the capability again.
    """
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), 8)
    sets = ctypes.create_string_buffer(24)  # effective, permitted, inheritable; twice 32 bits of each
    result = syscall(SYS_capget, header, sets)
    if result == 0:
        (effective,) = struct.unpack_from("=I", sets)
        struct.pack_into("=I", sets, 0, effective & ~(1 << CAP_SYS_RESOURCE))
        result = syscall(SYS_capset, header, sets)
    if result < 0:
        raise KernelError(-result, "giving up a capability", "CAP_SYS_RESOURCE")


def project(directory: Path) -> int:
    """Return the project of a directory, 0 for none."""
    return int(_attributes(directory)[3])


def set_project(directory: Path, project_id: int) -> None:
    """Put a directory, and all that will be made in it, into a project."""
    flags, extent_size, extents, _, cow, padding = _attributes(directory)
    packed = _FSXATTR.pack(flags | FS_XFLAG_PROJINHERIT, extent_size, extents, project_id, cow, padding)
    with closing(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as descriptor:
        try:
            fcntl.ioctl(descriptor, FS_IOC_FSSETXATTR, packed)
        except OSError as error:
            raise KernelError(error.errno or 0, "setting the project of", str(directory)) from error


def _attributes(directory: Path) -> tuple[int, int, int, int, int, bytes]:
    with closing(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as descriptor:
        try:
            found = _FSXATTR.unpack(fcntl.ioctl(descriptor, FS_IOC_FSGETXATTR, bytes(_FSXATTR.size)))
        except OSError as error:
            raise KernelError(error.errno or 0, "reading the project of", str(directory)) from error
    return found[0], found[1], found[2], found[3], found[4], found[5]


def _quotactl(directory: Path, command: int, project_id: int, buffer: ctypes.Array[ctypes.c_char]) -> int:
    with closing(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as descriptor:
        return syscall(SYS_quotactl_fd, descriptor, command << 8 | PRJQUOTA, project_id, buffer)
