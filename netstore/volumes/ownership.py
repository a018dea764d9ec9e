"""Giving what is in a volume to a user, by descriptors, so that no link leads elsewhere."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from netstore.errors import KernelError
from netstore.kernel.paths import closing
from netstore.model import VolumeSpec

__all__ = ["begin", "give", "has_owner"]

_BESIDES = {"lost+found", ".netstore-copying"}
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
            _give_members(os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECTORY), uid, gid, status.st_dev)
        if (status.st_uid, status.st_gid) != (uid, gid):
            os.chown(f"/proc/self/fd/{descriptor}", uid, gid)
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "changing the owner of", error.filename or "a volume") from error


def _give_members(directory: int, uid: int, gid: int, device: int) -> None:
    """Go through what is in an open directory, which is closed; not by recursion, which has an end. What vanishes
    meanwhile needs no owner.
    """
    levels = [(directory, _names(directory))]
    try:
        while levels:
            place, names = levels[-1]
            name = next(names, None)
            if name is None:
                os.close(levels.pop()[0])
                continue
            with suppress(FileNotFoundError, NotADirectoryError):
                status = os.stat(name, dir_fd=place, follow_symlinks=False)
                if status.st_dev != device:
                    continue
                if (status.st_uid, status.st_gid) != (uid, gid):
                    os.chown(name, uid, gid, dir_fd=place, follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    inner = os.open(name, _DIRECTORY, dir_fd=place)
                    levels.append((inner, _names(inner)))
    finally:
        for place, _ in levels:
            os.close(place)


def _names(directory: int) -> Iterator[str]:
    yield from os.listdir(directory)


def has_owner(spec: VolumeSpec) -> bool:
    """Say whether a volume is asked for whose root is not root's, or not 0755 (the options `OWNER` of drivers)."""
    return not spec.block and bool({"uid", "gid", "mode"} & set(spec.options))


def begin(data: Path, spec: VolumeSpec, *, empty: bool = True) -> None:
    """Give the root of a volume the owner and the mode that it was created with; with `empty`, only while nothing is in
    it. The same at every start of its use, so that a crash leaves nothing half done.

    Raises:
        KernelError: the kernel refused.
    """
    try:
        with closing(os.open(data, _DIRECTORY)) as root:
            if empty and set(os.listdir(root)) - _BESIDES:
                return
            owner = [int(spec.options.get(key, -1)) for key in ("uid", "gid")]
            if owner != [-1, -1]:
                os.fchown(root, *owner)
            if "mode" in spec.options:
                os.fchmod(root, int(spec.options["mode"], 8))
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "changing the owner of", str(data)) from error
