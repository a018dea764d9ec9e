"""Terminals: those of containers' main processes, which conmon holds, and those that we make for an exec.

A client that attaches is one connection to conmon's socket (SOCK_SEQPACKET, the first byte of each message names the
stream). The window's size goes by its fifo `ctl`. Both are in the container's directory.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import struct
import termios
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from netstore.errors import FailedPrecondition, NetstoreError
from netstore.kernel.paths import closing, syscall
from netstore.launcher.runtime import open_reader
from netstore.model import Container, ContainerSpec

__all__ = [
    "Attached",
    "Attaching",
    "Input",
    "Size",
    "check",
    "conmon_arguments",
    "read_terminal",
    "resize",
    "resize_of",
]

_STREAMS = {2: "stdout", 3: "stderr"}
SYS_pidfd_getfd = 438
_MOST = 8192
"""Bytes of one message that conmon reads whole."""


class Size(NamedTuple):
    """Of a terminal's window, in characters."""

    rows: int
    columns: int


Input = bytes | Size


def resize(terminal: int, size: Size) -> None:
    """Set the size of a terminal's window, and tell who uses it (ioctl_tty(2), TIOCSWINSZ)."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", size.rows, size.columns, 0, 0))


def resize_of(pid: int, size: Size) -> None:
    """Set the size of the terminal that a process has as its input; nothing happens where that is none.

    crun 1.8 does not pass a change on, as runc does, to a process that it runs in the foreground.
    """
    with suppress(OSError), closing(os.pidfd_open(pid)) as process:
        terminal = syscall(SYS_pidfd_getfd, process, 0, 0)
        if terminal >= 0:
            with closing(terminal):
                resize(terminal, size)


def conmon_arguments(spec: ContainerSpec) -> list[str]:
    """Return what conmon is told of a container's terminal and input."""
    stays = spec.open_stdin and (spec.tty or not spec.stdin_once)
    flags = {"--terminal": spec.tty, "--stdin": spec.open_stdin, "--leave-stdin-open": stays}
    return [flag for flag, wanted in flags.items() if wanted]


def check(container: Container, *, stdin: bool, size: Size | None) -> None:
    """Refuse to attach to a container with what it does not take.

    Raises:
        FailedPrecondition: input without `open_stdin`, a size without `tty`.
    """
    if stdin and not container.spec.open_stdin:
        raise FailedPrecondition(
            f"container {container.name} takes no input",
            hint="create it with open_stdin (--interactive), or attach without input", reason="NO_STDIN",
        )  # fmt: skip
    if size and not container.spec.tty:
        raise FailedPrecondition(
            f"container {container.name} has no terminal, whose size could be set",
            hint="create it with tty (--tty)", reason="NO_TERMINAL",
        )  # fmt: skip


class Attached:
    """One client's connection to the streams of a container's main process."""

    def __init__(self, directory: Path, connection: socket.socket) -> None:
        self._directory = directory
        self._connection = connection
        self.left = False

    @staticmethod
    async def open(directory: Path) -> Attached:
        """Connect to the conmon of a container's directory.

        Raises:
            FailedPrecondition: there is none, the container has ended.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setblocking(False)
        try:
            with closing(os.open(directory, os.O_PATH | os.O_DIRECTORY)) as place:  # a socket's path has 107 bytes
                await asyncio.get_running_loop().sock_connect(connection, f"/proc/self/fd/{place}/attach")
        except OSError as error:
            connection.close()
            raise FailedPrecondition(
                f"its streams cannot be joined: {error.strerror}", hint="it has ended: start it again",
                reason="NOT_RUNNING",
            ) from error  # fmt: skip
        return Attached(directory, connection)

    async def run(self, given: AsyncIterator[Input], *, leaves: bool) -> AsyncIterator[tuple[str, bytes]]:
        """Yield ("stdout" or "stderr", bytes) until the container ends, while what comes from `given` goes in.

        The end of `given` ends the input; or, where it `leaves`, all of this, and `left` is true.
        """
        feeding = asyncio.ensure_future(self._feed(given, leaves=leaves))
        try:
            with suppress(ConnectionResetError):
                while data := await asyncio.get_running_loop().sock_recv(self._connection, 1 << 16):
                    yield _STREAMS.get(data[0], "stdout"), data[1:]
            if feeding.done():
                feeding.result()
        finally:
            feeding.cancel()
            await asyncio.wait([feeding])
            self.close()

    def close(self) -> None:
        """Leave; the container goes on."""
        self._connection.close()

    async def _feed(self, given: AsyncIterator[Input], *, leaves: bool) -> None:
        loop = asyncio.get_running_loop()
        try:
            async for each in given:
                if isinstance(each, Size):
                    self._resize(each)
                    continue
                for start in range(0, len(each), _MOST):
                    await loop.sock_sendall(self._connection, each[start : start + _MOST])
            self.left = leaves
            self._connection.shutdown(socket.SHUT_RDWR if leaves else socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        except NetstoreError:
            self._connection.shutdown(socket.SHUT_RDWR)  # `run` ends, and raises it
            raise

    def _resize(self, size: Size) -> None:
        """Set the size of the window; nothing happens when the container has ended."""
        with suppress(OSError), closing(os.open(self._directory / "ctl", os.O_WRONLY | os.O_NONBLOCK)) as control:
            os.write(control, f"1 {size.rows} {size.columns}\n".encode())


class Attaching:
    """Clients that attach before the container runs: they are connected before its process starts."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[Attached]]] = {}

    def expect(self, container_id: str) -> asyncio.Future[Attached]:
        """Return what is connected when the container is started; one that is cancelled is forgotten."""
        future: asyncio.Future[Attached] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(container_id, set())
        waiting.add(future)
        future.add_done_callback(waiting.discard)
        return future

    async def connect(self, container_id: str, directory: Path) -> None:
        """Connect those who wait for a container, which is created and not started. Who cannot be connected is told."""
        for future in list(self._waiting.pop(container_id, ())):
            try:
                attached = await Attached.open(directory)
            except FailedPrecondition as error:
                if not future.done():
                    future.set_exception(error)
                continue
            if future.done():  # its client left meanwhile
                attached.close()
            else:
                future.set_result(attached)

    def refuse(self, container_id: str, why: str) -> None:
        """Tell those who wait for a container that it will not run."""
        for future in list(self._waiting.pop(container_id, ())):
            if not future.done():
                future.set_exception(FailedPrecondition(why, reason="NOT_RUNNING"))


async def read_terminal(master: int) -> AsyncGenerator[bytes, None]:
    """Yield what is written to a terminal until nobody has it open; `master` is closed."""
    reader, transport = await open_reader(master)
    try:
        while data := await reader.read(1 << 15):
            yield data
    except OSError as error:
        if error.errno != errno.EIO:  # how a terminal says that its other end is closed
            raise
    finally:
        transport.close()
