"""Copy-up: an image's content at a mount target becomes the content of a volume that is empty (Docker's behaviour).

Owners, modes, times, xattrs and hard links are kept. The copy is made beside the volume and moved into place, so that
a crash leaves all of it or nothing. A mounted volume has no place beside it, and a directory that others have
mounted must stay: there the copy is made inside, renamed once it is whole, and its members are moved up; a crash in
between is finished by the next copy-up.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from netstore.errors import Exhausted, KernelError
from netstore.kernel.files import remove_tree
from netstore.kernel.mounts import is_mount_point
from netstore.kernel.paths import closing
from netstore.volumes.trees import copy_tree, settle

__all__ = ["copy_up"]

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
    remove_tree(staging)
    staging.mkdir(mode=0o700)
    try:
        target = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            copy_tree(source, target)
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
        remove_tree(staging)
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
        settle(copied, root, ".", status)
        os.rmdir(_WHOLE, dir_fd=root)
