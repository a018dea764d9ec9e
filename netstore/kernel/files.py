"""Files copied by extents: shared (FICLONE) where the filesystem can, else with holes; two names that change places;
trees, however deep: Python's own walks end at a depth of a thousand, which a container can make.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from netstore.errors import KernelError, NetstoreError
from netstore.kernel.paths import AT_FDCWD, closing, syscall
from netstore.kernel.tools import run_tool

__all__ = [
    "allocate",
    "copy_data",
    "copy_sparse",
    "exchange",
    "files_below",
    "remove_tree",
    "spare_bytes",
    "sync_directory",
    "tree_bytes",
]

FICLONE = 0x40049409
SYS_renameat2, RENAME_EXCHANGE = {"x86_64": 316}.get(os.uname().machine, 276), 2
_CHUNK = 1 << 24
_SPARED_BYTES = 256 << 20


def allocate(descriptor: int, size: int) -> None:
    """Give a file all of its blocks, up to `size`: from a disk that has them to spare.

    Asked for more than there is, fallocate(2) takes all that there is before it fails, and everybody else on the disk
    sees it full: hence the look before. What is left is 5 % of the disk, at most 256 MiB.

    Raises:
        OSError: ENOSPC, with nothing taken, or what the kernel said.
    """
    there = os.fstat(descriptor).st_blocks * 512
    if size > there and size - there > spare_bytes(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.posix_fallocate(descriptor, 0, size)


def spare_bytes(place: int | Path) -> int:
    """Return the bytes that a disk has to spare: what is free beyond 5 % of it, at most 256 MiB; below 0 when it has
    less than that."""
    disk = os.statvfs(place)
    return disk.f_bavail * disk.f_frsize - min(_SPARED_BYTES, disk.f_blocks * disk.f_frsize // 20)


def copy_data(reading: int, writing: int, size: int) -> bool:
    """Copy a whole open file of `size` bytes into an empty one; True says that they share extents now.

    Raises:
        OSError: the kernel refused.
    """
    try:
        fcntl.ioctl(writing, FICLONE, reading)
        return True
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY):
            raise
    copy_sparse(reading, writing, size)
    return False


def copy_sparse(reading: int, writing: int, size: int) -> None:
    """Copy data and leave holes; what is allocated and was never written counts as a hole.

    Raises:
        OSError: the kernel refused.
    """
    if os.fstat(reading).st_blocks * 512 >= size:
        _copy_range(reading, writing, 0, size)
        return
    position = 0
    while position < size:
        try:
            start = os.lseek(reading, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                break
            raise
        end = min(os.lseek(reading, start, os.SEEK_HOLE), size)
        _copy_range(reading, writing, start, end)
        position = end
    os.ftruncate(writing, size)


def _copy_range(reading: int, writing: int, start: int, end: int) -> None:
    while start < end:
        try:
            done = os.copy_file_range(reading, writing, min(end - start, _CHUNK), start, start)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            os.lseek(writing, start, os.SEEK_SET)
            done = os.sendfile(writing, reading, start, min(end - start, _CHUNK))
        if not done:  # it became shorter meanwhile
            return
        start += done


def exchange(one: Path, other: Path) -> None:
    """Let two names change places in one step (renameat2(2), RENAME_EXCHANGE).

    Raises:
        KernelError: the kernel refused; nothing changed.
    """
    names = ctypes.c_char_p(os.fsencode(one)), ctypes.c_char_p(os.fsencode(other))
    result = syscall(SYS_renameat2, AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE)
    if result < 0:
        raise KernelError(-result, "putting in place", str(other))


def sync_directory(directory: Path) -> None:
    """Make a directory's names durable."""
    with closing(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as descriptor:
        os.fsync(descriptor)


def remove_tree(place: Path) -> None:
    """Remove a directory and all that is in it; what is gone, or cannot be removed, is passed over."""
    try:
        shutil.rmtree(place)
    except FileNotFoundError:
        return
    except (OSError, RecursionError):
        with suppress(NetstoreError):
            run_tool(["rm", "-rf", "--one-file-system", "--", str(place)], "removing", timeout=3600)


def files_below(place: Path, problem: Callable[[OSError], object] = lambda _: None) -> Iterator[os.DirEntry[str]]:
    """Yield what is no directory below one; `problem` is told which directories cannot be read."""
    left = [str(place)]
    while left:
        try:
            with os.scandir(left.pop()) as members:
                for member in members:
                    if member.is_dir(follow_symlinks=False):
                        left.append(member.path)
                    else:
                        yield member
        except OSError as error:
            problem(error)


def tree_bytes(place: Path) -> int:
    """Return the bytes of storage that the files below a directory take; those with several names count once."""
    total, linked = 0, set()
    for file in files_below(place):
        with suppress(FileNotFoundError):  # removed meanwhile
            status = file.stat(follow_symlinks=False)
            if status.st_nlink == 1 or (status.st_dev, status.st_ino) not in linked:
                total += status.st_blocks * 512
                linked |= {(status.st_dev, status.st_ino)} if status.st_nlink > 1 else set()
    return total
