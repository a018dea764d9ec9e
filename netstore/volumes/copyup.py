"""Copy-up: an image's content at a mount target becomes the content of a volume that is empty (Docker's behaviour).

Owners, modes, times, xattrs and hard links are kept. The copy is made beside the volume and moved into place, so that
a crash leaves all of it or nothing. A mounted volume has no place beside it, and a directory that others have
mounted must stay: there the copy is made inside, renamed once it is whole, and its members are moved up; a crash in
between is finished by the next copy-up.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

from netstore.errors import Exhausted, KernelError
from netstore.kernel.mounts import is_mount_point
from netstore.kernel.paths import closing

__all__ = ["copy_up"]

_CHUNK = 1 << 24
_PARTIAL, _WHOLE = ".netstore-copying", ".netstore-copied"


def copy_up(source: int, data: Path, *, inside: bool = False) -> bool:
    """Copy what is in the directory `source` into the empty directory `data`; False when it is not empty. `inside`
    keeps the directory itself, as others need who have it mounted.

    Raises:
        Exhausted: no space is left; the volume is as it was.
        KernelError: the kernel refused.
    """
    mounted = inside or is_mount_point(data) or data.lstat().st_dev != data.parent.lstat().st_dev  # a subvolume
    if mounted:
        _finish(data)
    if set(os.listdir(data)) - {_PARTIAL}:
        return False
    staging = data / _PARTIAL if mounted else data.with_name(f".{data.name}.copy-up")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(mode=0o700)
    try:
        target = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _copy_directory(source, target, {})
        finally:
            os.close(target)
        if mounted:
            os.rename(staging, data / _WHOLE)
            _finish(data)
            return True
        os.rename(staging, data)  # replaces an empty directory, and only that
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Exhausted(f"copying the image's content to {data}: no space is left", hint="free some") from error
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise KernelError(error.errno or errno.EIO, "copying the image's content to", str(data)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def _finish(data: Path) -> None:
    """Move the members of a whole copy up into the volume, and give the volume the copy's owner, mode and times."""
    try:
        copied = os.open(data / _WHOLE, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    with closing(copied), closing(os.open(data, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
        status = os.fstat(copied)
        for name in os.listdir(copied):
            os.rename(name, name, src_dir_fd=copied, dst_dir_fd=root)
        _settle(copied, root, ".", status)
        os.rmdir(_WHOLE, dir_fd=root)


def _copy_directory(source: int, target: int, links: dict[tuple[int, int], str]) -> None:
    """Copy one directory's members, then its own owner, mode and times. `links` maps an inode to its first copy."""
    for name in os.listdir(source):
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        first = links.get((status.st_dev, status.st_ino)) if status.st_nlink > 1 else None
        if first and not stat.S_ISDIR(status.st_mode):
            os.link(first, name, dst_dir_fd=target, follow_symlinks=False)
            continue
        if stat.S_ISDIR(status.st_mode):
            os.mkdir(name, 0o700, dir_fd=target)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            inner, copy = os.open(name, flags, dir_fd=source), os.open(name, flags, dir_fd=target)
            try:
                _copy_directory(inner, copy, links)
            finally:
                os.close(inner)
                os.close(copy)
            continue
        _copy_file(source, target, name, status)
        _settle(source, target, name, status)
        if status.st_nlink > 1:
            links[status.st_dev, status.st_ino] = f"{os.readlink(f'/proc/self/fd/{target}')}/{name}"
    _settle(source, target, ".", os.fstat(source))


def _copy_file(source: int, target: int, name: str, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
    elif stat.S_ISREG(status.st_mode):
        reading = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
        writing = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=target)
        try:
            while _copy_range(reading, writing):
                pass
        finally:
            os.close(reading)
            os.close(writing)
    else:
        os.mknod(name, stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev, dir_fd=target)


def _copy_range(reading: int, writing: int) -> int:
    try:
        return os.copy_file_range(reading, writing, _CHUNK)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return os.sendfile(writing, reading, None, _CHUNK)


def _settle(source: int, target: int, name: str, status: os.stat_result) -> None:
    """Set owner, mode, xattrs and times; in this order, because chown clears setuid and capabilities."""
    os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=target)
    origin, copy = f"/proc/self/fd/{source}/{name}", f"/proc/self/fd/{target}/{name}"
    for key in os.listxattr(origin, follow_symlinks=False):
        if not key.startswith("trusted.overlay."):
            os.setxattr(copy, key, os.getxattr(origin, key, follow_symlinks=False), follow_symlinks=False)
    os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=target, follow_symlinks=False)
