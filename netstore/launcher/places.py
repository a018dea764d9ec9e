"""Whose mounts can be changed: containers, and any other mount namespace of the node, by a process or by a path."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import structlog

from netstore.errors import Conflict, FailedPrecondition, InvalidArgument, NetstoreError
from netstore.kernel.mountns import MountNamespace
from netstore.launcher import devices
from netstore.launcher.attachments import Attachments, Place, resolve_mount, save_uses
from netstore.launcher.mounting import Mounting
from netstore.launcher.runtime import is_alive, start_time
from netstore.model import (
    Container,
    ContainerState,
    Finding,
    ForeignMount,
    Image,
    Kind,
    Mount,
    MountRef,
    MountSpec,
    new_id,
)
from netstore.networks.context import KeyedLocks
from netstore.store import Store, Transaction
from netstore.threads import in_thread
from netstore.volumes.manager import VolumeManager

__all__ = ["Places"]

log = structlog.get_logger(__name__)

_RETRIES = 8


class Places:
    """Mounts of containers and of other namespaces. `locks` are those of the containers."""

    def __init__(self, store: Store, volumes: VolumeManager, mounting: Mounting, locks: KeyedLocks) -> None:
        self._store = store
        self._volumes = volumes
        self._mounting = mounting
        self._attachments = Attachments(store, volumes, mounting)
        self._locks = locks
        volumes.removal.expire = self.expire

    async def mount(self, ref: MountRef, spec: MountSpec, *, exchange: bool, root: str = "") -> ForeignMount:
        """Make a mount, change its mode, or with `exchange` put it in another's place; returns it as it then is. `root`
        is what a process that is being set up is about to have as its root.

        Raises:
            NotFound, InvalidArgument, AlreadyExists, FailedPrecondition, Unsupported: see the contract.
        """
        for _ in range(_RETRIES):
            wanted, found = await self._store.read(
                lambda tx: (resolve_mount(tx, spec), _find(tx, ref.container) if ref.container else None)
            )
            try:
                async with self._open(ref, found, root=root) as place:
                    made = await self._attachments.mount(place, wanted, exchange=exchange)
                return made or next(each for each in await self.all(ref) if _same(each.mount, spec.target))
            except _Changed:
                continue
        raise Conflict(f"{_name(ref)} changes all the time", hint="try again")

    async def unmount(self, ref: MountRef, target: str, *, force: bool, root: str = "") -> None:
        """Take a mount away; `root` as for `mount`.

        Raises:
            NotFound: nothing of ours is mounted there.
            InUse: a process uses it and `force` is not set.
        """
        async with self._open(ref, root=root) as place:
            await self._attachments.unmount(place, target, force=force)

    async def all(self, ref: MountRef | None) -> list[ForeignMount]:
        """Return the mounts of a namespace, or without one those of every namespace that is no container's. Those of a
        container have its age.
        """
        if ref is None:
            await self.expire()
            return await self._store.read(lambda tx: tx.mounts.all())
        if ref.container:
            container = await self._store.read(lambda tx: tx.containers.find(ref.container))
            return [_of_container(container, index, mount) for index, mount in enumerate(container.mounts)]
        with await in_thread(_open_foreign, ref) as namespace:
            return await self._store.read(lambda tx: tx.mounts.all("inode = ?", namespace.inode))

    async def start_up(self) -> None:
        """Take up what is mounted in namespaces that are not containers': hold its volumes, forget what is gone."""
        await self.expire()
        for row in await self._store.read(lambda tx: tx.mounts.all()):
            if row.mount.volume_id:
                try:
                    await self._volumes.hold([row.mount.volume_id], _holder(row.inode), again=True)
                except NetstoreError as error:
                    log.error("a volume that is mounted cannot be staged", mount=row.id, error=str(error))
        await self.check(repair=True)

    async def take_up(self, container: Container, *, repair: bool) -> list[Finding]:
        """Make the attached mounts of a running container what the store says. Its lock must not be held."""
        if not any(mount.attached for mount in container.mounts):
            return []
        return await self._reconciled(MountRef(container=container.id), container.name, repair=repair)

    async def check(self, *, repair: bool) -> list[Finding]:
        """Find mounts of other namespaces that are not there, and make them when `repair` is set."""
        await self.expire()
        refs = {row.inode: row.ref for row in await self._store.read(lambda tx: tx.mounts.all())}
        return [
            finding for ref in refs.values() for finding in await self._reconciled(ref, _name(ref), repair=repair)
        ]  # fmt: skip

    async def _reconciled(self, ref: MountRef, name: str, *, repair: bool) -> list[Finding]:
        try:
            async with self._open(ref) as place:
                return await self._attachments.reconcile(place, repair=repair)
        except NetstoreError as error:  # it ended meanwhile
            log.info("mounts cannot be looked at", place=name, error=str(error))
            return []

    async def expire(self) -> bool:
        """Forget mounts whose namespace, or process, is gone; True when there were any."""
        rows = await self._store.read(lambda tx: tx.mounts.all())
        gone = await in_thread(lambda: [row for row in rows if not _is_there(row)])
        for row in gone:
            await self._store.write(partial(_forget, row=row))
            await self._volumes.staging.release_all(_holder(row.inode))
        return bool(gone)

    @asynccontextmanager
    async def _open(
        self, ref: MountRef, found: tuple[Container, Image] | None = None, *, root: str = ""
    ) -> AsyncIterator[Place]:
        if ref.container:
            async with self._open_container(ref.container, found) as place:
                yield place
            return
        with await in_thread(_open_foreign, ref, root) as namespace:
            inode = namespace.inode
            async with self._locks.hold(f"mounts {inode}"):
                rows = await self._store.read(lambda tx: tx.mounts.all("inode = ?", inode))
                yield Place(
                    _name(ref), _holder(inode), lambda: nullcontext(namespace), [row.mount for row in rows],
                    partial(_save_foreign, ref, inode),
                )  # fmt: skip

    @asynccontextmanager
    async def _open_container(self, reference: str, found: tuple[Container, Image] | None) -> AsyncIterator[Place]:
        """Lock a container. What was `found` just before is not read again: saving refuses when it has changed."""
        container, image = found if found else await self._store.read(partial(_find, reference=reference))
        async with self._locks.hold(container.id):
            if found is None:
                container, image = await self._store.read(partial(_find, reference=container.id))
            yield Place(
                f"container {container.name}", container.id,
                partial(_open_running, container) if container.state is ContainerState.RUNNING else None,
                container.mounts, partial(_save, container),
                lambda mount: self._mounting.give(container, image, mount), partial(devices.allow, container.pid),
            )  # fmt: skip


class _Changed(Conflict):
    """What was read before the lock was taken is not so any more."""


def _find(tx: Transaction, reference: str) -> tuple[Container, Image]:
    container = tx.containers.find(reference)
    return container, tx.images.require(container.image_id)


def _open_running(container: Container) -> MountNamespace:
    gone = FailedPrecondition(
        f"container {container.name} is ending", hint="try again: its mounts can be changed once it has",
        reason="NOT_RUNNING",
    )  # fmt: skip
    try:
        namespace = MountNamespace.of_process(container.pid, field="namespace.container")
    except InvalidArgument as error:
        raise gone from error
    # The process was still its supervisor's child after the namespace was opened, so that it was no other's.
    if not (is_alive(container.supervisor_pid, container.supervisor_start) and _is_child(container)):
        namespace.close()
        raise gone
    return namespace


def _is_child(container: Container) -> bool:
    try:
        fields = Path(f"/proc/{container.pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return int(fields[1]) == container.supervisor_pid


def _open_foreign(ref: MountRef, root: str = "") -> MountNamespace:
    if ref.path:
        return MountNamespace.at(ref.path, field="namespace.path")
    return MountNamespace.of_process(ref.pid, field="namespace.pid", root=root)


def _is_there(row: ForeignMount) -> bool:
    if row.ref.pid:
        return is_alive(row.ref.pid, row.start_time)
    try:
        with _open_foreign(row.ref) as namespace:
            return namespace.inode == row.inode
    except InvalidArgument:
        return False


def _name(ref: MountRef) -> str:
    return f"the namespace {ref.path}" if ref.path else f"the namespace of process {ref.pid}"


def _holder(inode: int) -> str:
    return f"mounts of namespace {inode}"


def _same(mount: Mount, target: str) -> bool:
    return _normal(mount.spec.target) == _normal(target)


def _normal(target: str) -> str:
    return "/" + "/".join(part for part in target.split("/") if part not in ("", "."))


def _save(container: Container, tx: Transaction, before: Mount | None, after: Mount | None) -> ForeignMount:
    present = tx.containers.require(container.id)
    told = after or before
    assert told
    at = next((each for each in present.mounts if _same(each, told.spec.target)), None)
    if (present.state, present.pid, at) != (container.state, container.pid, before):
        raise _Changed(f"container {container.name} changed meanwhile", hint="try again")
    mounts = (*(each for each in present.mounts if each is not at), *([after] if after else []))
    save_uses(tx, present.id, present.mounts, mounts)
    revision = _tell(tx, Kind.CONTAINER, present.id, present.name, before, after)
    tx.containers.update(replace(present, mounts=mounts, revision=revision))
    return _of_container(present, len(mounts) - 1, told)


def _of_container(container: Container, index: int, mount: Mount) -> ForeignMount:
    return ForeignMount(
        id=f"{container.id}/{index:04}", ref=MountRef(container=container.name), inode=0, mount=mount,
        create_time=container.create_time,
    )  # fmt: skip


def _save_foreign(
    ref: MountRef, inode: int, tx: Transaction, before: Mount | None, after: Mount | None
) -> ForeignMount:  # fmt: skip
    told = after or before
    assert told
    row = next(iter(tx.mounts.all("inode = ? AND target = ?", inode, _normal(told.spec.target))), None)
    mount_id = row.id if row else new_id()
    revision = _tell(tx, Kind.MOUNT, mount_id, _name(ref), before, after)
    made = row or ForeignMount(
        id=mount_id, ref=ref, inode=inode, mount=told, start_time=start_time(ref.pid) if ref.pid else 0,
        create_time=time.time(), revision=revision,
    )  # fmt: skip
    if after is None:
        tx.mounts.delete(mount_id)
        return made
    if after.volume_id:
        tx.volumes.require(after.volume_id)
    made = replace(made, mount=after, revision=revision)
    if row:
        tx.mounts.update(made)
    else:
        tx.mounts.insert(made)
    return made


def _tell(
    tx: Transaction, kind: Kind, resource_id: str, name: str, before: Mount | None, after: Mount | None
) -> int:  # fmt: skip
    """Record what happened, for the volumes too; returns the revision of the place's own event."""
    for mount, action in ((before, "unmount"), (after, "mount")):
        if mount and mount.volume_id:
            mode = "ro" if mount.spec.read_only else "rw"
            tx.event(
                Kind.VOLUME, action, mount.volume_id, mount.volume, place=name, target=mount.spec.target, mode=mode
            )
    told = after or before
    assert told
    action = "mount" if after else "unmount"
    return tx.event(kind, action, resource_id, name, target=told.spec.target, source=told.volume or told.source)


def _forget(tx: Transaction, *, row: ForeignMount) -> None:
    if tx.mounts.get(row.id):
        _tell(tx, Kind.MOUNT, row.id, _name(row.ref), row.mount, None)
        tx.mounts.delete(row.id)
