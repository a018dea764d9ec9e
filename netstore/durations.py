"""Durations as people write them."""

from __future__ import annotations

import re

__all__ = ["parse_duration"]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as 90s, 15m, 24h, 7d or 1h30m.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"([0-9]{1,9}[smhdw])+", text):
        raise ValueError("a duration such as 15m, 24h or 7d")
    return float(sum(int(count) * _UNITS[unit] for count, unit in re.findall(r"([0-9]+)([smhdw])", text)))
