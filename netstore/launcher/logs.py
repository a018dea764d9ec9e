"""What containers print: conmon's log, one line for each piece (CRI log format: time, stream, F or P, text)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from netstore.kernel.inotify import Watch

__all__ = ["Line", "follow"]

_BLOCK = 1 << 16
_PART = 1 << 20


@dataclass(frozen=True, slots=True)
class Line:
    """One piece of output: seconds since the epoch, "stdout" or "stderr", the bytes with their newline."""

    time: float
    stream: str
    data: bytes


async def follow(
    path: Path, *, tail: int | None, since: float, ended: Awaitable[object] | None
) -> AsyncIterator[list[Line]]:
    """Yield the lines from `since` that are there, of the `tail` last ones alone, then, unless `ended` is None, those
    that come until it is done. What is there is read in parts: it may be more than memory.
    """
    offset, end = await asyncio.to_thread(_bounds, path, tail)
    before = -1
    while before < offset < end:
        before = offset
        lines, offset = await asyncio.to_thread(_read_from, path, before, since)
        yield lines
    if ended is None:
        return
    finished = asyncio.ensure_future(ended)
    try:
        try:
            path.touch()  # noqa: ASYNC240 (conmon makes it when the container starts)
        except FileNotFoundError:  # the container was removed meanwhile
            return
        with Watch(str(path)) as watch:
            while True:
                last, before = finished.done(), offset
                watch.changed.clear()
                lines, offset = await asyncio.to_thread(_read_from, path, before, since)
                if offset > before:
                    yield lines
                elif last:
                    return
                else:
                    changed = asyncio.ensure_future(watch.changed.wait())
                    await asyncio.wait([changed, finished], return_when=asyncio.FIRST_COMPLETED)
                    changed.cancel()
    finally:
        finished.cancel()


def _read_from(path: Path, offset: int, since: float) -> tuple[list[Line], int]:
    """Return whole lines, and where they end; a part of what is there, where that is much. Blocking."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(_PART)
    except FileNotFoundError:
        return [], offset
    whole = data[: data.rfind(b"\n") + 1]
    return [line for line in _lines(whole) if line.time >= since], offset + len(whole)


def _bounds(path: Path, tail: int | None) -> tuple[int, int]:
    """Return where the last `tail` whole lines begin, and where the log ends. Blocking."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            return (0 if tail is None else _begin(file.fileno(), end, tail)), end
    except FileNotFoundError:
        return 0, 0


def _begin(file: int, position: int, count: int) -> int:
    """Return where the last `count` lines before a position begin, searched from there."""
    left = count + 1  # line feeds: the one that ends the line before, too
    while position:
        step = min(_BLOCK, position)
        position -= step
        data = os.pread(file, step, position)
        found = data.count(b"\n")
        if found < left:
            left -= found
            continue
        at = len(data)
        for _ in range(left):
            at = data.rfind(b"\n", 0, at)
        return position + at + 1
    return 0


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
