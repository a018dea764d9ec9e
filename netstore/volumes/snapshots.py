"""Snapshots of volumes: the rows, and who may do what when. How data is copied is `copies`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from netstore.errors import AlreadyExists, FailedPrecondition, InUse, NotFound
from netstore.model import Finding, Kind, Snapshot, Volume, new_id
from netstore.store import Store, Transaction
from netstore.threads import in_thread
from netstore.volumes.copies import Taken, drop, put_back, sweep, take, taken
from netstore.volumes.drivers.base import VolumeDriver
from netstore.volumes.staging import Staging

__all__ = ["Snapshots", "refuse_filling"]


class Snapshots:
    """The snapshots of a node's volumes."""

    def __init__(self, store: Store, drivers: Mapping[str, VolumeDriver], staging: Staging) -> None:
        self._store = store
        self._drivers = drivers
        self._staging = staging

    async def create(
        self, reference: str, name: str, *, labels: Mapping[str, str], request_id: str = "", scheduled: bool = False
    ) -> tuple[Snapshot, Volume]:
        """Make a snapshot; an empty name is made from the time.

        Raises:
            NotFound: no such volume.
            AlreadyExists: the volume has a snapshot of that name.
            Exhausted: no space is left.
        """
        made = await self._store.read(lambda tx: tx.answered(request_id, "CreateSnapshot"))
        if made:
            return await self.get(reference, made[0])
        now = time.time()
        name = name or time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
        volume = await self._store.read(lambda tx: _ready(tx, reference))
        snapshot = Snapshot(
            id=new_id(), name=name, volume_id=volume.id, labels=dict(labels), scheduled=scheduled, create_time=now
        )
        driver = self._drivers[volume.spec.driver]
        async with self._staging.alone(volume):
            await self._store.read(lambda tx: _refuse_taken(tx, volume, name))
            used = bool(self._staging.holders(volume.id))
            found = await in_thread(take, driver, volume, snapshot.id, used=used)
            try:
                snapshot = await self._store.write(lambda tx: _insert(tx, volume, snapshot, found, request_id))
            except BaseException:
                await in_thread(drop, driver, volume, snapshot.id)
                raise
        return snapshot, volume

    @asynccontextmanager
    async def passing(self, volume: Volume) -> AsyncIterator[tuple[str, Taken]]:
        """Keep a snapshot for as long as the block runs; yields its id. It has no row: when we are killed, the next
        start removes it. Who asks holds the volume as "export …" meanwhile, so that nobody takes it for a leftover.

        Raises:
            Exhausted: no space is left.
        """
        driver, snapshot_id = self._drivers[volume.spec.driver], new_id()
        try:
            async with self._staging.alone(volume):
                found = await in_thread(take, driver, volume, snapshot_id, used=True)
            yield snapshot_id, found
        finally:
            async with self._staging.alone(volume):
                await in_thread(drop, driver, volume, snapshot_id)

    async def get(self, reference: str, snapshot: str) -> tuple[Snapshot, Volume]:
        """Return a snapshot, by its name or the beginning of its id, and its volume."""
        return await self._store.read(lambda tx: find(tx, reference, snapshot))

    async def all(self, reference: str = "") -> list[tuple[Snapshot, Volume]]:
        """Return the snapshots of a volume, or of all, oldest first."""

        def read(tx: Transaction) -> list[tuple[Snapshot, Volume]]:
            if reference:
                volume = tx.volumes.find(reference)
                return [(each, volume) for each in tx.snapshots.all("volume_id = ?", volume.id)]
            volumes = {volume.id: volume for volume in tx.volumes.all("id IN (SELECT volume_id FROM snapshots)")}
            return [(each, volumes[each.volume_id]) for each in tx.snapshots.all() if each.volume_id in volumes]

        return await self._store.read(read)

    async def delete(self, reference: str, snapshot: str) -> None:
        """Remove a snapshot.

        Raises:
            NotFound: there is none.
            InUse: it is being exported.
        """
        wanted, volume = await self.get(reference, snapshot)
        async with self._staging.alone(volume):
            self._refuse_read(volume, wanted)

            def remove(tx: Transaction) -> None:
                tx.event(Kind.SNAPSHOT, "remove", wanted.id, f"{volume.name}@{wanted.name}", volume=volume.id)
                tx.snapshots.delete(wanted.id)

            await self._store.write(remove)
            await in_thread(drop, self._drivers[volume.spec.driver], volume, wanted.id)

    def _refuse_read(self, volume: Volume, snapshot: Snapshot) -> None:
        if any(holder.endswith(snapshot.id) for holder in self._staging.holders(volume.id)):
            raise InUse(f"snapshot {volume.name}@{snapshot.name} is being read", hint="try again when that has ended")

    async def restore(self, reference: str, snapshot: str) -> Volume:
        """Make a volume's data that of a snapshot, in one step, once all of it is there.

        Raises:
            InUse: somebody uses the volume.
        """
        wanted, volume = await self.get(reference, snapshot)
        async with self._staging.alone(volume):
            volume = await self._store.read(lambda tx: _ready(tx, volume.id))
            if holders := self._staging.holders(volume.id):
                names = ", ".join(await self._store.read(lambda tx: _names(tx, holders)))
                raise InUse(
                    f"volume {volume.name} is in use by {names}", hint="stop what uses it, then restore", users=names
                )
            await in_thread(put_back, self._drivers[volume.spec.driver], volume, wanted.id)

            def note(tx: Transaction) -> Volume:
                revision = tx.event(Kind.VOLUME, "restore", volume.id, volume.name, snapshot=wanted.name)
                restored = replace(tx.volumes.require(volume.id), revision=revision)
                tx.volumes.update(restored)
                return restored

            return await self._store.write(note)

    async def check(self, volumes: Sequence[Volume], *, repair: bool) -> list[Finding]:
        """Remove what a crash left of copies, and rows whose snapshot is gone."""
        known: dict[str, set[str]] = {}
        for row in await self._store.read(lambda tx: tx.snapshots.all()):
            known.setdefault(row.volume_id, set()).add(row.id)
        findings = []
        for volume in await in_thread(self._suspects, volumes, known):
            driver = self._drivers[volume.spec.driver]
            if any(holder.startswith("export ") for holder in self._staging.holders(volume.id)):
                continue  # a snapshot may be shown for it
            async with self._staging.alone(volume):
                mine = await self._ids(volume)
                details = await in_thread(sweep, driver, volume, mine, repair=repair)
            findings += [
                Finding(kind=Kind.VOLUME, resource_id=volume.id, name=volume.name, detail=each, repaired=repair)
                for each in details
            ]
        return findings + await self._check_rows(volumes, known, repair=repair)

    async def _ids(self, volume: Volume) -> set[str]:
        return {row.id for row in await self._store.read(lambda tx: tx.snapshots.all("volume_id = ?", volume.id))}

    def _suspects(self, volumes: Sequence[Volume], known: Mapping[str, set[str]]) -> list[Volume]:
        """Return volumes that have leftovers, or a copy that is being made now."""
        present = [volume for volume in volumes if volume.spec.driver in self._drivers and not volume.filling]
        return [
            volume for volume in present
            if sweep(self._drivers[volume.spec.driver], volume, known.get(volume.id, set()), repair=False)
        ]  # fmt: skip

    async def _check_rows(
        self, volumes: Sequence[Volume], known: Mapping[str, set[str]], *, repair: bool
    ) -> list[Finding]:
        """Find rows whose data is gone; a repair removes them."""
        findings = []
        for volume in volumes:
            driver = self._drivers.get(volume.spec.driver)
            if driver is None or not known.get(volume.id):
                continue
            gone = known[volume.id] - await in_thread(taken, driver, volume)
            for snapshot_id in gone:
                if repair:
                    await self._store.write(lambda tx, i=snapshot_id: tx.snapshots.delete(i))  # type: ignore[misc]
                detail = f"the data of snapshot {snapshot_id[:12]} is missing"
                findings.append(
                    Finding(
                        kind=Kind.SNAPSHOT, resource_id=snapshot_id, name=volume.name, detail=detail, repaired=repair
                    )
                )
        return findings


def find(tx: Transaction, reference: str, snapshot: str) -> tuple[Snapshot, Volume]:
    """Return a volume's snapshot by name, id or the beginning of its id, and the volume."""
    volume = tx.volumes.find(reference)
    for found in tx.snapshots.all("volume_id = ? AND name = ?", volume.id, snapshot):
        return found, volume
    found_by_id = [each for each in tx.snapshots.all("volume_id = ?", volume.id) if each.id.startswith(snapshot)]
    if len(found_by_id) != 1 or not snapshot:
        hint = f"`netstore volume snapshot ls {volume.name}` shows what there is"
        raise NotFound(Kind.SNAPSHOT, f"{volume.name}@{snapshot}", hint=hint)
    return found_by_id[0], volume


def refuse_filling(volume: Volume) -> Volume:
    """Return the volume, unless it is still being made from a copy or an archive.

    Raises:
        FailedPrecondition: it is.
    """
    if volume.filling:
        raise FailedPrecondition(
            f"volume {volume.name} is not there yet: {volume.filling}", hint="try again when that has ended",
            reason="NOT_READY",
        )  # fmt: skip
    return volume


def _ready(tx: Transaction, reference: str) -> Volume:
    return refuse_filling(tx.volumes.find(reference))


def _refuse_taken(tx: Transaction, volume: Volume, name: str) -> None:
    tx.volumes.require(volume.id)  # removed while we waited
    if tx.snapshots.count("volume_id = ? AND name = ?", volume.id, name):
        raise AlreadyExists(
            f"volume {volume.name} has a snapshot {name}", hint="choose another name, or remove that one first"
        )


def _insert(tx: Transaction, volume: Volume, snapshot: Snapshot, found: Taken, request_id: str) -> Snapshot:
    revision = tx.event(Kind.SNAPSHOT, "create", snapshot.id, f"{volume.name}@{snapshot.name}", volume=volume.id)
    snapshot = replace(
        snapshot, consistency=found.consistency, frozen_seconds=found.frozen_seconds, size_bytes=found.size_bytes,
        revision=revision,
    )  # fmt: skip
    tx.snapshots.insert(snapshot)
    tx.answer(request_id, "CreateSnapshot", [snapshot.id])
    return snapshot


def _names(tx: Transaction, holders: frozenset[str]) -> list[str]:
    """Return the names of containers among who holds a volume, and what the others call themselves."""
    return sorted(container.name if (container := tx.containers.get(each)) else each for each in holders)
