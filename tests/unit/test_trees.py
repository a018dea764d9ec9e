"""Trees that a container can make and Python's own walks cannot take: deeper than its recursion, longer than PATH_MAX."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from netstore.kernel.files import files_below, remove_tree, tree_bytes
from netstore.kernel.paths import closing
from netstore.volumes.ownership import give
from netstore.volumes.trees import copy_tree

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


def make(place: Path, depth: int) -> Path:
    """Make a chain of directories with a file in the first and in the last."""
    place.mkdir()
    (place / "file").write_bytes(bytes(4096))
    descriptor = os.open(place, _DIRECTORY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=descriptor)
        inner = os.open("d", _DIRECTORY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(os.open("last", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    os.close(descriptor)
    return place


@pytest.fixture(params=[1500, 3000])  # as paths 3,000 and 6,000 characters
def deep(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    yield make(tmp_path / "deep", request.param)
    assert not (tmp_path / "deep").exists()


def test_a_deep_tree_is_measured_and_removed(deep: Path) -> None:
    os.link(deep / "file", deep / "twin")
    assert tree_bytes(deep) == 4096
    with closing(os.open(deep, os.O_PATH)) as top:
        give(top, 1000, 1000)
    assert {file.stat().st_uid for file in files_below(deep)} == {1000}
    with pytest.raises((RecursionError, OSError)):
        shutil.rmtree(deep)  # else this test is not needed any more
    remove_tree(deep)
    remove_tree(deep)  # what is gone is a success


def test_a_deep_tree_is_copied(tmp_path: Path) -> None:
    source = make(tmp_path / "source", 400)  # by recursion it was not
    (source / "d").chmod(0o2750)
    (tmp_path / "copy").mkdir()
    before = os.listdir("/proc/self/fd")
    with closing(os.open(source, _DIRECTORY)) as reading, closing(os.open(tmp_path / "copy", _DIRECTORY)) as writing:
        assert copy_tree(reading, writing) == 4096
    assert (tmp_path / "copy/d").stat().st_mode & 0o7777 == 0o2750
    assert sum(1 for _ in files_below(tmp_path / "copy")) == 2
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_what_vanishes_meanwhile_counts_nothing(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).write_bytes(bytes(4096))
    seen = files_below(tmp_path)
    next(seen)
    for name in ("one", "other"):
        (tmp_path / name).unlink()
    assert len(list(seen)) <= 1
    assert tree_bytes(tmp_path) == 0
    told: list[OSError] = []
    assert list(files_below(tmp_path / "nowhere", told.append)) == []
    assert len(told) == 1
