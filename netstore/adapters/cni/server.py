"""The socket on which the program netstore-cni hands its calls over.

A call is CNI's variables, separated by NULs, two NULs, and what the runtime wrote to the program's stdin; then the
program shuts its side down. The answer is the exit status, one digit, and what goes to stdout.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import structlog

from netstore.adapters.cni.messages import TRY_LATER, UNDECODABLE, VERSIONS, CniError, Named, decode
from netstore.adapters.cni.plugin import Plugin
from netstore.networks.manager import NetworkManager

__all__ = ["serve"]

_MOST, _BACKLOG = 4 << 20, 4096
_READ_SECONDS, _FINISH_SECONDS = 30.0, 10.0

log = structlog.get_logger(__name__)


@asynccontextmanager
async def serve(networks: NetworkManager, path: Path) -> AsyncIterator[None]:
    """Answer calls on a socket that is root's alone. In the end what has begun runs to its end."""
    server = _Server(Plugin(networks))
    listening = await asyncio.start_unix_server(server.answer, sock=_bind(path), backlog=_BACKLOG)
    try:
        yield
    finally:
        listening.close()
        _remove(path)
        await server.finish()


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _bind(path: Path) -> socket.socket:
    _remove(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    return listener


class _Server:
    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin
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
        version = VERSIONS[-1]
        try:
            variables, body = await _read(reader)
            structlog.contextvars.bind_contextvars(method=f"CNI {variables.get('CNI_COMMAND', '')[:10]}")
            version = _version(body)
            answer = await self._plugin.call(decode(variables, body))
        except CniError as error:
            log.info("refused", code=error.code, error=error.msg)
            return 1, msgspec.json.encode(error.encode(version))
        except Exception as error:
            log.exception("defect")
            failed = CniError(100, f"a defect in netstored: {type(error).__name__}: {error}", "please report it")
            return 1, msgspec.json.encode(failed.encode(version))
        return 0, msgspec.json.encode(answer) if answer is not None else b""


async def _read(reader: asyncio.StreamReader) -> tuple[dict[str, str], bytes]:
    """Read a call to its end; of one that is too long the rest is thrown away, so that its sender hears the answer."""
    data = bytearray()
    try:
        async with asyncio.timeout(_READ_SECONDS):
            while chunk := await reader.read(1 << 16):
                if len(data) <= _MOST:
                    data += chunk
    except TimeoutError as error:
        raise CniError(TRY_LATER, f"the call did not arrive within {_READ_SECONDS:g} s") from error
    if len(data) > _MOST:
        raise CniError(UNDECODABLE, f"the network configuration is longer than {_MOST >> 20} MiB")
    head, _, body = bytes(data).partition(b"\0\0")
    pairs = (each.partition("=") for each in head.decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs}, body


def _version(body: bytes) -> str:
    """Return the version in which an error is told: the configuration's, where it can be read and we know it."""
    try:
        version = msgspec.json.decode(body, type=Named).cni_version
    except (msgspec.DecodeError, RecursionError):
        return VERSIONS[-1]
    return version if version in VERSIONS else VERSIONS[-1]
