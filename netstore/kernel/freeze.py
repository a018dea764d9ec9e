"""A filesystem kept still (FIFREEZE, FITHAW: include/uapi/linux/fs.h), so that what is copied is of one moment."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from netstore.errors import FailedPrecondition, KernelError
from netstore.kernel.mounts import sync_file_system
from netstore.kernel.paths import closing

__all__ = ["Freeze", "frozen", "thaw"]

FIFREEZE, FITHAW = 0xC0045877, 0xC0045878
# Thaws when we die in between: its standard input ends without a line.
_GUARD = 'read line && exit; fsfreeze --unfreeze "$0"'


@dataclass(slots=True)
class Freeze:
    """Whether a filesystem was frozen, and for how long."""

    happened: bool = False
    seconds: float = 0.0


@contextmanager
def frozen(target: Path) -> Iterator[Freeze]:
    """Keep the filesystem mounted at a path still; where it cannot be frozen (tmpfs), only write it out.

    Raises:
        FailedPrecondition: somebody else has frozen it.
        KernelError: it cannot be written out.
    """
    freeze = Freeze()
    with closing(os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as descriptor:
        sync_file_system(descriptor)  # most of what the freeze would have to wait for
        guard = subprocess.Popen(
            ["sh", "-c", _GUARD, str(target)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            started = time.perf_counter()
            freeze.happened = _freeze(descriptor, target)
            try:
                yield freeze
            finally:
                if freeze.happened:
                    fcntl.ioctl(descriptor, FITHAW, 0)
                    freeze.seconds = time.perf_counter() - started
        finally:
            guard.communicate(b"done\n")


def _freeze(descriptor: int, target: Path) -> bool:
    try:
        fcntl.ioctl(descriptor, FIFREEZE, 0)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
            return False
        if error.errno == errno.EBUSY:
            raise FailedPrecondition(
                f"the filesystem at {target} is frozen by somebody else", hint="`fsfreeze --unfreeze` thaws it",
                reason="FROZEN",
            ) from error  # fmt: skip
        raise KernelError(error.errno or errno.EIO, "freezing", str(target)) from error
    return True


def thaw(target: Path) -> bool:
    """Thaw what a crash left frozen; False when nothing was."""
    try:
        with closing(os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as descriptor:
            fcntl.ioctl(descriptor, FITHAW, 0)
    except OSError:
        return False
    return True
