"""inotify(7): wait for a file to change, without polling."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from netstore.errors import KernelError

__all__ = ["PathWatch", "Watch"]

IN_CLOEXEC, IN_NONBLOCK = os.O_CLOEXEC, os.O_NONBLOCK
IN_MODIFY, IN_CLOSE_WRITE, IN_MOVE_SELF, IN_DELETE_SELF = 0x2, 0x8, 0x800, 0x400
IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x40, 0x80, 0x100, 0x200
_OF_FILE = IN_MODIFY | IN_CLOSE_WRITE | IN_MOVE_SELF | IN_DELETE_SELF
_OF_DIRECTORY = IN_MODIFY | IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE
_EVENT = struct.Struct("iIII")
_MAX_LINKS = 10

_libc = ctypes.CDLL(None, use_errno=True)


class _Inotify:
    """One descriptor, read by the event loop. `changed` is set by each change, and cleared by whoever looked."""

    def __init__(self, path: str) -> None:
        self.changed = asyncio.Event()
        self._descriptor = _libc.inotify_init1(IN_CLOEXEC | IN_NONBLOCK)
        if self._descriptor < 0:
            raise KernelError(ctypes.get_errno(), "watching", path)

    def _add(self, path: str, mask: int) -> int:
        """Watch one inode; returns the watch's number, or the negative errno."""
        number = int(_libc.inotify_add_watch(self._descriptor, os.fsencode(path), mask))
        return number if number >= 0 else -ctypes.get_errno()

    def __enter__(self) -> Self:
        asyncio.get_running_loop().add_reader(self._descriptor, self._read)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)

    def _read(self) -> None:
        os.read(self._descriptor, 65536)
        self.changed.set()


class Watch(_Inotify):
    """Changes of one file."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        code = self._add(path, _OF_FILE)
        if code < 0:
            os.close(self._descriptor)
            raise KernelError(-code, "watching", path)


class PathWatch(_Inotify):
    """Changes of what a path names: the file written or replaced, it or a symbolic link on the way made or turned."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._names: dict[int, set[bytes]] = {}
        self._arm()

    def _arm(self) -> None:
        """Watch the directory of the path, of what it links to, and so on, and the file itself: a mount shows there."""
        self._names.clear()
        at = self._path
        for at in _links(self._path):
            self._names.setdefault(self._add(str(at.parent), _OF_DIRECTORY), set()).add(os.fsencode(at.name))
        self._names.setdefault(self._add(str(at), _OF_FILE), set()).add(b"")

    def _read(self) -> None:
        data, at = os.read(self._descriptor, 65536), 0
        while at < len(data):
            number, _, _, length = _EVENT.unpack_from(data, at)
            name = data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0")
            at += _EVENT.size + length
            if name in self._names.get(number, ()):
                self.changed.set()
        if self.changed.is_set():
            self._arm()


def _links(path: Path) -> Iterator[Path]:
    """Yield a path, and what each symbolic link on its way names."""
    for _ in range(_MAX_LINKS):
        yield path
        try:
            path = Path(os.path.normpath(path.parent / os.readlink(path)))
        except OSError:
            return
