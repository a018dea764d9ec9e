"""Mounts by descriptor (fsopen(2), fsmount(2), open_tree(2), move_mount(2)): nothing is reachable until it is whole.

This is the one place where their errors become `KernelError`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from netstore.errors import KernelError
from netstore.kernel.paths import closing, syscall

__all__ = [
    "MOUNT_ATTR_IDMAP",
    "MOUNT_ATTR_NODEV",
    "MOUNT_ATTR_NOEXEC",
    "MOUNT_ATTR_NOSUID",
    "MOUNT_ATTR_RDONLY",
    "MS_PRIVATE",
    "attach",
    "attach_at",
    "bind_file",
    "clone",
    "detach",
    "is_mount_point",
    "layers_only",
    "mount_id",
    "open_tree",
    "overlay",
    "propagation",
    "set_attributes",
    "sync_file_system",
    "tmpfs",
    "unmount",
]

SYS_open_tree, SYS_move_mount, SYS_fsopen, SYS_fsconfig, SYS_fsmount = 428, 429, 430, 431, 432
SYS_mount_setattr = 442
FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC = 1, 1
FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 1, 6
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH, MOVE_MOUNT_BENEATH = 0x4, 0x40, 0x200
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 0x1, 0x2, 0x4, 0x8
MOUNT_ATTR_IDMAP = 0x100000
MS_RDONLY, MS_PRIVATE = 1, 1 << 18
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
AT_SYMLINK_NOFOLLOW, AT_STATX_DONT_SYNC = 0x100, 0x4000
STATX_MNT_ID, STATX_ATTR_MOUNT_ROOT = 0x1000, 0x2000
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, doing: str, to: str) -> int:
    if result < 0:
        raise KernelError(-result, doing, to)
    return result


def overlay(lower: Sequence[Path], upper: Path, work: Path) -> int:
    """Make an overlay (kernel doc: filesystems/overlayfs) of read-only layers, top first; returns a detached mount.

    Layers are given one by one (`lowerdir+`, Linux 6.8), so that no page limits their number; an older kernel gets
    them in the one page of mount(2).

    Raises:
        KernelError: the kernel refused.
    """
    writable = (("upperdir", str(upper)), ("workdir", str(work)))
    try:
        return _overlay(lower, writable, str(upper.parent), 0)
    except KernelError as error:
        if error.errno != errno.EINVAL:
            raise
    return _overlay_by_page(lower, writable, upper.parent / "mounting", 0)


def _overlay(lower: Sequence[Path], writable: Iterable[tuple[str, str]], to: str, attributes: int) -> int:
    """Make it by descriptor. EINVAL before Linux 6.8: `lowerdir+` is unknown, which 6.1 says in the end alone."""
    with closing(
        _checked(syscall(SYS_fsopen, ctypes.c_char_p(b"overlay"), FSOPEN_CLOEXEC), "opening", "overlay")
    ) as fs:
        for key, value in (*(("lowerdir+", str(layer)) for layer in lower), *writable):
            _checked(_set(fs, key, value), "stacking layers of", to)
        _checked(syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, None, None, 0), "making the overlay of", to)
        return _checked(syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, attributes), "mounting the overlay of", to)


def _overlay_by_page(lower: Sequence[Path], writable: Iterable[tuple[str, str]], place: Path, flags: int) -> int:
    """Mount at a place that is made for it, take a detached copy, and unmount there."""
    to = str(place.parent)
    data = ",".join(f"{key}={value}" for key, value in (("lowerdir", ":".join(map(str, lower))), *writable))
    if len(data) >= os.sysconf("SC_PAGESIZE"):
        raise KernelError(errno.E2BIG, "stacking layers of", to, hint="Linux 6.8 has no such limit")
    place.mkdir(exist_ok=True)
    try:
        if _libc.mount(b"overlay", os.fsencode(place), b"overlay", flags, os.fsencode(data)) != 0:
            raise KernelError(ctypes.get_errno(), "making the overlay of", to)
        try:
            return open_tree(place)
        finally:
            unmount(place, lazy=True)
    finally:
        place.rmdir()


def open_tree(source: str | Path) -> int:
    """Return a detached copy of what is mounted at a path, or of the file or directory that it is."""
    path = ctypes.c_char_p(os.fsencode(source))
    return _checked(syscall(SYS_open_tree, AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC), "reading", str(source))


def layers_only(lower: Sequence[Path]) -> int:
    """Make a read-only overlay of two layers or more, top first; returns a detached mount.

    Raises:
        KernelError: the kernel refused.
    """
    try:
        return _overlay(lower, (), str(lower[0]), MOUNT_ATTR_RDONLY)
    except KernelError as error:
        if error.errno != errno.EINVAL:
            raise
    with tempfile.TemporaryDirectory(prefix="netstore-") as directory:
        return _overlay_by_page(lower, (), Path(directory) / "mounting", MS_RDONLY)


def tmpfs(options: Iterable[str]) -> int:
    """Make a tmpfs (tmpfs(5)) with options such as "size=1048576" or "mode=1777"; returns a detached mount.

    Raises:
        KernelError: the kernel refused an option.
    """
    with closing(_checked(syscall(SYS_fsopen, ctypes.c_char_p(b"tmpfs"), FSOPEN_CLOEXEC), "opening", "tmpfs")) as fs:
        for option in options:
            key, _, value = option.partition("=")
            _checked(_set(fs, key, value), "setting", f"{option} of a tmpfs")
        _checked(syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, None, None, 0), "making", "a tmpfs")
        return _checked(syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, 0), "mounting", "a tmpfs")


def clone(source: int, name: str, *, recursive: bool = True) -> int:
    """Return a detached copy of what an open file or directory is, with the mounts beneath it where `recursive`."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    return _checked(syscall(SYS_open_tree, source, ctypes.c_char_p(b""), flags), "copying the mount of", name)


def set_attributes(
    mount: int, name: str, *, on: int = 0, off: int = 0, propagation: int = 0, user_namespace: int = 0,
    recursive: bool = True,
) -> None:  # fmt: skip
    """Set and clear attributes of a mount, and of those beneath it where `recursive` (mount_setattr(2)).

    Raises:
        KernelError: the kernel refused; nothing changed.
    """
    attributes = struct.pack("QQQQ", on, off, propagation, user_namespace)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    empty = ctypes.c_char_p(b"")
    result = syscall(SYS_mount_setattr, mount, empty, flags, ctypes.c_char_p(attributes), len(attributes))
    _checked(result, "setting attributes of the mount of", name)


def propagation(descriptor: int) -> set[str]:
    """Return which of "shared" and "slave" the mount is that a descriptor is on (proc_pid_mountinfo(5))."""
    wanted = str(mount_id(descriptor)[0])
    for line in Path("/proc/thread-self/mountinfo").read_text().splitlines():
        words = line.split(" ")
        if words[0] == wanted:
            tags = words[6 : words.index("-")]
            return {"slave" if tag.startswith("master:") else tag.partition(":")[0] for tag in tags}
    return set()


def _set(fs: int, key: str, value: str) -> int:
    key_bytes, value_bytes = ctypes.c_char_p(key.encode()), ctypes.c_char_p(os.fsencode(value))
    return syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, key_bytes, value_bytes, 0)


def attach(mount: int, target: Path) -> None:
    """Attach a detached mount at a directory."""
    empty, path = ctypes.c_char_p(b""), ctypes.c_char_p(os.fsencode(target))
    _checked(syscall(SYS_move_mount, mount, empty, AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH), "mounting at", str(target))


def attach_at(mount: int, target: int, name: str, *, beneath: bool = False) -> None:
    """Attach a detached mount at an open file or directory; `beneath` puts it under the mount whose root that is."""
    empty = ctypes.c_char_p(b"")
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH | (MOVE_MOUNT_BENEATH if beneath else 0)
    _checked(syscall(SYS_move_mount, mount, empty, target, empty, flags), "mounting at", name)


def bind_file(source: str, target: Path) -> None:
    """Bind a file, such as a namespace, onto another."""
    with closing(open_tree(source)) as tree:
        attach(tree, target)


def unmount(target: Path, *, lazy: bool = False) -> bool:
    """Unmount what is at a path, never through a link; False says that nothing was mounted.

    Raises:
        KernelError: EBUSY when it is in use and `lazy` is not set.
    """
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)
    if _libc.umount2(os.fsencode(target), flags) != 0:
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOENT):
            raise KernelError(code, "unmounting", str(target))
        return False
    return True


def detach(target: Path) -> bool:
    """Unmount lazily what is at a path and beneath it; False says that nothing was mounted. It is made private before:
    else what is beneath a shared bind would be unmounted at its source too.
    """
    try:
        with closing(os.open(target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)) as mount:
            set_attributes(mount, str(target), propagation=MS_PRIVATE)
    except KernelError as error:
        if error.errno != errno.EINVAL:  # not a mount
            raise
        return False
    except FileNotFoundError:
        return False
    return unmount(target, lazy=True)


def is_mount_point(directory: Path) -> bool:
    """Say whether something is mounted at a path.

    Costs the same however many mounts there are, and asks no server: a dead one cannot hold it up.
    """
    try:
        return _look(AT_FDCWD, directory, AT_SYMLINK_NOFOLLOW)[1]
    except KernelError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise


def mount_id(descriptor: int) -> tuple[int, bool]:
    """Return the id (proc_pid_mountinfo(5)) of the mount that a descriptor is on, and whether it is its root."""
    return _look(descriptor, "", AT_EMPTY_PATH)


def _look(directory: int, path: str | Path, flags: int) -> tuple[int, bool]:
    """Return stx_mnt_id and STATX_ATTR_MOUNT_ROOT of statx(2)."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statx(directory, os.fsencode(path), flags | AT_STATX_DONT_SYNC, STATX_MNT_ID, buffer) != 0:
        raise KernelError(ctypes.get_errno(), "looking at", str(path))
    attributes, number = struct.unpack_from("Q", buffer, 8)[0], struct.unpack_from("Q", buffer, 144)[0]
    return number, bool(attributes & STATX_ATTR_MOUNT_ROOT)


def sync_file_system(descriptor: int) -> None:
    """Write out the whole file system that a descriptor is on (syncfs(2)): one flush for many files."""
    if _libc.syncfs(descriptor) != 0:
        raise KernelError(ctypes.get_errno(), "writing out", "the file system")
