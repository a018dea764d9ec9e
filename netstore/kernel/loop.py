"""Loop devices: a file as a block device (kernel: include/uapi/linux/loop.h).

Each is configured in one call, with autoclear: it ends with its last user, so a crash leaks none.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from netstore.errors import KernelError
from netstore.kernel.paths import closing

__all__ = ["attached", "detach", "find", "refresh_size"]

LOOP_CLR_FD, LOOP_GET_STATUS64, LOOP_SET_CAPACITY, LOOP_CONFIGURE, LOOP_CTL_GET_FREE = (
    0x4C01,
    0x4C05,
    0x4C07,
    0x4C0A,
    0x4C82,
)
LO_FLAGS_READ_ONLY, LO_FLAGS_AUTOCLEAR, LO_FLAGS_DIRECT_IO = 1, 4, 16
_INFO = struct.Struct("=QQQQQIIII64s64s32s2Q")  # struct loop_info64
_RETRIES = 64


@contextmanager
def attached(backing: Path, *, read_only: bool = False, lasting: bool = False) -> Iterator[str]:
    """Attach a file to a loop device, or find the one that has it; yields its path.

    Only what uses the device inside (a mount) keeps it, unless it is `lasting`, until `detach`. Direct I/O, so that
    nothing is cached twice.

    Raises:
        KernelError: the kernel refused.
    """
    with closing(_open(backing, read_only=read_only)) as file:
        for _ in range(_RETRIES):
            descriptor, path = _take(file, str(backing))
            if descriptor < 0:
                descriptor = _configure(file, path, str(backing), read_only=read_only, lasting=lasting)
            if descriptor >= 0:
                break
        else:
            raise KernelError(errno.EBUSY, "finding a free loop device for", str(backing))
    try:
        yield path
    finally:
        os.close(descriptor)


def find(backing: Path) -> str:
    """Return the path of the loop device that has a file, "" when none has."""
    with closing(_open(backing, read_only=True)) as file:
        descriptor, path = _take(file, str(backing))
    if descriptor < 0:
        return ""
    os.close(descriptor)
    return path


def detach(device: str) -> None:
    """Let a device go; while somebody has it open it ends with the last of them. One that is free is a success."""
    try:
        with closing(os.open(device, os.O_RDONLY | os.O_CLOEXEC)) as descriptor:
            fcntl.ioctl(descriptor, LOOP_CLR_FD)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise KernelError(error.errno or errno.EIO, "detaching", device) from error


def refresh_size(device: str) -> None:
    """Let a loop device see that its file has grown."""
    try:
        with closing(os.open(device, os.O_RDWR | os.O_CLOEXEC)) as descriptor:
            fcntl.ioctl(descriptor, LOOP_SET_CAPACITY, 0)
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "growing", device) from error


def _open(backing: Path, *, read_only: bool) -> int:
    try:
        return os.open(backing, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "opening the image", str(backing)) from error


def _take(file: int, backing: str) -> tuple[int, str]:
    """Return the open device that has the file; else -1, and the path of a free one."""
    wanted, tail = os.fstat(file), "/".join(Path(backing).parts[-2:])
    for name in os.listdir("/sys/block"):
        if not name.startswith("loop"):
            continue
        try:  # only one that is in use has this
            named = Path(f"/sys/block/{name}/loop/backing_file").read_text()
        except OSError:
            continue
        if tail not in named:  # to open another's, for a moment, would keep it from ending with its last user
            continue
        descriptor = _has(f"/dev/{name}", wanted)
        if descriptor >= 0:
            return descriptor, f"/dev/{name}"
    try:
        with closing(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)) as control:
            return -1, f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}"
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "finding a free loop device for", backing) from error


def _has(device: str, wanted: os.stat_result) -> int:
    """Return the open device when its file is the wanted one, else -1."""
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        info = _INFO.unpack(fcntl.ioctl(descriptor, LOOP_GET_STATUS64, bytes(_INFO.size)))
        if (info[0], info[1]) == (wanted.st_dev, wanted.st_ino):
            return descriptor
    except OSError:  # cleared in between
        pass
    os.close(descriptor)
    return -1


def _configure(file: int, device: str, backing: str, *, read_only: bool, lasting: bool) -> int:
    """Give the file to a free device and return it open; -1 when somebody else took it."""
    flags = LO_FLAGS_DIRECT_IO | (0 if lasting else LO_FLAGS_AUTOCLEAR) | (LO_FLAGS_READ_ONLY if read_only else 0)
    name = os.fsencode(backing)[-63:]
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, name, b"", b"", 0, 0)
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "opening", device) from error
    try:
        fcntl.ioctl(descriptor, LOOP_CONFIGURE, struct.pack("=II", file, 0) + info + bytes(64))
        _read_ahead(os.fstat(file).st_dev, os.fstat(descriptor).st_rdev)
        return descriptor
    except OSError as error:
        os.close(descriptor)
        if error.errno == errno.EBUSY:
            return -1
        raise KernelError(error.errno or errno.EIO, "attaching to a loop device:", backing) from error


def _read_ahead(host: int, device: int) -> None:
    """Read as far ahead as the host's filesystem: with direct I/O nobody else does [a third of the throughput without].

    The kernel sets it anew with every configuration.
    """
    names = [Path(f"/sys/class/bdi/{os.major(each)}:{os.minor(each)}/read_ahead_kb") for each in (host, device)]
    try:
        wanted, present = (int(name.read_text()) for name in names)
        if wanted > present:
            names[1].write_text(str(wanted))
    except OSError:  # a host filesystem without a device of its own
        pass
