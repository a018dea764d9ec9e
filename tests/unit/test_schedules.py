"""When snapshots are due."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstore.durations import parse_duration
from netstore.volumes.schedules import Schedule


def moment(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("schedule", "after", "due"),
    [
        ("@hourly", "2026-11-25T07:00:00", "2026-11-25T08:00:00"),
        ("@daily", "2026-12-31T07:00:01", "2027-01-01T00:00:00"),
        ("@weekly", "2026-11-25T07:00:00", "2026-11-29T00:00:00"),
        ("@every 15m", "2026-11-25T07:00:07", "2026-11-25T07:15:07"),
        ("*/20 * * * *", "2026-11-25T07:40:30", "2026-11-25T08:00:00"),
        ("30 6 * * mon-fri", "2026-11-27T07:00:00", "2026-11-30T06:30:00"),
        ("0 0 29 feb *", "2026-11-25T07:00:00", "2028-02-29T00:00:00"),
        ("0 12 13 * 5", "2026-11-25T07:00:00", "2026-11-27T12:00:00"),  # the 13th, or a Friday
        ("0 0 * * 7", "2026-11-25T07:00:00", "2026-11-29T00:00:00"),
        ("5,10-12 3 * * *", "2026-11-25T03:05:00", "2026-11-25T03:10:00"),
    ],
)
def test_due(schedule: str, after: str, due: str) -> None:
    assert Schedule.parse(schedule).after(moment(after)) == moment(due)


@pytest.mark.parametrize(
    "text", ["", "@often", "@every", "@every 0s", "@every x", "* * * *", "60 * * * *", "*/0 * * * *", "5-1 * * * *",
             "0 0 31 2 *", "a * * * *", "* * * * * *", "-1 * * * *", "1.5 * * * *"],
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Schedule.parse(text)


_FIELD = st.one_of(st.just("*"), st.integers(1, 12).map(str), st.integers(1, 6).map(lambda n: f"*/{n}"))


@given(st.tuples(*[_FIELD] * 5), st.floats(0, 4e9))
def test_the_next_is_later_and_a_whole_minute(fields: tuple[str, ...], after: float) -> None:
    try:
        schedule = Schedule.parse(" ".join(fields))
    except ValueError:
        return
    due = schedule.after(after)
    assert due > after
    assert due % 60 == 0
    assert schedule.after(due - 1) == due


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for parse in (Schedule.parse, parse_duration):
        try:
            parse(text)
        except ValueError:
            continue


def test_durations() -> None:
    assert (parse_duration("90s"), parse_duration("1h30m"), parse_duration("2w")) == (90, 5400, 1209600)
