"""What is cut short, or fails, in the middle takes back what it did, and no more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from netstore.errors import Exhausted
from netstore.launcher.images import catalogue
from netstore.launcher.images.catalogue import Images
from netstore.model import Volume, VolumeSpec
from netstore.store import Store
from netstore.volumes import rows
from netstore.volumes.manager import VolumeManager


async def test_an_import_whose_caller_went_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the lock as long as its thread works, and leaves no layer."""
    store = Store(tmp_path / "netstore.db")
    images, begun, go_on = Images(store, tmp_path), threading.Event(), threading.Event()

    def work(_: Path, layers: Any, **__: object) -> list[object]:
        begun.set()
        assert go_on.wait(30)
        layers.path("c" * 64).mkdir()
        return []

    async def chunks() -> AsyncIterator[bytes]:
        yield b"archive"

    await images.start()
    monkeypatch.setattr(catalogue, "import_archive", work)
    calling = asyncio.ensure_future(images.import_archive(chunks(), name="", format=None, config=None))
    assert await asyncio.to_thread(begun.wait, 30)
    calling.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    held = images._lock.locked()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert held
    assert list((tmp_path / "layers").iterdir()) == []
    await store.close()


async def test_a_size_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels that somebody gave meanwhile stay, and what was asked together with the size goes."""
    store, loop = Store(tmp_path / "netstore.db"), asyncio.get_running_loop()
    volumes = VolumeManager(store, tmp_path)
    made = Volume(id="d" * 64, name="v", spec=VolumeSpec(size_bytes=1 << 20), labels={"a": "1"})
    await store.write(lambda tx: tx.volumes.insert(made))

    def resize(*_: object) -> None:
        changed = volumes.update(made.id, "", labels={"a": "2"}, spec={})
        asyncio.run_coroutine_threadsafe(changed, loop).result(30)
        raise Exhausted("no space")

    driver = SimpleNamespace(resize=resize)
    monkeypatch.setattr(volumes, "driver_of", lambda _: driver)
    monkeypatch.setattr(
        "netstore.volumes.manager.changed_spec", lambda _, volume, spec, **__: replace(volume.spec, **spec)
    )
    with pytest.raises(Exhausted):
        await volumes.update(made.id, "", spec={"size_bytes": 2 << 20, "snapshot_keep": 3})
    present = await store.read(lambda tx: rows.by_name(tx, "v"))
    assert present
    assert (present.labels, present.spec) == ({"a": "2"}, made.spec)
    await store.close()
