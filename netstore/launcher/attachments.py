"""Mounts made, changed and taken away while the processes that see them run.

What should be is committed first, then made in the mount namespace in one step; when the kernel refuses, the commit
is undone. Only taking away is the other way round: a process that uses a mount decides. After a crash `reconcile`
makes the namespace what the store says.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from netstore.errors import (
    AlreadyExists,
    FailedPrecondition,
    InUse,
    InvalidArgument,
    KernelError,
    NetstoreError,
    NotFound,
    Unsupported,
)
from netstore.kernel.mountns import MountNamespace, Target
from netstore.kernel.paths import closing
from netstore.launcher.images.catalogue import find_image
from netstore.launcher.mounting import Mounting
from netstore.model import Finding, Kind, Mount, MountSpec, MountType
from netstore.store import Store, Transaction
from netstore.volumes.manager import VolumeManager

__all__ = ["Attachments", "Place", "save_uses"]

_BAD_TARGET = {
    errno.ENOENT: "something on the way is not there", errno.ELOOP: "a link on the way leads out",
    errno.ENOTDIR: "something on the way, or the target itself, is no directory",
    errno.EISDIR: "it is a directory, and the source is a file", errno.EEXIST: "it is a link to nowhere",
    errno.EROFS: "it does not exist, and its file system is read-only", errno.EACCES: "it cannot be reached",
    errno.ENAMETOOLONG: "its name is too long", errno.EXDEV: "it leads out", errno.EPERM: "it cannot be made",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Whose mounts are changed, with its lock held. `namespace` is None where nothing runs yet; `holder` is who holds
    its volumes; `save` replaces one mount by another in the store, either None.
    """

    name: str
    holder: str
    namespace: MountNamespace | None
    mounts: Sequence[Mount]
    save: Callable[[Transaction, Mount | None, Mount | None], None]
    give: Callable[[Mount], Awaitable[None]] | None = None

    def at(self, target: str) -> Mount | None:
        """Return the mount at a target."""
        return next((each for each in self.mounts if _same_path(each.spec.target, target)), None)


class Attachments:
    """Changes the mounts of places."""

    def __init__(self, store: Store, volumes: VolumeManager, mounting: Mounting) -> None:
        self._store = store
        self._volumes = volumes
        self._mounting = mounting

    async def mount(self, place: Place, spec: MountSpec, *, exchange: bool) -> Mount:
        """Make a mount, change its mode, or put it in another's place; what is as asked for is left alone.

        Raises:
            NotFound: no such volume or image.
            AlreadyExists: something else is mounted there.
            FailedPrecondition, Unsupported, KernelError: see the contract.
        """
        old = place.at(spec.target)
        new = await self._store.read(lambda tx: _resolve(tx, spec))
        if old is not None:
            if _content(old) == _content(new) and old.spec.read_only == new.spec.read_only:
                return old
            if _content(old) != _content(new) and not exchange:
                raise _taken(place, spec.target, f"{old.volume or old.source or 'a tmpfs'} is mounted there")
        elif exchange:
            raise FailedPrecondition(
                f"{spec.target} in {place.name}: nothing of netstore is mounted there", hint="leave out replace",
                reason="NOT_MOUNTED", target=spec.target,
            )  # fmt: skip
        else:
            _refuse_hiding(place, spec.target)
        missing = await self._prepare(place, spec.target, known=old is not None)
        new = replace(new, attached=True, made=old.made if old else missing)
        await self._store.write(lambda tx: place.save(tx, old, new))
        try:
            await self._make(place, old, new, missing)
        except BaseException as error:
            await self._store.write(lambda tx: place.save(tx, new, old))
            await self._release(place, new, [old] if old else [])
            raise await self._refusal(place, new, error) from error
        if old is not None:
            await self._release(place, old, [new])
        return new

    async def _prepare(self, place: Place, target: str, *, known: bool) -> tuple[str, ...]:
        """Look at the target and return what has to be made for it."""
        if place.namespace is None:
            return ()
        try:
            found = await asyncio.to_thread(place.namespace.look, target)
        except KernelError as error:
            raise _bad_target(place, target, error) from error
        if found.path == "/proc" or found.path.startswith("/proc/"):
            raise _bad_target(place, target, KernelError(errno.EXDEV, "mounting at", target))
        if found.mount and not known:
            raise _taken(place, target, "something is mounted there that is not netstore's")
        return found.missing

    async def _make(self, place: Place, old: Mount | None, new: Mount, missing: Sequence[str]) -> None:
        namespace, spec = place.namespace, new.spec
        if namespace is None:
            return
        if old is not None and _content(old) == _content(new):
            recursive = spec.recursive not in ("disabled", "writable")
            await asyncio.to_thread(namespace.set_read_only, spec.target, read_only=spec.read_only, recursive=recursive)
            return
        if new.volume_id:
            await self._volumes.hold([new.volume_id], place.holder)
        if spec.chown and place.give:
            await place.give(new)
        with closing(await self._mounting.tree(new)) as tree:
            if old is not None:
                await asyncio.to_thread(namespace.exchange, tree, spec.target)
            else:
                await asyncio.to_thread(namespace.attach, tree, spec.target, missing)

    async def unmount(self, place: Place, target: str, *, force: bool) -> None:
        """Take a mount away, with what was made for it.

        Raises:
            NotFound: nothing of ours is mounted there.
            InUse: processes use it and `force` is not set, or another mount is beneath it.
        """
        mount = place.at(target)
        if mount is None:
            raise NotFound("mount", f"{target} in {place.name}", hint="`netstore inspect` shows what is mounted")
        _refuse_hiding(place, target)
        if place.namespace is not None:
            try:
                await asyncio.to_thread(_detach, place.namespace, mount, lazy=force)
            except KernelError as error:
                raise await self._refusal(place, mount, error) from error
        await self._store.write(lambda tx: place.save(tx, mount, None))
        await self._release(place, mount, [])

    async def reconcile(self, place: Place, *, repair: bool) -> list[Finding]:
        """Compare the attached mounts of a namespace with the store, and make it so when `repair` is set."""
        findings = []
        for mount in place.mounts:
            if not mount.attached or place.namespace is None:
                continue
            try:
                detail = await self._difference(place, mount)
                if not detail:
                    continue
                finding = Finding(kind=Kind.MOUNT, name=f"{mount.spec.target} in {place.name}", detail=detail)
                if repair:
                    await self._remake(place.namespace, mount)
                    finding = replace(finding, repaired=True)
            except NetstoreError as error:
                finding = Finding(
                    kind=Kind.MOUNT, name=f"{mount.spec.target} in {place.name}", detail="it is not as it should be",
                    error=str(error),
                )  # fmt: skip
            findings.append(finding)
        return findings

    async def _difference(self, place: Place, mount: Mount) -> str:
        assert place.namespace is not None
        found = await asyncio.to_thread(place.namespace.look, mount.spec.target)
        if not found.mount:
            return "it is not mounted"
        if not await self._shows(found, mount):
            return "something else is mounted there"
        return "" if found.read_only or not mount.spec.read_only else "it can be written"

    async def _shows(self, found: Target, mount: Mount) -> bool:
        """Say whether what is mounted is what a volume's mount or a bind shows; of others this cannot be told."""
        if mount.spec.type not in (MountType.VOLUME, MountType.BIND):
            return True
        with closing(await self._mounting.open_source(mount)) as source:
            status = await asyncio.to_thread(os.fstat, source)
        return found.identity == (status.st_dev, status.st_ino)

    async def _remake(self, namespace: MountNamespace, mount: Mount) -> None:
        found = await asyncio.to_thread(namespace.look, mount.spec.target)
        with closing(await self._mounting.tree(mount)) as tree:
            if found.mount:
                await asyncio.to_thread(namespace.exchange, tree, mount.spec.target)
            else:
                await asyncio.to_thread(namespace.attach, tree, mount.spec.target, found.missing)

    async def _release(self, place: Place, mount: Mount, also: Sequence[Mount]) -> None:
        """Give a volume back that no other mount of the place shows."""
        others = [each for each in (*place.mounts, *also) if each is not mount]
        if mount.volume_id and all(each.volume_id != mount.volume_id for each in others):
            volume, _ = await self._volumes.get(mount.volume_id)
            await self._volumes.staging.release(volume, place.holder)

    async def _refusal(self, place: Place, mount: Mount, error: BaseException) -> BaseException:
        """Turn what the kernel said into what the caller can do about it."""
        if not isinstance(error, KernelError):
            return error
        target = mount.spec.target
        if error.errno == errno.EBUSY and place.namespace is not None:
            holders = ", ".join(await asyncio.to_thread(place.namespace.holders, target)) or "a process"
            return InUse(
                f"{target} in {place.name} is in use by {holders}", hint="end what uses it, or unmount it with force",
                holders=holders, target=target,
            )  # fmt: skip
        if error.errno == errno.EINVAL and place.at(target):
            return Unsupported(
                f"{target} in {place.name}: the kernel cannot exchange this mount (MOVE_MOUNT_BENEATH, Linux 6.5)",
                hint="unmount it, then mount the other",
            )
        return _bad_target(place, target, error)


def save_uses(tx: Transaction, container_id: str, before: Iterable[Mount], after: Iterable[Mount]) -> None:
    """Make the volumes of a container's mounts those in use."""
    had, wanted = ({each.volume_id for each in mounts if each.volume_id} for mounts in (before, after))
    for volume_id in wanted - had:
        tx.volumes.require(volume_id)
        tx.execute("INSERT OR IGNORE INTO volume_uses VALUES (?, ?)", volume_id, container_id)
    for volume_id in had - wanted:
        tx.execute("DELETE FROM volume_uses WHERE volume_id = ? AND container_id = ?", volume_id, container_id)


def _detach(namespace: MountNamespace, mount: Mount, *, lazy: bool) -> None:
    """Unmount all that is at the target: a crash in an exchange can leave two."""
    while namespace.detach(mount.spec.target, made=mount.made, lazy=lazy):
        pass


def _resolve(tx: Transaction, spec: MountSpec) -> Mount:
    if spec.type is MountType.VOLUME:
        if not spec.source:
            raise InvalidArgument("spec.source", "", "the name or id of a volume: none is made here")
        volume = tx.volumes.find(spec.source)
        return Mount(spec=spec, source=volume.mountpoint, volume_id=volume.id, volume=volume.name)
    if spec.type is MountType.IMAGE:
        return Mount(spec=spec, source=find_image(tx, spec.source).id)
    return Mount(spec=spec, source=spec.source)


def _content(mount: Mount) -> tuple[object, ...]:
    """What two mounts of the same thing have in common, whether they can be written or not."""
    spec = mount.spec
    return (
        spec.type, mount.volume_id or mount.source, spec.subpath, spec.propagation or "rprivate",
        spec.recursive if spec.recursive in ("disabled", "writable") else "", spec.no_exec, spec.no_suid, spec.no_dev,
        spec.uid_mappings, spec.gid_mappings, spec.tmpfs_size_bytes, spec.tmpfs_mode, spec.tmpfs_options,
    )  # fmt: skip


def _same_path(one: str, other: str) -> bool:
    return os.path.normpath(one) == os.path.normpath(other)


def _refuse_hiding(place: Place, target: str) -> None:
    above = os.path.normpath(target).rstrip("/") + "/"
    for mount in place.mounts:
        if os.path.normpath(mount.spec.target).startswith(above):
            raise InUse(
                f"{target} in {place.name}: {mount.spec.target} is mounted beneath it", hint="unmount that one first",
                target=target,
            )  # fmt: skip


def _taken(place: Place, target: str, what: str) -> AlreadyExists:
    return AlreadyExists(
        f"{target} in {place.name}: {what}", hint="unmount it first, or replace it, or choose another target",
        target=target,
    )  # fmt: skip


def _bad_target(place: Place, target: str, error: KernelError) -> NetstoreError:
    why = _BAD_TARGET.get(error.errno)
    if why is None:
        return error
    return FailedPrecondition(
        f"target {target} in {place.name}: {why}", hint="choose another, or make it there first", reason="BAD_TARGET",
        target=target,
    )  # fmt: skip
