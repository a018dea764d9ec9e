"""Directories copied whole: owners, modes, times, xattrs, hard links and holes are kept."""

from __future__ import annotations

import os
import stat

from netstore.kernel.files import copy_sparse
from netstore.kernel.paths import closing

__all__ = ["copy_tree", "settle"]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITING = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


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
        with os.scandir(source) as members:
            entries = list(members)
        for entry in entries:
            try:
                self._member(source, target, entry)
            except FileNotFoundError:
                if not self._live:
                    raise
        _settle_open(source, target, os.fstat(source))

    def _member(self, source: int, target: int, entry: os.DirEntry[str]) -> None:
        name = entry.name
        if entry.is_file(follow_symlinks=False):
            self._file(source, target, name)
        elif entry.is_dir(follow_symlinks=False):
            os.mkdir(name, 0o700, dir_fd=target)
            inner = os.open(name, _DIRECTORY, dir_fd=source)
            with closing(inner), closing(os.open(name, _DIRECTORY, dir_fd=target)) as copy:
                self.directory(inner, copy)
        else:
            self._special(source, target, name)

    def _file(self, source: int, target: int, name: str) -> None:
        """Copy a file by descriptors throughout: most of the time goes into finding files by name."""
        with closing(os.open(name, _READING, dir_fd=source)) as reading:
            status = os.fstat(reading)
            if self._linked(target, name, status):
                return
            with closing(os.open(name, _WRITING, 0o600, dir_fd=target)) as writing:
                if status.st_size:
                    copy_sparse(reading, writing, status.st_size)  # shares extents where the filesystem can
                _settle_open(reading, writing, status)
        self.size += status.st_size
        self._remember(target, name, status)

    def _special(self, source: int, target: int, name: str) -> None:
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        if self._linked(target, name, status):
            return
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        else:
            os.mknod(name, stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev, dir_fd=target)
        settle(source, target, name, status)
        self._remember(target, name, status)

    def _linked(self, target: int, name: str, status: os.stat_result) -> bool:
        """Make a hard link where the inode has been copied already."""
        first = self._links.get((status.st_dev, status.st_ino)) if status.st_nlink > 1 else None
        if first:
            os.link(first, name, dst_dir_fd=target, follow_symlinks=False)
        return bool(first)

    def _remember(self, target: int, name: str, status: os.stat_result) -> None:
        if status.st_nlink > 1:
            self._links[status.st_dev, status.st_ino] = f"{os.readlink(f'/proc/self/fd/{target}')}/{name}"


def _settle_open(origin: int, copy: int, status: os.stat_result) -> None:
    """Do what `settle` does, by the descriptors of both; root's own are root's from the start."""
    if status.st_uid or status.st_gid:
        os.fchown(copy, status.st_uid, status.st_gid)
    os.fchmod(copy, stat.S_IMODE(status.st_mode))
    for key in os.listxattr(origin):
        if not key.startswith("trusted.overlay."):
            os.setxattr(copy, key, os.getxattr(origin, key))
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))


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
