"""inotify(7): wait for a file to change, without polling."""

from __future__ import annotations

import asyncio
import ctypes
import os
from types import TracebackType

from netstore.errors import KernelError

__all__ = ["Watch"]

IN_CLOEXEC, IN_NONBLOCK = os.O_CLOEXEC, os.O_NONBLOCK
IN_MODIFY, IN_CLOSE_WRITE, IN_MOVE_SELF, IN_DELETE_SELF = 0x2, 0x8, 0x800, 0x400

_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """Changes of one file. `changed` is set by each, and cleared by whoever looked."""

    def __init__(self, path: str) -> None:
        self.changed = asyncio.Event()
        self._descriptor = _libc.inotify_init1(IN_CLOEXEC | IN_NONBLOCK)
        if self._descriptor < 0:
            raise KernelError(ctypes.get_errno(), "watching", path)
        mask = IN_MODIFY | IN_CLOSE_WRITE | IN_MOVE_SELF | IN_DELETE_SELF
        if _libc.inotify_add_watch(self._descriptor, os.fsencode(path), mask) < 0:
            code = ctypes.get_errno()
            os.close(self._descriptor)
            raise KernelError(code, "watching", path)

    def __enter__(self) -> Watch:
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
