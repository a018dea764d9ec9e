"""Network namespaces (network_namespaces(7)): opening safely, making, pinning, and working inside.

setns(2) moves one thread. Work inside is done by a thread that goes in, opens what it needs, and comes back at once;
a thread that cannot come back ends the process, because it would serve the next caller in a container's namespace.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import functools
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from netstore.errors import InvalidArgument, KernelError
from netstore.kernel.mounts import bind_file, unmount
from netstore.kernel.paths import closing, open_cached, status

__all__ = [
    "CLONE_NEWNET",
    "await_single_use_thread",
    "create",
    "in_single_use_thread",
    "inside",
    "open_namespace",
    "open_namespace_at_once",
    "open_pinned",
    "remove",
    "socket_inside",
]

CLONE_NEWNET = 0x40000000
NS_GET_NSTYPE = 0xB703
_ACCEPTED = "the path of a container's network namespace, such as /run/netns/NAME or /proc/PID/ns/net"

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: int) -> None:
    if getattr(_libc, name)(*args) != 0:
        raise KernelError(ctypes.get_errno(), name, "network namespace")


def open_namespace(path: str, *, field: str = "netns_path") -> int:
    """Open a network namespace that a caller named by path; the caller closes the descriptor.

    Raises:
        InvalidArgument: the path is no network namespace, or is the daemon's own (the host's).
    """
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument(field, path, _ACCEPTED)
    try:
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidArgument(field, path, f"{_ACCEPTED} ({error.strerror})", reason="NOT_A_NAMESPACE") from error
    with closing(found):
        return _checked(found, path, field)


def open_namespace_at_once(path: str, *, field: str = "netns_path") -> int | None:
    """Do what `open_namespace` does, if that surely waits for no disk or server; None when it may [0.03 ms].

    Raises:
        InvalidArgument: as `open_namespace`.
    """
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument(field, path, _ACCEPTED)
    found = open_cached(path)
    if found is None:
        return None
    with closing(found):
        return _checked(found, path, field)


def _checked(found: int, path: str, field: str) -> int:
    """Open for real what O_PATH found, if it is another network namespace than ours."""
    own = os.stat("/proc/thread-self/ns/net")
    device, inode = status(found)
    # Only nsfs files are opened for real: opening a device or a FIFO that a caller names could block or act.
    if device != own.st_dev:
        raise InvalidArgument(field, path, _ACCEPTED, reason="NOT_A_NAMESPACE")
    if inode == own.st_ino:
        raise InvalidArgument(
            field, path, "a namespace other than the host's own; for that one use --network host",
            reason="HOST_NAMESPACE",
        )  # fmt: skip
    namespace = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
    if fcntl.ioctl(namespace, NS_GET_NSTYPE) != CLONE_NEWNET:
        os.close(namespace)
        raise InvalidArgument(field, path, _ACCEPTED, reason="NOT_A_NAMESPACE")
    return namespace


def open_pinned(path: str, inode: int) -> int | None:
    """Open a namespace that we know; None when it is gone or another one took its path."""
    try:
        namespace = open_namespace(path)
    except InvalidArgument:
        return None
    if inode and os.fstat(namespace).st_ino != inode:
        os.close(namespace)
        return None
    return namespace


@contextmanager
def inside(namespace: int) -> Iterator[None]:
    """Move this thread into a namespace and back. Hold it for moments only: no logging, no imports, no waiting."""
    home = _home()
    _call("setns", namespace, CLONE_NEWNET)
    try:
        yield
    finally:
        if _libc.setns(home, CLONE_NEWNET) != 0:
            os._exit(70)


@functools.cache
def _home() -> int:
    """Return a descriptor of the process's own namespace, where its first thread is and stays."""
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def socket_inside(namespace: int, family: int, type_: int, protocol: int = 0) -> socket.socket:
    """Return a socket that belongs to a namespace and stays in it [0.01 ms]."""
    with inside(namespace):
        return socket.socket(family, type_ | socket.SOCK_CLOEXEC, protocol)


def create(path: Path) -> int:
    """Make a network namespace and pin it at `path`, which must not exist; returns its inode number.

    Raises:
        KernelError: it cannot be made or pinned; nothing is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(exist_ok=False)
    try:
        return in_single_use_thread(lambda: _create_here(path))
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _create_here(path: Path) -> int:
    _call("unshare", CLONE_NEWNET)
    bind_file("/proc/thread-self/ns/net", path)
    return os.stat("/proc/thread-self/ns/net").st_ino


def remove(path: Path) -> None:
    """Unpin a namespace; it ends with its last user. One that is gone is a success."""
    unmount(path, lazy=True)
    path.unlink(missing_ok=True)


_thread = threading.local()


def in_single_use_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread that ends with it, so that what it did to itself touches nobody else; in such a thread
    already, just do it.
    """
    if getattr(_thread, "single_use", False):
        return work()
    outcome: Future[T] = Future()
    _start(work, outcome)
    return outcome.result()


async def await_single_use_thread(work: Callable[[], T]) -> T:
    """Do what `in_single_use_thread` does, while the event loop goes on."""
    outcome: Future[T] = Future()
    _start(work, outcome)
    return await asyncio.wrap_future(outcome)


def _start(work: Callable[[], T], outcome: Future[T]) -> None:
    def run() -> None:
        _thread.single_use = True
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="namespace").start()
