"""Mounts in another mount namespace (mount_namespaces(7)): made, exchanged and taken away while its processes run.

A thread that ends with its work goes in, with a root and a working directory of its own, and comes back at once;
everything that it needs from outside was opened before. Paths inside are resolved beneath the root of the namespace's
process, so that no link leads out of it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from netstore.errors import InvalidArgument, KernelError
from netstore.kernel import mounts
from netstore.kernel.namespaces import in_single_use_thread
from netstore.kernel.paths import closing, open_beneath, open_in_root

__all__ = ["MountNamespace", "Target"]

CLONE_FS, CLONE_NEWNS = 0x200, 0x20000
NS_GET_NSTYPE = 0xB703
_HOLDERS_SHOWN = 5

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Target:
    """What is at a path inside: `path` is without links; `mount` is the id of the mount whose root it is, 0 for none;
    `identity` device and inode. Where nothing is, `missing` are the paths to be made, parents first.
    """

    path: str
    mount: int = 0
    identity: tuple[int, int] = (0, 0)
    directory: bool = True
    read_only: bool = False
    missing: tuple[str, ...] = ()


class MountNamespace:
    """A mount namespace, and the root that its paths begin at. Blocking; close it in the end."""

    def __init__(self, namespace: int, root: int | None) -> None:
        self._namespace = namespace
        self._root = root
        self.inode = os.fstat(namespace).st_ino

    @classmethod
    def of_process(cls, pid: int, *, field: str = "pid", root: str = "") -> MountNamespace:
        """Open the namespace and the root of a process; with `root` a directory that is to become its root.

        Raises:
            InvalidArgument: there is no such process, or it is in our own namespace.
        """
        accepted = "a process in a mount namespace of its own"
        with ExitStack() as undo:
            try:
                namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
                undo.callback(os.close, namespace)
                opened = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                undo.callback(os.close, opened)
            except OSError as error:
                raise InvalidArgument(field, pid, f"{accepted} ({error.strerror})", reason="NOT_A_NAMESPACE") from error
            if _is_own(namespace):
                raise InvalidArgument(field, pid, accepted, reason="HOST_NAMESPACE")
            if root:
                with closing(opened):
                    opened = open_in_root(opened, root, os.O_PATH | os.O_DIRECTORY)
            undo.pop_all()
            return cls(namespace, opened)

    @classmethod
    def at(cls, path: str, *, field: str = "path") -> MountNamespace:
        """Open the namespace that a path names; paths begin at its own root.

        Raises:
            InvalidArgument: it is no mount namespace, or our own.
        """
        accepted = "the path of a mount namespace, such as /proc/PID/ns/mnt"
        try:
            found = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise InvalidArgument(field, path, f"{accepted} ({error})", reason="NOT_A_NAMESPACE") from error
        with closing(found):
            # Only nsfs files are opened for real: opening a device or a FIFO that a caller names could block or act.
            if os.fstat(found).st_dev != os.stat("/proc/thread-self/ns/mnt").st_dev:
                raise InvalidArgument(field, path, accepted, reason="NOT_A_NAMESPACE")
            namespace = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
        if fcntl.ioctl(namespace, NS_GET_NSTYPE) != CLONE_NEWNS or _is_own(namespace):
            os.close(namespace)
            raise InvalidArgument(field, path, f"{accepted}, not the host's", reason="NOT_A_NAMESPACE")
        return cls(namespace, None)

    def __enter__(self) -> MountNamespace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self._namespace)
        if self._root is not None:
            os.close(self._root)

    def look(self, target: str) -> Target:
        """Say what is at a path.

        Raises:
            KernelError: it cannot be resolved, such as a link to nowhere or through what is no directory.
        """
        return self._inside(lambda inside: inside.look(target))

    def attach(self, tree: int, target: str, missing: Sequence[str] = ()) -> None:
        """Attach a detached mount; what is missing is made before, and removed again when it fails.

        Raises:
            KernelError: the kernel refused; nothing is left.
        """
        self._inside(lambda inside: inside.attach(tree, target, missing))

    def exchange(self, tree: int, target: str) -> None:
        """Put a detached mount in the place of the one at `target`, with no moment in which neither is there
        (MOVE_MOUNT_BENEATH, Linux 6.5). Files that are open in the old one stay open.

        Raises:
            KernelError: EINVAL when nothing is mounted there, or the kernel cannot.
        """
        self._inside(lambda inside: inside.exchange(tree, target))

    def set_read_only(self, target: str, *, read_only: bool, recursive: bool = True) -> None:
        """Change at once whether the mount at `target` can be written.

        Raises:
            KernelError: EBUSY when a file on it is open for writing.
        """
        self._inside(lambda inside: inside.set_read_only(target, read_only=read_only, recursive=recursive))

    def detach(self, target: str, *, made: Sequence[str] = (), lazy: bool = False) -> bool:
        """Unmount what is at `target`, and remove the empty directories in `made`; False says that nothing was mounted.

        Raises:
            KernelError: EBUSY when it is in use and `lazy` is not set.
        """
        return self._inside(lambda inside: inside.detach(target, made, lazy=lazy))

    def is_stacked(self, target: str) -> bool:
        """Say whether a mount is hidden under the one at `target`, as an exchange that was cut short leaves it."""
        return self._inside(lambda inside: inside.is_stacked(target))

    def holders(self, target: str) -> list[str]:
        """Return which processes keep the mount at `target` busy: "NAME (pid PID)". Looks at every process."""
        wanted = self.look(target).mount
        found: list[str] = []
        for process in Path("/proc").iterdir():
            if not process.name.isdigit() or len(found) >= _HOLDERS_SHOWN:
                continue
            with suppress(OSError):
                if process.joinpath("ns/mnt").stat().st_ino == self.inode and _is_on(process, wanted):
                    found.append(f"{process.joinpath('comm').read_text().strip()} (pid {process.name})")
        return found

    def _inside(self, work: Callable[[_Inside], T]) -> T:
        return in_single_use_thread(lambda: self._go_in(work))

    def _go_in(self, work: Callable[[_Inside], T]) -> T:
        own = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        descriptors = os.open("/proc/thread-self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        with closing(own), closing(descriptors):
            _call("unshare", CLONE_FS)
            _call("setns", self._namespace, CLONE_NEWNS)
            try:
                if self._root is not None:
                    os.fchdir(self._root)
                    os.chroot(".")
                with closing(os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
                    return work(_Inside(root, descriptors))
            finally:
                # The thread goes on outside, or ends, and then may hold its root a moment longer than it is waited for.
                if _libc.setns(own, CLONE_NEWNS) != 0:
                    os._exit(70)


class _Inside:
    """What a thread does that is in the namespace: by descriptors, no paths of the host, nothing that imports."""

    def __init__(self, root: int, descriptors: int) -> None:
        self._root = root
        self._descriptors = descriptors

    def look(self, target: str) -> Target:
        try:
            opened = open_in_root(self._root, target, os.O_PATH)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            return Target(target, missing=self._missing(target))
        with closing(opened):
            status, (mount, is_root) = os.fstat(opened), mounts.mount_id(opened)
            return Target(
                self._path(opened), mount if is_root else 0, (status.st_dev, status.st_ino),
                stat.S_ISDIR(status.st_mode), bool(os.fstatvfs(opened).f_flag & os.ST_RDONLY),
            )  # fmt: skip

    def _path(self, opened: int) -> str:
        return os.readlink(str(opened), dir_fd=self._descriptors)

    def _missing(self, target: str) -> tuple[str, ...]:
        parts = [part for part in target.split("/") if part]
        for count in range(1, len(parts) + 1):
            try:
                os.close(open_in_root(self._root, "/".join(parts[:count]), os.O_PATH))
            except KernelError as error:
                if error.errno != errno.ENOENT:
                    raise
                return tuple("/" + "/".join(parts[:end]) for end in range(count, len(parts) + 1))
        return ()

    def attach(self, tree: int, target: str, missing: Sequence[str]) -> None:
        directory = stat.S_ISDIR(os.fstat(tree).st_mode)
        made: list[str] = []
        try:
            for path in missing:
                self._make(path, directory=directory or path != missing[-1])
                made.append(path)
            with closing(open_in_root(self._root, target, os.O_PATH)) as opened:
                if stat.S_ISDIR(os.fstat(opened).st_mode) != directory:
                    raise KernelError(errno.ENOTDIR if directory else errno.EISDIR, "mounting at", target)
                mounts.attach_at(tree, opened, target)
        except BaseException:
            self._remove(made)
            raise

    def _make(self, path: str, *, directory: bool) -> None:
        with self._parent(path) as (parent, name):
            try:
                if directory:
                    os.mkdir(name, 0o755, dir_fd=parent)
                else:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                    os.close(os.open(name, flags, 0o644, dir_fd=parent))
            except OSError as error:
                raise KernelError(error.errno or errno.EIO, "making the mount point", path) from error

    def _remove(self, made: Sequence[str]) -> None:
        """Remove what was made, the last first, up to what somebody uses."""
        for path in reversed(made):
            try:
                with self._parent(path) as (parent, name):
                    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        os.rmdir(name, dir_fd=parent)
                    elif stat.S_ISREG(status.st_mode) and not status.st_size:
                        os.unlink(name, dir_fd=parent)
            except (OSError, KernelError):
                return

    @contextmanager
    def _parent(self, path: str) -> Iterator[tuple[int, str]]:
        parent, _, name = path.rstrip("/").rpartition("/")
        with closing(open_in_root(self._root, parent or "/", os.O_PATH | os.O_DIRECTORY)) as opened:
            yield opened, name

    def exchange(self, tree: int, target: str) -> None:
        with closing(open_in_root(self._root, target, os.O_PATH)) as opened:
            mounts.attach_at(tree, opened, target, beneath=True)
            top, path = mounts.mount_id(opened)[0], self._path(opened)
        self._unmount(path, top, lazy=True)

    def set_read_only(self, target: str, *, read_only: bool, recursive: bool) -> None:
        with closing(open_in_root(self._root, target, os.O_PATH)) as opened:
            on, off = (mounts.MOUNT_ATTR_RDONLY, 0) if read_only else (0, mounts.MOUNT_ATTR_RDONLY)
            mounts.set_attributes(opened, target, on=on, off=off, recursive=recursive)

    def is_stacked(self, target: str) -> bool:
        table = os.open("../mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._descriptors)
        with os.fdopen(table) as lines:
            words = {line.split(" ", 5)[0]: line.split(" ", 5) for line in lines}
        top = words.get(str(self.look(target).mount))
        under = words.get(top[1]) if top else None
        return top is not None and under is not None and top[4] == under[4]

    def detach(self, target: str, made: Sequence[str], *, lazy: bool) -> bool:
        found = self.look(target)
        if found.mount:
            self._unmount(found.path, found.mount, lazy=lazy)
        self._remove(made)
        return bool(found.mount)

    def _unmount(self, path: str, mount: int, *, lazy: bool) -> None:
        """Unmount by the name in an open parent, once it is known that the name is the mount that is meant."""
        with self._parent(path) as (parent, name):
            with closing(open_beneath(parent, name, os.O_PATH)) as opened:
                if mounts.mount_id(opened) != (mount, True):
                    raise KernelError(errno.EAGAIN, "unmounting", path, hint="somebody moved it meanwhile: try again")
                # Else what is beneath a shared bind would be unmounted at its source too.
                mounts.set_attributes(opened, path, propagation=mounts.MS_PRIVATE)
            os.fchdir(parent)
            try:
                mounts.unmount(Path(name), lazy=lazy)
            finally:
                os.fchdir(self._root)


def _call(name: str, *args: int) -> None:
    if getattr(_libc, name)(*args) != 0:
        raise KernelError(ctypes.get_errno(), name, "mount namespace")


def _is_own(namespace: int) -> bool:
    own, found = os.stat("/proc/thread-self/ns/mnt"), os.fstat(namespace)
    return (own.st_dev, own.st_ino) == (found.st_dev, found.st_ino)


def _is_on(process: Path, mount: int) -> bool:
    """Say whether a process has its root, working directory, program, a file or a mapping on a mount."""
    links = [process / name for name in ("cwd", "root", "exe")]
    for directory in ("fd", "map_files"):
        with suppress(OSError):
            links += list((process / directory).iterdir())
    for link in links:
        with suppress(OSError, KernelError), closing(os.open(link, os.O_PATH | os.O_CLOEXEC)) as opened:
            if mounts.mount_id(opened)[0] == mount:
                return True
    return False
