"""Giving what is in a volume to a user, by descriptors, so that no link leads elsewhere."""

from __future__ import annotations

import errno
import os
import stat

from netstore.errors import KernelError
from netstore.kernel.paths import closing

__all__ = ["give"]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def give(descriptor: int, uid: int, gid: int) -> None:
    """Make a file, or a directory with all that is beneath it, a user's; `descriptor` may be O_PATH. What is on other
    file systems beneath is left alone, and so is what the user has already.

    Raises:
        KernelError: the kernel refused.
    """
    status = os.fstat(descriptor)
    try:
        if stat.S_ISDIR(status.st_mode):
            with closing(os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECTORY)) as directory:
                _give_members(directory, uid, gid, status.st_dev)
        if (status.st_uid, status.st_gid) != (uid, gid):
            os.chown(f"/proc/self/fd/{descriptor}", uid, gid)
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "changing the owner of", error.filename or "a volume") from error


def _give_members(directory: int, uid: int, gid: int, device: int) -> None:
    for name in os.listdir(directory):
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if status.st_dev != device:
            continue
        if stat.S_ISDIR(status.st_mode):
            with closing(os.open(name, _DIRECTORY, dir_fd=directory)) as inner:
                _give_members(inner, uid, gid, device)
        if (status.st_uid, status.st_gid) != (uid, gid):
            os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=False)
