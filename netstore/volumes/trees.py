"""Directories copied whole: owners, modes, times, xattrs, hard links and holes are kept."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from netstore.kernel.files import copy_sparse
from netstore.kernel.paths import closing, set_mode

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
    copy.tree(_Level(source, target, _members(source)))
    return copy.size


@dataclass(frozen=True, slots=True)
class _Level:
    """A directory that is being copied, open, and what is left to copy of its members."""

    source: int
    target: int
    left: Iterator[os.DirEntry[str]]

    def close(self) -> None:
        os.close(self.source)
        os.close(self.target)


class _Copy:
    def __init__(self, *, live: bool) -> None:
        self._live = live
        self._links: dict[tuple[int, int], str] = {}  # an inode's first copy
        self.size = 0

    def tree(self, top: _Level) -> None:
        """Copy each directory's members, then its own owner, mode and times; not by recursion, which has an end."""
        levels = [top]
        try:
            while levels:
                level = levels[-1]
                try:
                    entry = next(level.left, None)
                    if entry is not None:
                        levels += self._member(level, entry)
                        continue
                except FileNotFoundError:
                    if not self._live:
                        raise
                    continue
                _settle_open(level.source, level.target, os.fstat(level.source))
                if level is not top:
                    level.close()
                levels.pop()
        finally:
            for level in levels[1:]:
                level.close()

    def _member(self, level: _Level, entry: os.DirEntry[str]) -> list[_Level]:
        """Copy a member; of a directory only make it, and return it to be copied."""
        name = entry.name
        if entry.is_file(follow_symlinks=False):
            self._file(level.source, level.target, name)
        elif entry.is_dir(follow_symlinks=False):
            return [_open_pair(level, name)]
        else:
            self._special(level.source, level.target, name)
        return []

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


def _members(directory: int) -> Iterator[os.DirEntry[str]]:
    with os.scandir(directory) as members:
        return iter(list(members))


def _open_pair(level: _Level, name: str) -> _Level:
    with ExitStack() as undo:
        source = os.open(name, _DIRECTORY, dir_fd=level.source)
        undo.callback(os.close, source)
        os.mkdir(name, 0o700, dir_fd=level.target)
        target = os.open(name, _DIRECTORY, dir_fd=level.target)
        undo.callback(os.close, target)
        made = _Level(source, target, _members(source))
        undo.pop_all()
        return made


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
        set_mode(target, name, stat.S_IMODE(status.st_mode))
    origin, copy = f"/proc/self/fd/{source}/{name}", f"/proc/self/fd/{target}/{name}"
    for key in os.listxattr(origin, follow_symlinks=False):
        if not key.startswith("trusted.overlay."):
            os.setxattr(copy, key, os.getxattr(origin, key, follow_symlinks=False), follow_symlinks=False)
    os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=target, follow_symlinks=False)
