"""The volume manager: named storage that outlives containers.

A container's mounts become volumes inside the launcher's own transaction (`claim`), so that a volume cannot be removed
between the check and the use; their storage is made afterwards (`apply`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import structlog

from netstore.errors import (
    AlreadyExists,
    Conflict,
    KernelError,
    NetstoreError,
    NotFound,
)
from netstore.kernel.paths import closing
from netstore.model import Finding, Kind, MountSpec, Volume, VolumeSpec, new_id
from netstore.store import Store, Transaction
from netstore.threads import in_thread
from netstore.volumes import rows
from netstore.volumes.chores import Chores
from netstore.volumes.drivers.base import Node, Usage, VolumeDriver, load_drivers
from netstore.volumes.filling import Filling
from netstore.volumes.ownership import begin, has_owner
from netstore.volumes.reconcile import check_storage
from netstore.volumes.removal import Removal
from netstore.volumes.reserve import Reserve
from netstore.volumes.sizes import changed_spec, driver_named, prepared, settled
from netstore.volumes.snapshots import Snapshots, refuse_filling
from netstore.volumes.staging import Staging

__all__ = ["Details", "VolumeManager"]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Details:
    """What a look at a volume says. `health` is what is wrong, "" when nothing is."""

    usage: Usage
    health: str
    staged: bool
    holders: tuple[str, ...]


class VolumeManager:
    """The volumes of a node."""

    def __init__(
        self, store: Store, state_dir: Path, settings: Mapping[str, str] | None = None, *, trash_seconds: float = 0.0
    ) -> None:
        self._store = store
        self._drivers = load_drivers(Node(state_dir, settings or {}))
        self.staging = Staging(self._drivers)
        self._listed: tuple[int, list[tuple[Volume, list[str]]]] = (-1, [])
        self._there: dict[str, bool] = {}  # whether a volume's device was there at the last look
        self.snapshots = Snapshots(store, self._drivers, self.staging)
        self.filling = Filling(store, self._drivers, self.staging, self.snapshots)
        self.removal = Removal(store, self._drivers, self.staging, keep_seconds=trash_seconds)
        self.chores = Chores(store, self.snapshots, self.removal, Reserve(store, self._drivers, state_dir))

    @property
    def drivers(self) -> list[str]:
        """Names of the volume drivers."""
        return sorted(self._drivers)

    def driver_named(self, name: str) -> VolumeDriver:
        """Return a driver.

        Raises:
            InvalidArgument: there is none.
        """
        return driver_named(self._drivers, name)

    async def start(self) -> None:
        """Make the storage of volumes whose creation a crash cut short; remove what no volume owns."""
        for name, driver in self._drivers.items():
            try:
                await in_thread(driver.start)
            except NetstoreError as error:
                log.error("a volume driver cannot start", driver=name, error=str(error))
        await self.filling.abandon()
        await check_storage(self._drivers, self._volumes, self.staging, repair=True)

    async def settle(self) -> None:
        """Stage what engines hold, unstage what nobody holds: after a start, once containers said what they hold."""
        stages = await self._store.read(lambda tx: tx.rows("SELECT volume_id, holder FROM volume_stages"))
        for volume_id, holder in stages:
            try:
                await self.hold([volume_id], holder, again=True)
            except NetstoreError as error:
                log.error("a volume cannot be staged", volume=volume_id, holder=holder, error=str(error))
        await self.check(repair=True)

    async def check(self, *, repair: bool) -> list[Finding]:
        """Compare storage, mounts and store, and repair what differs when `repair` is set."""
        findings, volumes, staged = await check_storage(self._drivers, self._volumes, self.staging, repair=repair)
        filling = {volume.id for volume in volumes if volume.filling}
        return [
            *(finding for finding in findings if finding.resource_id not in filling),
            *await self.snapshots.check(volumes, repair=repair),
            *await self.staging.check(volumes, staged, repair=repair),
        ]

    async def look_at_devices(self) -> None:
        """See which volumes' devices came or went since the last look: mount them again, let go, and record it."""
        taken: set[str] = set()
        for driver in (driver for driver in self._drivers.values() if driver.devices):
            taken |= (await in_thread(driver.observe)).whole
        found = await self._store.read(lambda tx: [tx.volumes.get(each) for each in taken]) if taken else []
        for volume in (volume for volume in found if volume):
            there = await in_thread(self.driver_of(volume).is_there, volume)
            before = self._there.get(volume.id, True)
            self._there[volume.id] = there
            if there != before:
                action = "device-appear" if there else "device-vanish"
                await self._store.write(partial(rows.note, volume=volume, action=action))
                await self.staging.follow(volume, there=there)

    async def _volumes(self) -> list[Volume]:
        """Return every volume that has storage: those in the trash too."""
        return await self._store.read(lambda tx: tx.volumes.all() + [each.volume for each in tx.trash.all()])

    async def create(
        self, name: str, spec: VolumeSpec, *, labels: Mapping[str, str], request_id: str = ""
    ) -> tuple[Volume, list[str]]:
        """Make a volume, or return the one of the same name and spec; an empty name makes an anonymous one.

        Raises:
            AlreadyExists: the name is taken by another spec.
            InvalidArgument: naming the field.
        """
        asked, spec = spec, prepared(spec, self._drivers)

        def insert(tx: Transaction) -> tuple[Volume, bool]:
            for made in tx.answered(request_id, "CreateVolume"):
                return tx.volumes.require(made), False
            present = rows.by_name(tx, name)
            if present:
                same = spec if asked.driver else replace(spec, driver=present.spec.driver)  # whatever holds the size
                rows.refuse_difference(present, same, labels)
                return present, False
            volume = rows.insert(tx, self._drivers[spec.driver], name, spec, labels)
            tx.answer(request_id, "CreateVolume", [volume.id])
            rows.note_schedule(tx, volume)
            return volume, True

        volume, made = await self._store.write(insert)
        if made:
            await self.apply([volume])
            self.chores.wake()
        return await self.get(volume.id)

    def claim(self, tx: Transaction, mount: MountSpec, container_id: str) -> tuple[Volume, bool]:
        """Take the volume of a container's mount, made when there is none; True says that it was made.

        For the launcher's transaction, after the container's row. What was made needs `apply` after the commit.

        Raises:
            AlreadyExists: the mount asks for another driver or options than the volume has.
        """
        asked = VolumeSpec(driver=mount.volume_driver, options=dict(mount.volume_options))
        volume = rows.by_name(tx, mount.source)
        made = volume is None
        if volume is not None:
            refuse_filling(volume)
        if volume is None:
            spec = prepared(asked, self._drivers)
            volume = rows.insert(tx, self._drivers[spec.driver], mount.source, spec, mount.volume_labels)
        elif mount.volume_driver or mount.volume_options:
            spec = settled(replace(asked, driver=asked.driver or volume.spec.driver), self._drivers)
            rows.refuse_difference(volume, spec, volume.labels)
        tx.execute("INSERT OR IGNORE INTO volume_uses VALUES (?, ?)", volume.id, container_id)
        return volume, made

    async def apply(self, volumes: list[Volume]) -> None:
        """Make the storage of new volumes; when it cannot be made, the rows go too."""
        try:
            for volume in volumes:
                async with self.staging.alone(volume):
                    driver = self._drivers[volume.spec.driver]
                    await in_thread(driver.create, volume)
                    if has_owner(volume.spec) and not driver.stages(volume):
                        await in_thread(begin, driver.mountpoint(volume), volume.spec)
        except BaseException:
            await self.discard(volumes)
            raise

    async def hold(self, volume_ids: Iterable[str], holder: str, *, again: bool = False) -> None:
        """Stage volumes and keep them so for a holder, such as a container that runs; `staging` gives them back. With
        `again` the holder has them already: what is mounted is taken as it is.

        Raises:
            NetstoreError: one cannot be staged, or does not answer; none is held.
        """
        wanted = sorted({each for each in volume_ids if each})
        if not wanted:
            return
        found = await self._store.read(lambda tx: [tx.volumes.require(each) for each in wanted])
        try:
            for volume in found:
                await self.staging.hold(volume, holder, again=again)
        except BaseException:
            await self.staging.release_all(holder)
            raise

    async def discard(self, volumes: list[Volume]) -> None:
        """Remove volumes that were made for something that failed, unless somebody uses them by now."""
        for volume in volumes:
            try:
                await self.delete(volume.id)
            except NetstoreError:
                continue

    @asynccontextmanager
    async def root(self, volume_id: str) -> AsyncIterator[int]:
        """Open the directory that holds a volume's data, or its device node (O_PATH), for as long as the block runs.

        Raises:
            NotFound: there is no such volume.
            KernelError: its storage is missing.
        """
        volume = await self._store.read(lambda tx: tx.volumes.require(volume_id))
        with ExitStack() as stack:
            async with self.staging.alone(volume):  # a copy-up may put another directory there
                root = await in_thread(lambda: stack.enter_context(closing(open_data(volume))))
            yield root

    async def named(self, name: str) -> Volume:
        """Return a volume by its name alone: for protocols that know no ids, and so no beginnings of ids.

        Raises:
            NotFound: there is none.
        """
        found = await self._store.read(lambda tx: rows.by_name(tx, name))
        if found is None:
            raise NotFound(Kind.VOLUME, name, hint="`netstore volume ls` shows what there is")
        return found

    async def get(self, reference: str) -> tuple[Volume, list[str]]:
        """Return a volume and the names of the containers that mount it."""
        return await self._store.read(lambda tx: rows.used(tx, tx.volumes.find(reference)))

    async def all(self) -> list[tuple[Volume, list[str]]]:
        """Return every volume, oldest first, and the names of the containers that mount each."""

        def read(tx: Transaction) -> list[tuple[Volume, list[str]]]:
            version = tx.data_version()
            if self._listed[0] == version:  # the pages of one list, mostly
                return self._listed[1]
            used: dict[str, list[str]] = {}
            for volume_id, name in tx.rows(f"{rows.USES} ORDER BY created"):
                used.setdefault(volume_id, []).append(name)
            found = [(volume, used.get(volume.id, [])) for volume in tx.volumes.all()]
            self._listed = (version, found)
            return found

        return await self._store.read(read)

    async def page(
        self, after: tuple[float, str], size: int, wanted: Callable[[Volume, list[str]], bool]
    ) -> tuple[list[tuple[Volume, list[str]]], bool]:
        """Return up to `size` wanted volumes after a time of creation and id, and whether more follow."""
        return await self._store.read(lambda tx: rows.page(tx, after, size, wanted))

    def driver_of(self, volume: Volume) -> VolumeDriver:
        """Return the driver of a volume."""
        return driver_named(self._drivers, volume.spec.driver)

    async def usage(self, volume: Volume) -> Usage:
        """Return what a volume holds, as far as that is known without a walk through it."""
        return await in_thread(self._drivers[volume.spec.driver].usage, volume)

    async def usages(self, volumes: Sequence[Volume]) -> dict[str, Usage]:
        """Return what volumes hold, by id, as far as that is known at once: no directory is walked, no server asked."""

        def ask() -> dict[str, Usage]:
            found = {}
            for volume in volumes:
                device = volume.spec.options.get("device", "/")
                if volume.filling or device.startswith("//") or not device.startswith(("/", "tmpfs")):
                    continue
                with suppress(NetstoreError):
                    found[volume.id] = self._drivers[volume.spec.driver].usage(volume)
            return found

        return await in_thread(ask)

    async def measure(self, volume: Volume) -> int:
        """Return the bytes that a volume takes on the node. May be slow."""
        return await in_thread(self._drivers[volume.spec.driver].measure, volume)

    async def trim(self, reference: str) -> int:
        """Give back the blocks that a volume's filesystem no longer uses, staged or not; returns their bytes.

        Raises:
            Unsupported: it has none to give back.
        """
        volume = refuse_filling((await self.get(reference))[0])
        holder = f"trim {new_id()[:12]}"
        async with self.staging.held([volume], holder):
            return await in_thread(self.driver_of(volume).trim, volume)

    async def details(self, volume: Volume) -> Details:
        """Look at a volume: what it holds, how it is, who holds it staged."""
        driver = self.driver_of(volume)

        def look() -> tuple[Usage, str, bool]:
            try:
                health = driver.health(volume)
                return (Usage() if health else driver.usage(volume)), health, driver.staged(volume)
            except NetstoreError as error:
                return Usage(), error.what, False

        usage, health, staged = await in_thread(look)
        return Details(usage, health, staged, tuple(sorted(self.staging.holders(volume.id))))

    async def update(
        self, reference: str, etag: str, *, labels: Mapping[str, str] | None = None, spec: Mapping[str, object]
    ) -> tuple[Volume, list[str]]:
        """Replace a volume's labels, fields of its spec, or both.

        Raises:
            Conflict: the etag is not the current one.
            InvalidArgument, Unsupported, Exhausted: the driver cannot change the size so; the volume is as it was.
            Immutable, InUse: the option cannot change, or not while the volume is mounted.
        """
        before: list[Volume] = []

        def update(tx: Transaction) -> Volume:
            volume = refuse_filling(tx.volumes.find(reference))
            if etag and etag != str(volume.revision):
                raise Conflict(f"volume {volume.name} has changed", hint="read it again, then apply the change again")
            before.append(volume)
            wanted = changed_spec(self.driver_of(volume), volume, spec, used=bool(self.staging.holders(volume.id)))
            volume = replace(volume, spec=wanted, labels=volume.labels if labels is None else dict(labels))
            rows.note_schedule(tx, volume, before[0].spec.snapshot_schedule)
            return rows.changed(tx, volume)

        volume = await self._store.write(update)
        self.chores.wake()
        if volume.spec.size_bytes != before[0].spec.size_bytes:
            await self._resize(before[0], volume)
        return await self.get(volume.id)

    async def _resize(self, before: Volume, after: Volume) -> None:
        try:
            async with self.staging.alone(before):
                await in_thread(self.driver_of(before).resize, before, after.spec.size_bytes)
        except BaseException:

            def undo(tx: Transaction) -> None:
                present = tx.volumes.require(before.id)
                rows.changed(tx, rows.undone(present, before, after))

            await self._store.write(undo)
            raise

    async def stage(self, reference: str, holder: str) -> tuple[Volume, list[str]]:
        """Stage a volume for an engine, until it unstages it; over restarts and reboots.

        Raises:
            NotFound: there is none.
            NetstoreError: it cannot be staged.
        """

        def claim(tx: Transaction) -> tuple[Volume, bool]:
            volume = refuse_filling(tx.volumes.find(reference))
            made = tx.execute("INSERT OR IGNORE INTO volume_stages VALUES (?, ?)", volume.id, holder)
            return volume, bool(made.rowcount)

        volume, fresh = await self._store.write(claim)
        try:
            await self.staging.hold(volume, holder)
        except BaseException:
            if fresh:  # what the holder has had since before is its own until it unstages it
                await self._store.write(partial(rows.forget_stage, volume_id=volume.id, holder=holder))
            raise
        return await self.get(volume.id)

    async def unstage(self, reference: str, holder: str) -> None:
        """Give an engine's hold back. One that is gone is a success.

        Raises:
            NotFound: there is no such volume.
        """

        def forget(tx: Transaction) -> Volume:
            volume = tx.volumes.find(reference)
            rows.forget_stage(tx, volume_id=volume.id, holder=holder)
            return volume

        volume = await self._store.write(forget)
        await self.staging.release(volume, holder)

    async def delete(self, reference: str) -> None:
        """Remove a volume and its data for good: see `Removal.delete`."""
        await self.removal.delete(reference)

    async def rename(self, reference: str, name: str) -> tuple[Volume, list[str]]:
        """Give a volume another name, used or not; what is mounted stays so.

        Raises:
            AlreadyExists: the name is taken.
        """

        def rename(tx: Transaction) -> Volume:
            volume = refuse_filling(tx.volumes.find(reference))
            present = rows.by_name(tx, name)
            if present and present.id != volume.id:
                raise AlreadyExists(f"volume {name} exists", hint="choose another name")
            if volume.name == name:
                return volume
            rows.rename_uses(tx, volume.id, name)
            return rows.changed(tx, replace(volume, name=name), "rename")

        return await self.get((await self._store.write(rename)).id)


def open_data(volume: Volume) -> int:
    """Return an O_PATH descriptor of a volume's data, which is staged: a directory, or a device node.

    Raises:
        KernelError: it is not there.
    """
    try:
        return os.open(volume.mountpoint, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "opening the data of volume", volume.name) from error
