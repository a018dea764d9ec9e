"""A clock of its own for a process, set while it runs (libfaketime); what counts seconds goes on evenly."""

from __future__ import annotations

from pathlib import Path

__all__ = ["LIBRARY", "environment", "shift"]

LIBRARY = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)


def environment(place: Path) -> list[str]:
    """Return what a program is given, whose clock `shift` sets in this directory."""
    return [
        f"LD_PRELOAD={LIBRARY}", f"FAKETIME_TIMESTAMP_FILE={place}/clock", "FAKETIME_NO_CACHE=1",
        "FAKETIME_DONT_FAKE_MONOTONIC=1", "NO_FAKE_STAT=1",
    ]  # fmt: skip


def shift(place: Path, days: int) -> None:
    """Set the clock so far from the right time."""
    (place / "next").write_text(f"{days:+}d\n")
    (place / "next").rename(place / "clock")
