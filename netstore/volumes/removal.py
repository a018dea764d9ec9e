"""How volumes go: at once, into the trash for a while, or many by a rule. Never one that is used."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from netstore import clock
from netstore.errors import AlreadyExists, InUse, InvalidArgument, NotFound
from netstore.model import Kind, TrashedVolume, Volume
from netstore.store import Store, Transaction
from netstore.threads import in_thread
from netstore.volumes import rows
from netstore.volumes.drivers.base import VolumeDriver
from netstore.volumes.snapshots import refuse_filling
from netstore.volumes.staging import Staging

__all__ = ["Pruned", "Removal"]


@dataclass(frozen=True, slots=True)
class Pruned:
    """A volume that a prune removes, and the bytes that it takes."""

    volume: Volume
    size_bytes: int


class Removal:
    """Removes the volumes of a node. `keep_seconds` is how long they stay in the trash unless the caller says."""

    def __init__(
        self, store: Store, drivers: Mapping[str, VolumeDriver], staging: Staging, *, keep_seconds: float
    ) -> None:
        self._store = store
        self._drivers = drivers
        self._staging = staging
        self._keep_seconds = keep_seconds
        self.expire: Callable[[], Awaitable[bool]] | None = None  # forgets mounts in namespaces that are gone

    async def delete(self, reference: str, *, keep_seconds: float | None = 0.0) -> None:
        """Remove a volume, its snapshots and its data; `keep_seconds` above 0 puts it in the trash for that long; None
        for as long as is configured.

        Raises:
            NotFound: there is none.
            InUse: a container mounts it, running or not; an engine holds it; it is being exported.
        """
        keep = self._keep_seconds if keep_seconds is None else keep_seconds

        def remove(tx: Transaction) -> Volume:
            return self._remove(tx, tx.volumes.find(reference), keep)

        try:
            volume = await self._store.write(remove)
        except InUse:
            if self.expire is None or not await self.expire():
                raise
            volume = await self._store.write(remove)
        await self._drop(volume, keep=keep > 0)

    async def _drop(self, volume: Volume, *, keep: bool) -> None:
        driver = self._drivers[volume.spec.driver]
        async with self._staging.alone(volume):
            self._staging.forget(volume.id)
            await in_thread(driver.unstage if keep else driver.remove, volume)

    def _remove(self, tx: Transaction, volume: Volume, keep: float) -> Volume:
        refuse_filling(volume)
        self._refuse_used(tx, volume)
        revision = tx.event(Kind.VOLUME, "trash" if keep else "remove", volume.id, volume.name)
        if keep:
            now = time.time()
            tx.trash.insert(TrashedVolume(
                volume=volume, remove_time=now, expire_time=now + keep, revision=revision,
                boot=clock.boot_id(), uptime=clock.uptime(),
            ))  # fmt: skip
        else:
            tx.execute("DELETE FROM snapshots WHERE volume_id = ?", volume.id)
        tx.volumes.delete(volume.id)
        return volume

    def _refuse_used(self, tx: Transaction, volume: Volume) -> None:
        if any(holder.startswith("export ") for holder in self._staging.holders(volume.id)):
            raise InUse(f"volume {volume.name} is being exported", hint="try again when that has ended")
        _, containers = rows.used(tx, volume)
        if containers:
            names = ", ".join(containers)
            raise InUse(
                f"volume {volume.name} is in use by {names}", hint="remove the containers, or unmount it, first",
                containers=names,
            )  # fmt: skip
        if holders := ", ".join(row[0] for row in tx.rows(rows.HOLDERS, volume.id)):
            raise InUse(f"volume {volume.name} is held staged by {holders}", hint="unstage it first", holders=holders)

    async def prune(
        self, candidates: Sequence[Volume], *, dry_run: bool, keep_seconds: float | None = None
    ) -> list[Pruned]:
        """Remove those of the volumes that nobody uses, asked again for each in its transaction; returns them."""
        pruned = []
        for volume in candidates:
            size = await in_thread(self._drivers[volume.spec.driver].measure, volume)
            if not dry_run:
                try:
                    await self.delete(volume.id, keep_seconds=keep_seconds)
                except (InUse, NotFound):  # mounted, or removed, in between
                    continue
            pruned.append(Pruned(volume, size))
        return pruned

    async def trashed(self) -> list[TrashedVolume]:
        """Return what is in the trash, the oldest removal first."""
        return await self._store.read(lambda tx: tx.trash.all())

    async def restore(self, reference: str, name: str = "") -> Volume:
        """Bring a volume back from the trash, under its old name or another.

        Raises:
            NotFound: none in the trash goes by that name or id.
            AlreadyExists: the name is taken again.
        """

        def bring(tx: Transaction) -> Volume:
            trashed = _find(tx, reference)
            wanted = name or trashed.volume.name
            if rows.by_name(tx, wanted):
                raise AlreadyExists(f"volume {wanted} exists", hint="give another name to restore it by")
            tx.trash.delete(trashed.id)
            revision = tx.event(Kind.VOLUME, "restore", trashed.id, wanted)
            volume = replace(trashed.volume, name=wanted, revision=revision)
            tx.volumes.insert(volume)
            rows.note_schedule(tx, volume)
            return volume

        return await self._store.write(bring)

    async def empty(self, references: Sequence[str] = (), *, only_expired: bool = False) -> list[TrashedVolume]:
        """Remove what is in the trash for good: all of it, what is named, or what has been there long enough."""

        def take(tx: Transaction) -> list[TrashedVolume]:
            found = [_find(tx, each) for each in references] if references else tx.trash.all()
            found = [each for each in found if not only_expired or _is_expired(each)]
            for each in found:
                tx.event(Kind.VOLUME, "remove", each.id, each.volume.name)
                tx.execute("DELETE FROM snapshots WHERE volume_id = ?", each.id)
                tx.trash.delete(each.id)
            return found

        if only_expired and not any(_is_expired(each) for each in await self.trashed()):
            return []
        taken = await self._store.write(take)
        for each in taken:
            await self._drop(each.volume, keep=False)
        return taken


def _is_expired(trashed: TrashedVolume) -> bool:
    kept = clock.since(trashed.remove_time, trashed.boot, trashed.uptime)
    return kept >= trashed.expire_time - trashed.remove_time


def _find(tx: Transaction, reference: str) -> TrashedVolume:
    """Return the one in the trash that a name, an id or the beginning of one means; of a name, the last removed."""
    if not reference:
        raise InvalidArgument("volume", reference, "the name or id of a volume in the trash")
    named = tx.trash.all("name = ?", reference)
    if named:
        return named[-1]
    found = tx.trash.all("id >= ? AND id < ?", reference, reference + "g")
    if len(found) != 1:
        raise NotFound(Kind.VOLUME, f"{reference} in the trash", hint="`netstore volume trash ls` shows what there is")
    return found[0]
