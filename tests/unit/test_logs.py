"""A container's log is read as conmon wrote it, whatever the container printed."""

from __future__ import annotations

from pathlib import Path

from netstore.launcher.logs import Line, read

STAMP = b"2026-11-29T07:00:00.000000000+00:00"


def test_a_return_in_what_is_printed_ends_no_line(tmp_path: Path) -> None:
    """A progress bar keeps what follows its returns, and nobody forges a line of the other stream."""
    printed = [b"10%\r50%\r", b"\r" + STAMP + b" stderr F forged", b"\r" + STAMP + b" \xff F no text"]
    log = tmp_path / "container.log"
    log.write_bytes(b"".join(STAMP + b" stdout F " + each + b"\n" for each in printed))
    lines, end = read(log, tail=None, since=0)
    assert lines == [Line(lines[0].time, "stdout", each + b"\n") for each in printed]
    assert end == log.stat().st_size
    assert read(log, tail=1, since=0)[0] == lines[-1:]
