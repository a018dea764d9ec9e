"""Directories copied whole: owners, modes, times, xattrs, hard links and holes are kept."""

from __future__ import annotations

import os
import stat

from netstore.kernel.files import copy_sparse

__all__ = ["copy_tree", "settle"]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def copy_tree(source: int, target: int, *, live: bool = False) -> int:
    """Copy what is in the open directory `source` into the empty one `target`; returns the bytes of its files.

    With `live`, files that vanish meanwhile are left out, as they would be a moment later.

    Raises:
        OSError: the kernel refused.
    """
    copy = _Copy(live=live)
    copy.directory(source, target)
    return copy.size


class _Copy:
    def __init__(self, *, live: bool) -> None:
        self._live = live
        self._links: dict[tuple[int, int], str] = {}  # an inode's first copy
        self.size = 0

    def directory(self, source: int, target: int) -> None:
        """Copy one directory's members, then its own owner, mode and times."""
        for name in os.listdir(source):
            try:
                self._member(source, target, name)
            except FileNotFoundError:
                if not self._live:
                    raise
        settle(source, target, ".", os.fstat(source))

    def _member(self, source: int, target: int, name: str) -> None:
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            os.mkdir(name, 0o700, dir_fd=target)
            inner = os.open(name, _DIRECTORY, dir_fd=source)
            try:
                copy = os.open(name, _DIRECTORY, dir_fd=target)
                try:
                    self.directory(inner, copy)
                finally:
                    os.close(copy)
            finally:
                os.close(inner)
            return
        first = self._links.get((status.st_dev, status.st_ino)) if status.st_nlink > 1 else None
        if first:
            os.link(first, name, dst_dir_fd=target, follow_symlinks=False)
            return
        self._file(source, target, name, status)
        settle(source, target, name, status)
        if status.st_nlink > 1:
            self._links[status.st_dev, status.st_ino] = f"{os.readlink(f'/proc/self/fd/{target}')}/{name}"

    def _file(self, source: int, target: int, name: str, status: os.stat_result) -> None:
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        elif stat.S_ISREG(status.st_mode):
            reading = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                writing = os.open(name, flags, 0o600, dir_fd=target)
                try:
                    copy_sparse(reading, writing, status.st_size)  # shares extents where the filesystem can
                    self.size += status.st_size
                finally:
                    os.close(writing)
            finally:
                os.close(reading)
        else:
            os.mknod(name, stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev, dir_fd=target)


def settle(source: int, target: int, name: str, status: os.stat_result) -> None:
    """Set owner, mode, xattrs and times; in this order, because chown clears setuid and capabilities."""
    os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=target)
    origin, copy = f"/proc/self/fd/{source}/{name}", f"/proc/self/fd/{target}/{name}"
    for key in os.listxattr(origin, follow_symlinks=False):
        if not key.startswith("trusted.overlay."):
            os.setxattr(copy, key, os.getxattr(origin, key, follow_symlinks=False), follow_symlinks=False)
    os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=target, follow_symlinks=False)
