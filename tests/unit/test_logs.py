"""A container's log is read as conmon wrote it, whatever the container printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from netstore.launcher import logs
from netstore.launcher.logs import Line

STAMP = b"2026-11-29T07:00:00.000000000+00:00"


async def read(log: Path, tail: int | None = None, since: float = 0) -> list[Line]:
    return [line async for lines in logs.follow(log, tail=tail, since=since, ended=None) for line in lines]


async def test_a_return_in_what_is_printed_ends_no_line(tmp_path: Path) -> None:
    """A progress bar keeps what follows its returns, and nobody forges a line of the other stream."""
    printed = [b"10%\r50%\r", b"\r" + STAMP + b" stderr F forged", b"\r" + STAMP + b" \xff F no text"]
    log = tmp_path / "container.log"
    log.write_bytes(b"".join(STAMP + b" stdout F " + each + b"\n" for each in printed))
    lines = await read(log)
    assert lines == [Line(lines[0].time, "stdout", each + b"\n") for each in printed]
    assert await read(log, tail=1) == lines[-1:]


async def test_a_long_log_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the parts, all lines come, in order; of one that is being written nothing yet."""
    monkeypatch.setattr(logs, "_PART", 150)
    monkeypatch.setattr(logs, "_BLOCK", 70)
    log = tmp_path / "container.log"
    log.write_bytes(
        b"".join(b"%s stdout F %d\n" % (STAMP, number) for number in range(100)) + STAMP + b" stdout F half"
    )
    numbers = [b"%d\n" % number for number in range(100)]
    for tail in (None, 0, 1, 7, 99, 100, 1000):
        wanted = numbers if tail is None else numbers[len(numbers) - min(tail, 100) :]
        assert [line.data for line in await read(log, tail)] == wanted, tail
    when = (await read(log, tail=1))[0].time
    assert await read(log, since=when + 1) == []
    assert await read(tmp_path / "none.log") == []
