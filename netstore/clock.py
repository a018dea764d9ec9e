"""How much time has passed, whatever became of the clock meanwhile: somebody sets it, NTP corrects it by a day."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

__all__ = ["boot_id", "since", "uptime"]


@cache
def boot_id() -> str:
    """Return what tells this start of the kernel from all others (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def uptime() -> float:
    """Return the seconds since the kernel started, those included in which it slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def since(moment: float, boot: str, up: float) -> float:
    """Return the seconds since a moment: `moment` is what the clock said then, in seconds since the epoch, `boot` and
    `up` what `boot_id` and `uptime` returned. After a reboot there is the clock alone; nothing is younger than now.
    """
    return uptime() - up if boot == boot_id() else max(0.0, time.time() - moment)
