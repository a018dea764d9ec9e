"""When a volume's snapshots are due: @hourly and its like, "@every 15m", or five fields of cron (crontab(5)), UTC."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from netstore.durations import parse_duration

__all__ = ["ACCEPTED", "Schedule"]

ACCEPTED = '@hourly, @daily, @weekly, @monthly, "@every 15m", or cron\'s five fields such as "30 */6 * * 1-5"'
_WORDS = {
    "@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *",
}  # fmt: skip
_RANGES = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
_NAMES: Sequence[Sequence[str]] = (
    (), (), (), ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
    ("sun", "mon", "tue", "wed", "thu", "fri", "sat"),
)  # fmt: skip
_PART = re.compile(r"(\*|\w+)(?:-(\w+))?(?:/([0-9]{1,2}))?")
_YEARS = 8  # 29 February comes back within them


@dataclass(frozen=True, slots=True)
class Schedule:
    """Either an interval in seconds, or the sets of minutes, hours, days, months and weekdays (0 is Sunday)."""

    interval: float
    fields: tuple[frozenset[int], ...] = ()
    either_day: bool = False

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Parse a schedule.

        Raises:
            ValueError: it is none, or never due.
        """
        if text.startswith("@every "):
            interval = parse_duration(text.removeprefix("@every ").strip())
            if not interval:
                raise ValueError("an interval above zero")
            return cls(interval)
        words = _WORDS.get(text, text).split()
        if len(words) != len(_RANGES):
            raise ValueError("five fields")
        fields = tuple(_field(word.lower(), index) for index, word in enumerate(words))
        weekdays = frozenset(day % 7 for day in fields[4])
        # crontab(5): where both days are given, either will do.
        schedule = cls(0.0, (*fields[:4], weekdays), words[2][0] != "*" and words[4][0] != "*")
        schedule.after(0.0)
        return schedule

    def after(self, moment: float) -> float:
        """Return when it is due next after a moment, both in seconds since the epoch.

        Raises:
            ValueError: never.
        """
        if self.interval:
            return moment + self.interval
        minutes, hours, _, months, _ = self.fields
        at = datetime.fromtimestamp(moment, UTC).replace(second=0, microsecond=0) + timedelta(minutes=1)
        last = at.year + _YEARS
        while at.year <= last:
            if at.month not in months:
                at = (at.replace(day=1, hour=0, minute=0) + timedelta(days=32)).replace(day=1)
            elif not self._day(at):
                at = at.replace(hour=0, minute=0) + timedelta(days=1)
            elif at.hour not in hours:
                at = at.replace(minute=0) + timedelta(hours=1)
            elif at.minute not in minutes:
                at += timedelta(minutes=1)
            else:
                return at.timestamp()
        raise ValueError("a day that comes")

    def _day(self, at: datetime) -> bool:
        days, weekdays = at.day in self.fields[2], at.isoweekday() % 7 in self.fields[4]
        return days or weekdays if self.either_day else days and weekdays


def _field(text: str, index: int) -> frozenset[int]:
    low, high = _RANGES[index]
    found: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is no part of a schedule")
        step = int(match[3] or 1)
        if match[1] == "*":
            first, last = low, high
        else:
            first = _number(match[1], index)
            last = _number(match[2], index) if match[2] else high if match[3] else first
        if not (low <= first <= last <= high) or not step:
            raise ValueError(f"{part!r} is not within {low} to {high}")
        found.update(range(first, last + 1, step))
    return frozenset(found)


def _number(text: str, index: int) -> int:
    names = _NAMES[index]
    if text in names:
        return names.index(text) + (1 if index == 3 else 0)
    if not text.isdigit():
        raise ValueError(f"{text!r} is no number")
    return int(text)
