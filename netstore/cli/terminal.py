"""Streams between our terminal and a process of a container: run -it, exec -it, attach."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from typing import Any

import click

from netstore.api.v1 import container_pb2

__all__ = ["Terminal"]

_DETACH_KEYS = b"\x10\x11"  # ctrl-p ctrl-q, as Docker


class Terminal:
    """Our end of a stream. With `tty` our terminal is raw as long as it is entered, and its sizes are passed on."""

    def __init__(self, *, tty_: bool, stdin: bool, detaches: bool = False) -> None:
        if tty_ and stdin and not sys.stdin.isatty():
            raise click.UsageError("--tty with --interactive: the input is not a terminal; leave --tty out")
        self.tty, self.stdin, self._detaches = tty_, stdin, detaches
        self._raw = tty_ and stdin
        self._woken, self._waker = os.pipe()
        self._held = b""

    def size(self) -> container_pb2.TerminalSize | None:
        """Return our terminal's size, None where there is none."""
        if not self.tty or not sys.stdout.isatty():
            return None
        columns, rows = os.get_terminal_size(sys.stdout.fileno())
        return container_pb2.TerminalSize(rows=rows, columns=columns) if rows and columns else None

    def run(self, method: Any, first: Any, ready: Callable[[], object] = lambda: None) -> int | None:
        """Call a method whose first request is `first`, call `ready` once it is attached, and show what it brings.

        Returns the exit code that ends it, None when the keys that detach did.
        """
        with self._entered():
            return _show(method(self._requests(first)), ready)

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        """Make our terminal raw, and put it back."""
        before = termios.tcgetattr(sys.stdin) if self._raw else None
        if before:
            tty.setraw(sys.stdin)
        os.set_blocking(self._waker, False)
        signal.signal(signal.SIGWINCH, lambda *_: None)
        signal.set_wakeup_fd(self._waker)  # told at once, whatever the main thread waits for
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            if before:
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)

    def _requests(self, first: Any) -> Iterator[Any]:
        """Yield the first request of a stream, then input and sizes."""
        yield first
        kind, stdin = type(first), sys.stdin.fileno()
        while self.stdin or self.tty:
            ready, _, _ = select.select([self._woken, *([stdin] if self.stdin else [])], [], [])
            if self._woken in ready:
                os.read(self._woken, 512)
                if size := self.size():
                    yield kind(size=size)
            if stdin in ready:
                data, last = self._kept(os.read(stdin, 1 << 15))
                if data:
                    yield kind(stdin=data)
                if last:
                    return

    def _kept(self, data: bytes) -> tuple[bytes, bool]:
        """Return what of our input is the process's, and whether it is the last: a key that may begin to detach is
        held back.
        """
        if not data or not self._detaches or not self.tty:
            return data, not data
        before, keys, _ = (self._held + data).partition(_DETACH_KEYS)
        self._held = _DETACH_KEYS[:1] if before.endswith(_DETACH_KEYS[:1]) and not keys else b""
        return before.removesuffix(self._held), bool(keys)


def _show(responses: Any, ready: Callable[[], object]) -> int | None:
    """Write what a stream brings to our outputs; returns the exit code that ends it, None when we left it."""
    for response in responses:
        kind = response.WhichOneof("response")
        if kind == "exit_code":
            return int(response.exit_code)
        if kind == "attached":
            ready()
        else:
            target = sys.stderr if kind == "stderr" else sys.stdout
            target.buffer.write(response.stderr or response.stdout)
            target.buffer.flush()
    return None
