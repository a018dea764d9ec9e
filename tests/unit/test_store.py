"""The store: durable, isolated, shared commits, events, migrations."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path

import pytest

from netstore.errors import InvalidArgument, NetstoreError, NotFound
from netstore.model import Kind, Volume, VolumeSpec
from netstore.store import Store, Transaction


@pytest.fixture
async def store(tmp_path: Path):
    store = Store(tmp_path / "netstore.db")
    yield store
    await store.close()


def add(tx: Transaction, name: str, volume_id: str = "") -> None:
    revision = tx.event(Kind.VOLUME, "create", volume_id or name, name)
    tx.volumes.insert(Volume(id=volume_id or name, name=name, spec=VolumeSpec(), revision=revision))


async def test_one_refusal_undoes_only_its_own_work(store: Store) -> None:
    await store.write(lambda tx: add(tx, "taken"))

    def fail(tx: Transaction) -> None:
        add(tx, "half")
        raise InvalidArgument("x", 1, "2")

    results = await asyncio.gather(
        *(store.write(lambda tx, i=i: add(tx, f"v{i}")) for i in range(20)), store.write(fail),
        store.write(lambda tx: add(tx, "taken")), return_exceptions=True,
    )  # fmt: skip
    assert isinstance(results[20], InvalidArgument)
    assert isinstance(results[21], NetstoreError)
    names = [volume.name for volume in await store.read(lambda tx: tx.volumes.all())]
    assert names[0] == "taken"
    assert sorted(names[1:]) == sorted(f"v{i}" for i in range(20))


async def test_a_read_sees_one_moment(store: Store) -> None:
    between, committed = threading.Event(), threading.Event()

    def twice(tx: Transaction) -> tuple[int, int]:
        before = tx.volumes.count()
        between.set()
        assert committed.wait(10)
        return before, tx.volumes.count()

    reading = asyncio.create_task(store.read(twice))
    await asyncio.to_thread(between.wait, 10)
    await store.write(lambda tx: add(tx, "late"))
    committed.set()
    assert await reading == (0, 0)
    assert await store.read(lambda tx: tx.volumes.count()) == 1


async def test_what_was_answered_is_there_after_reopening(tmp_path: Path) -> None:
    first = Store(tmp_path / "netstore.db")
    await first.write(lambda tx: add(tx, "kept"))
    await first.close()
    second = Store(tmp_path / "netstore.db")
    assert await second.read(lambda tx: tx.volumes.count()) == 1
    await second.close()


async def test_find_by_name_id_and_prefix(store: Store) -> None:
    await store.write(lambda tx: add(tx, "one", "abc1" * 16))
    await store.write(lambda tx: add(tx, "two", "abc2" * 16))
    assert (await store.read(lambda tx: tx.volumes.find("one"))).name == "one"
    assert (await store.read(lambda tx: tx.volumes.find("abc2"))).name == "two"
    with pytest.raises(InvalidArgument, match="several"):
        await store.read(lambda tx: tx.volumes.find("abc"))
    with pytest.raises(NotFound):
        await store.read(lambda tx: tx.volumes.find("nobody"))


async def test_changed_tells_of_a_commit(store: Store) -> None:
    changed = store.changed()
    await store.write(lambda tx: add(tx, "v"))
    await asyncio.wait_for(changed, 1)
    assert [event.resource_name for event in await store.read(lambda tx: tx.events(0, 10))] == ["v"]


async def test_backup_is_a_whole_database(store: Store, tmp_path: Path) -> None:
    await store.write(lambda tx: add(tx, "v"))
    await store.backup(tmp_path / "copy.db")
    connection = sqlite3.connect(tmp_path / "copy.db")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert connection.execute("SELECT name FROM volumes").fetchall() == [("v",)]
    connection.close()


async def test_newer_schema_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "netstore.db")
    await store.write(lambda tx: tx.execute("PRAGMA user_version"))
    await store.close()
    connection = sqlite3.connect(tmp_path / "netstore.db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(NetstoreError, match="schema 99"):
        Store(tmp_path / "netstore.db")
