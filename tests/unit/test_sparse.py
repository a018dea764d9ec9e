"""Maps of sparse members: what GNU tar writes is read, what strangers write is refused."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstore.archive.sparse import read_map, real_size


def written(extents: list[tuple[int, int]]) -> bytes:
    text = "".join(f"{number}\n" for number in [len(extents), *(each for pair in extents for each in pair)]).encode()
    return text + bytes(-len(text) % 512)


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(0, 1 << 40)), max_size=100))
def test_what_is_written_is_read(gaps: list[tuple[int, int]]) -> None:
    extents, position = [], 0
    for gap, length in gaps:
        extents.append((position + gap, length))
        position += gap + length
    data = written(extents)
    stored = len(data) + sum(length for _, length in extents)
    assert read_map(io.BytesIO(data).read, position, stored) == extents


@given(st.binary(max_size=2048), st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_anything_else_is_refused(data: bytes, size: int, stored: int) -> None:
    source = io.BytesIO(data)
    try:
        extents = read_map(source.read, size, stored)
    except ValueError:
        return
    assert all(offset + length <= size for offset, length in extents)
    assert sum(length for _, length in extents) <= stored


@pytest.mark.parametrize(
    "extents", [[(5, 5), (0, 1)], [(0, 10), (5, 1)], [(90, 20)], [(0, 1 << 70)]],
)  # fmt: skip
def test_maps_that_lie(extents: list[tuple[int, int]]) -> None:
    data = written(extents)
    with pytest.raises(ValueError, match="map"):
        read_map(io.BytesIO(data).read, 100, len(data) + sum(length for _, length in extents))


def test_formats() -> None:
    new = {"GNU.sparse.major": b"1", "GNU.sparse.minor": b"0", "GNU.sparse.realsize": b"7"}
    assert real_size(new) == 7
    assert real_size({"mtime": b"1"}) is None
    for records in ({**new, "GNU.sparse.minor": b"1"}, {"GNU.sparse.map": b"0,1"}, {**new, "GNU.sparse.realsize": b"-1"},
                    {**new, "GNU.sparse.realsize": b"x"}):  # fmt: skip
        with pytest.raises(ValueError, match=r"."):
            real_size(records)
