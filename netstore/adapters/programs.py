"""The sockets on which programs (packaging/netstore-cni under its two names, `netstore hook`) hand over what engines
call them for.

A call is variables (NAME=VALUE), separated by NULs, two NULs, and what the engine wrote to the program's stdin; then
the program shuts its side down. The answer is the exit status, one digit, and what goes to stdout.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import structlog

from netstore.adapters.sockets import bind_private, unbind

__all__ = ["Adapter", "Defect", "Late", "Refusal", "TooLong", "serve"]

_MOST, _BACKLOG = 4 << 20, 4096
_READ_SECONDS, _FINISH_SECONDS = 30.0, 10.0

log = structlog.get_logger(__name__)


class Refusal(Exception):
    """A call that failed: what happened, and details or a hint."""

    def __init__(self, msg: str, details: str = "") -> None:
        super().__init__(msg)
        self.msg, self.details = msg, details


class Late(Refusal):
    """The call did not arrive whole."""


class TooLong(Refusal):
    """The call is longer than any can be."""


class Defect(Refusal):
    """What ought not to happen."""


class Adapter(Protocol):
    """What a protocol makes of a call."""

    async def answer(self, variables: Mapping[str, str], body: bytes) -> bytes:
        """Carry out a call and return what is printed.

        Raises:
            Refusal: it failed.
        """

    def describe(self, refusal: Refusal, body: bytes) -> bytes:
        """Return what is printed of a failure; `body` is b"" where it could not be read."""


@asynccontextmanager
async def serve(adapter: Adapter, path: Path) -> AsyncIterator[None]:
    """Answer calls on a socket that is root's alone. In the end what has begun runs to its end."""
    server = _Server(adapter, path.stem)
    listening = await asyncio.start_unix_server(server.answer, sock=bind_private(path), backlog=_BACKLOG)
    try:
        yield
    finally:
        listening.close()
        unbind(path)
        await server.finish()


class _Server:
    def __init__(self, adapter: Adapter, name: str) -> None:
        self._adapter = adapter
        self._name = name
        self._running: set[asyncio.Task[Any]] = set()

    async def finish(self) -> None:
        """Wait for the calls that are carried out, for a while."""
        if self._running:
            await asyncio.wait(self._running, timeout=_FINISH_SECONDS)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one call. One whose caller goes away runs to its end all the same."""
        task = asyncio.current_task()
        assert task
        self._running.add(task)
        try:
            status, printed = await self._call(reader)
            with contextlib.suppress(ConnectionError):
                writer.write(b"%d" % status + printed)
                await writer.drain()
        finally:
            self._running.discard(task)
            writer.close()

    async def _call(self, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        body = b""
        try:
            variables, body = await _read(reader)
            command = next((value for name, value in variables.items() if name.endswith("_COMMAND")), "")
            structlog.contextvars.bind_contextvars(method=f"{self._name} {command[:10]}")
            return 0, await self._adapter.answer(variables, body)
        except Refusal as error:
            refusal = error
            log.info("refused", error=error.msg, details=error.details)
        except Exception as error:
            refusal = Defect(f"a defect in netstored: {type(error).__name__}: {error}", "please report it")
            log.exception("defect")
        return 1, self._adapter.describe(refusal, body)


async def _read(reader: asyncio.StreamReader) -> tuple[dict[str, str], bytes]:
    """Read a call to its end; of one that is too long the rest is thrown away, so that its sender hears the answer."""
    data = bytearray()
    try:
        async with asyncio.timeout(_READ_SECONDS):
            while chunk := await reader.read(1 << 16):
                if len(data) <= _MOST:
                    data += chunk
    except TimeoutError as error:
        raise Late(f"the call did not arrive within {_READ_SECONDS:g} s") from error
    if len(data) > _MOST:
        raise TooLong(f"the input is longer than {_MOST >> 20} MiB")
    head, _, body = bytes(data).partition(b"\0\0")
    pairs = (each.partition("=") for each in head.decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs}, body
