"""What containers print: conmon's log, one line for each piece (CRI log format: time, stream, F or P, text)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from netstore.kernel.inotify import Watch

__all__ = ["Line", "follow", "read"]

_BLOCK = 1 << 16
_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Line:
    """One piece of output: seconds since the epoch, "stdout" or "stderr", the bytes with their newline."""

    time: float
    stream: str
    data: bytes


def read(path: Path, *, tail: int | None, since: float) -> tuple[list[Line], int]:
    """Return the lines from `since`, at most the `tail` last, and the offset behind them. Blocking."""
    try:
        with path.open("rb") as file:
            if tail is not None:
                _seek_to_tail(file.fileno(), tail)
            data = file.read() if tail != 0 else b""
            end = os.lseek(file.fileno(), 0, os.SEEK_END) if tail == 0 else file.tell()
    except FileNotFoundError:
        return [], 0
    whole = data[: data.rfind(b"\n") + 1]
    lines = [line for line in _lines(whole) if line.time >= since]
    return (lines[-tail:] if tail else lines), end - (len(data) - len(whole))


async def follow(
    path: Path, *, tail: int | None, since: float, ended: Awaitable[object] | None
) -> AsyncIterator[list[Line]]:
    """Yield lines that are there, then, unless `ended` is None, those that come until it is done."""
    lines, offset = await asyncio.to_thread(read, path, tail=tail, since=since)
    for start in range(0, len(lines), _AT_ONCE):
        yield lines[start : start + _AT_ONCE]
    if ended is None:
        return
    finished = asyncio.ensure_future(ended)
    try:
        try:
            path.touch()  # noqa: ASYNC240 (conmon makes it when the container starts)
        except FileNotFoundError:  # the container was removed meanwhile
            return
        with Watch(str(path)) as watch:
            last = False
            while True:
                last = finished.done()
                watch.changed.clear()
                lines, offset = await asyncio.to_thread(_read_from, path, offset)
                if lines:
                    yield lines
                elif last:
                    return
                else:
                    changed = asyncio.ensure_future(watch.changed.wait())
                    await asyncio.wait([changed, finished], return_when=asyncio.FIRST_COMPLETED)
                    changed.cancel()
    finally:
        finished.cancel()


def _read_from(path: Path, offset: int) -> tuple[list[Line], int]:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(1 << 20)
    except FileNotFoundError:
        return [], offset
    whole = data[: data.rfind(b"\n") + 1]
    return _lines(whole), offset + len(whole)


def _seek_to_tail(file: int, count: int) -> None:
    """Position a log before its last `count` whole lines, reading it from the end."""
    position = os.lseek(file, 0, os.SEEK_END)
    data = b""
    while position and data.count(b"\n") <= count:
        step = min(_BLOCK, position)
        position -= step
        data = os.pread(file, step, position) + data
    os.lseek(file, position, os.SEEK_SET)


def _lines(whole: bytes) -> list[Line]:
    """Return the pieces. A line feed alone ends one: what a container prints may hold returns, and lines like these."""
    return [line for each in whole.split(b"\n") if (line := _parse(each))]


def _parse(raw: bytes) -> Line | None:
    parts = raw.split(b" ", 3)
    if len(parts) < 3:
        return None
    try:
        moment = datetime.fromisoformat(parts[0].decode()[:26] + parts[0].decode()[29:]).timestamp()
    except ValueError:
        return None
    text = parts[3] if len(parts) == 4 else b""
    return Line(moment, parts[1].decode(), text + (b"\n" if parts[2] == b"F" else b""))
