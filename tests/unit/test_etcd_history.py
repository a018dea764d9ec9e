"""What tells an etcd that went on from one that was made from a backup."""

from __future__ import annotations

import pytest

from netstore.store.etcd import History

KNOWN = History(cluster=7, term=3, revision=100)


@pytest.mark.parametrize(
    ("now", "goes_on"),
    [
        (KNOWN, True),
        (History(7, 4, 120), True),
        (History(7, 3, 99), False),
        (History(7, 2, 120), False),  # restored, and then others wrote more than was lost
        (History(8, 9, 900), False),
    ],
)
def test_nothing_goes_back(now: History, goes_on: bool) -> None:
    assert now.goes_on(KNOWN) is goes_on
