"""Volumes that are made with data in them: nobody can use them before they are whole, and half of one is never left."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

from netstore.errors import AlreadyExists, InvalidArgument
from netstore.model import Consistency, Kind, Volume, VolumeSpec
from netstore.store import Store, Transaction
from netstore.threads import in_thread
from netstore.volumes import rows
from netstore.volumes.copies import Taken, fill
from netstore.volumes.drivers.base import VolumeDriver
from netstore.volumes.sizes import prepared
from netstore.volumes.snapshots import Snapshots, refuse_filling
from netstore.volumes.staging import Staging

__all__ = ["Filling"]


class Filling:
    """Makes volumes from other volumes, snapshots and whatever the caller has."""

    def __init__(
        self, store: Store, drivers: Mapping[str, VolumeDriver], staging: Staging, snapshots: Snapshots
    ) -> None:
        self._store = store
        self._drivers = drivers
        self._staging = staging
        self._snapshots = snapshots

    async def answered(self, request_id: str, method: str) -> list[str]:
        """Return ids of what a request with that id made before."""
        return await self._store.read(lambda tx: tx.answered(request_id, method))

    def refuse(self, tx: Transaction, name: str) -> None:
        """Refuse a name that is taken.

        Raises:
            AlreadyExists: it is.
        """
        if present := rows.by_name(tx, name):
            raise AlreadyExists(f"volume {present.name} exists", hint="choose another name, or remove it first")

    async def check(self, name: str, spec: VolumeSpec) -> VolumeSpec:
        """Return the spec that a volume would have, before anything is received for it.

        Raises:
            AlreadyExists: the name is taken.
            InvalidArgument, Unsupported, FailedPrecondition: the spec does not do.
        """
        spec = _own(prepared(spec, self._drivers))
        await self._store.read(lambda tx: self.refuse(tx, name))
        return spec

    @asynccontextmanager
    async def making(
        self, name: str, spec: VolumeSpec, what: str, *, labels: Mapping[str, str], request_id: str, method: str
    ) -> AsyncIterator[Volume]:
        """Make a volume whose storage the block makes; when it fails, or a crash ends it, nothing is left. `what` says
        what goes on.

        Raises:
            AlreadyExists: the name is taken.
        """
        spec = _own(prepared(spec, self._drivers))
        driver = self._drivers[spec.driver]

        def insert(tx: Transaction) -> Volume:
            self.refuse(tx, name)
            return rows.insert(tx, driver, name, spec, labels, filling=what)

        volume = await self._store.write(insert)
        async with self._staging.alone(volume):
            try:
                yield volume
            except BaseException:
                await in_thread(driver.remove, volume)
                await self._store.write(lambda tx: tx.volumes.delete(volume.id))
                raise

            def finish(tx: Transaction) -> None:
                revision = tx.event(Kind.VOLUME, "create", volume.id, volume.name, driver=spec.driver)
                tx.volumes.update(replace(volume, filling="", revision=revision))
                tx.answer(request_id, method, [volume.id])
                rows.note_schedule(tx, volume)

            await self._store.write(finish)

    async def clone(
        self, reference: str, snapshot: str, name: str, spec: VolumeSpec | None, *, labels: Mapping[str, str],
        request_id: str,
    ) -> tuple[Volume, Taken]:  # fmt: skip
        """Make a volume with the data of another, or of its snapshot unless `snapshot` is "". `spec` None is its own.

        Raises:
            AlreadyExists: the name is taken.
            Exhausted: no space is left.
        """
        if made := await self.answered(request_id, "CloneVolume"):
            return await self._store.read(lambda tx: tx.volumes.require(made[0])), Taken(Consistency.MOMENT)
        source = refuse_filling(await self._store.read(lambda tx: tx.volumes.find(reference)))
        snapshot_id = (await self._snapshots.get(source.id, snapshot))[0].id if snapshot else ""
        if spec is None:
            spec = replace(source.spec, snapshot_schedule="", snapshot_keep=0)
            if _elsewhere(spec):  # what is mounted from elsewhere is copied here
                spec = VolumeSpec(driver="local")
        spec = replace(spec, driver=spec.driver or source.spec.driver)
        making = self.making(
            name, spec, f"a clone of {source.name} is being made", labels=labels, request_id=request_id,
            method="CloneVolume",
        )  # fmt: skip
        async with making as target, self._staging.alone(source):
            used = bool(self._staging.holders(source.id))
            drivers = self._drivers[source.spec.driver], self._drivers[target.spec.driver]
            taken = await in_thread(fill, drivers[0], source, snapshot_id, drivers[1], target, used=used)
        return await self._store.read(lambda tx: tx.volumes.require(target.id)), taken

    async def abandon(self) -> None:
        """Forget what a crash cut short: its storage is garbage then, and reaped."""

        def forget(tx: Transaction) -> None:
            for volume in tx.volumes.all("json_extract(body, '$.filling') != ''"):
                tx.volumes.delete(volume.id)

        await self._store.write(forget)


def _elsewhere(spec: VolumeSpec) -> bool:
    """Say whether a volume's data is not its own: a mount of what is there already, or of memory."""
    return spec.driver == "local" and "type" in spec.options


def _own(spec: VolumeSpec) -> VolumeSpec:
    """Return the spec of a volume whose data is its own.

    Raises:
        InvalidArgument: it is not: what is there would be written over, or what is written lost.
    """
    if _elsewhere(spec):
        raise InvalidArgument("spec.options[type]", spec.options["type"], "a volume with storage of its own to fill")
    return spec
