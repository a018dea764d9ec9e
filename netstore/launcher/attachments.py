"""Mounts made, changed and taken away while the processes that see them run.

What should be is committed first, then made in the mount namespace in one step; when the kernel refuses, the commit
is undone. Only taking away is the other way round: a process that uses a mount decides. After a crash `reconcile`
makes the namespace what the store says.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

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
from netstore.kernel.namespaces import await_single_use_thread
from netstore.kernel.paths import closing
from netstore.launcher.images.catalogue import find_image
from netstore.launcher.mounting import Mounting
from netstore.model import Finding, ForeignMount, Kind, Mount, MountSpec, MountType, Volume
from netstore.store import Store, Transaction
from netstore.threads import in_thread
from netstore.volumes.manager import VolumeManager
from netstore.volumes.snapshots import refuse_filling

__all__ = ["Attachments", "Place", "Wanted", "resolve_mount", "save_uses"]

_BAD_TARGET = {
    errno.ENOENT: "something on the way is not there", errno.ELOOP: "a link on the way leads out",
    errno.ENOTDIR: "something on the way, or the target itself, is no directory",
    errno.EISDIR: "it is a directory, and the source is a file", errno.EEXIST: "it is a link to nowhere",
    errno.EROFS: "it does not exist, and its file system is read-only", errno.EACCES: "it cannot be reached",
    errno.ENAMETOOLONG: "its name is too long", errno.EXDEV: "it leads out", errno.EPERM: "it cannot be made",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Whose mounts are changed, with its lock held. `open` gives its namespace, None where nothing runs yet; `holder`
    is who holds its volumes; `save` replaces one mount by another in the store, either None. `allow` lets what runs
    there use a device, as far as "rw", "r" or "" says; None where its devices are not ours to give.
    """

    name: str
    holder: str
    open: Callable[[], AbstractContextManager[MountNamespace]] | None
    mounts: Sequence[Mount]
    save: Callable[[Transaction, Mount | None, Mount | None], ForeignMount]
    give: Callable[[Mount], Awaitable[None]] | None = None
    allow: Callable[[int, str], None] | None = None

    def at(self, target: str) -> Mount | None:
        """Return the mount at a target."""
        return next((each for each in self.mounts if _same_path(each.spec.target, target)), None)

    def admit(self, mount: Mount, *, without: Mount | None = None, also: Mount | None = None) -> None:
        """Let what runs use the device that a mount shows, if it does, as its mounts of it say; `without` one that
        goes, `also` one that comes.

        Raises:
            Unsupported, KernelError: the node, or the kernel, cannot.
        """
        device = _device(mount)
        if device and self.allow:
            mounts = [each for each in (*self.mounts, also) if each and each is not without]
            modes = {each.spec.read_only for each in mounts if each.volume_id == mount.volume_id}
            self.allow(device, ("rw" if False in modes else "r") if modes else "")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A mount that is asked for, and what it needs: its volume, or its image's layers."""

    mount: Mount
    volume: Volume | None = None
    layers: tuple[str, ...] = ()


class Attachments:
    """Changes the mounts of places."""

    def __init__(self, store: Store, volumes: VolumeManager, mounting: Mounting) -> None:
        self._store = store
        self._volumes = volumes
        self._mounting = mounting

    async def mount(self, place: Place, wanted: Wanted, *, exchange: bool) -> ForeignMount | None:
        """Make a mount, change its mode, or put it in another's place; None says that it was as asked for.

        Raises:
            AlreadyExists: something else is mounted there.
            FailedPrecondition, Unsupported, KernelError: see the contract.
        """
        new, volume = wanted.mount, wanted.volume
        old = place.at(new.spec.target)
        if volume and volume.spec.block and not place.allow:
            raise FailedPrecondition(
                f"volume {volume.name} is a block device, and {place.name} is no container of ours",
                hint="its engine says which devices it may use: mount a filesystem there", reason="BLOCK_VOLUME",
            )  # fmt: skip
        if old is not None:
            if _content(old) == _content(new) and old.spec.read_only == new.spec.read_only:
                return None
            if _content(old) != _content(new) and not exchange:
                same = (old.volume_id or old.source) == (new.volume_id or new.source)
                other = " with other options" if same else ""
                raise _taken(place, new.spec.target, f"{old.volume or old.source or 'a tmpfs'} is mounted there{other}")
        elif exchange:
            raise FailedPrecondition(
                f"{new.spec.target} in {place.name}: nothing of netstore is mounted there", hint="leave out replace",
                reason="NOT_MOUNTED", target=new.spec.target,
            )  # fmt: skip
        else:
            _refuse_hiding(place, new.spec.target)
        try:
            if volume and place.open:
                await self._volumes.staging.hold(volume, place.holder)
            if new.spec.chown and place.give:
                await place.give(new)
            # Under the volume's lock: nobody fills it by another directory between the claim and the mount.
            async with self._volumes.staging.alone(volume) if volume else nullcontext():
                made = await await_single_use_thread(lambda: self._carry_out(place, old, wanted))
        except BaseException as error:
            await self._release(place, new, [])
            raise await self._refusal(place, new, error) from error
        if old is not None:
            await self._release(place, old, [new])
        return made

    def _carry_out(self, place: Place, old: Mount | None, wanted: Wanted) -> ForeignMount:
        """Commit, then make it: in one thread, because each handover costs more than most of the system calls."""
        if place.open is None:
            return self._store.write_here(lambda tx: place.save(tx, old, replace(wanted.mount, attached=True)))
        with place.open() as namespace:
            missing = _prepare(place, namespace, wanted.mount.spec.target, known=old is not None)
            new = replace(wanted.mount, attached=True, made=old.made if old else missing)
            made = self._store.write_here(lambda tx: place.save(tx, old, new))
            try:
                place.admit(new, without=old, also=new)
                self._make(namespace, old, replace(wanted, mount=new), missing)
                if old is not None:
                    place.admit(old, without=old, also=new)
            except BaseException:
                self._store.write_here(lambda tx: place.save(tx, new, old))
                place.admit(new)
                raise
            return made

    def _make(self, namespace: MountNamespace, old: Mount | None, wanted: Wanted, missing: Sequence[str]) -> None:
        new, spec = wanted.mount, wanted.mount.spec
        if old is not None and _content(old) == _content(new):
            recursive = spec.recursive not in ("disabled", "writable")
            namespace.set_read_only(spec.target, read_only=spec.read_only, recursive=recursive)
            return
        with closing(self._mounting.tree_of(new, wanted.volume, wanted.layers)) as tree:
            if old is not None:
                namespace.exchange(tree, spec.target)
            else:
                namespace.attach(tree, spec.target, missing)

    async def unmount(self, place: Place, target: str, *, force: bool) -> None:
        """Take a mount away, with what was made for it.

        Raises:
            NotFound: nothing of ours is mounted there.
            InUse: processes use it and `force` is not set, or another mount is beneath it.
        """
        mount = place.at(target)
        if mount is None:
            raise NotFound("mount", f"{target} in {place.name}", hint="`netstore volume mounts` shows what there is")
        _refuse_hiding(place, target)
        try:
            await await_single_use_thread(lambda: self._take_away(place, mount, lazy=force))
        except KernelError as error:
            raise await self._refusal(place, mount, error) from error
        await self._release(place, mount, [])

    def _take_away(self, place: Place, mount: Mount, *, lazy: bool) -> None:
        if place.open is not None:
            with place.open() as namespace:
                place.admit(mount, without=mount)
                try:
                    # All that is there: a crash in an exchange can leave two.
                    while namespace.detach(mount.spec.target, made=mount.made, lazy=lazy):
                        pass
                except BaseException:
                    place.admit(mount)
                    raise
        self._store.write_here(lambda tx: place.save(tx, mount, None))

    async def reconcile(self, place: Place, *, repair: bool) -> list[Finding]:
        """Compare the attached mounts of a namespace with the store, and make it so when `repair` is set."""
        findings = []
        for mount in place.mounts if place.open else ():
            if not mount.attached:
                continue
            finding = Finding(kind=Kind.MOUNT, name=f"{mount.spec.target} in {place.name}", detail="")
            try:
                wanted = await self._store.read(partial(_as_stored, mount=mount))
                detail = await in_thread(self._compare, place, wanted, repair=repair)
                if not detail:
                    continue
                finding = replace(finding, detail=detail, repaired=repair)
            except NetstoreError as error:
                finding = replace(finding, detail="it is not as it should be", error=str(error))
            findings.append(finding)
        return findings

    def _compare(self, place: Place, wanted: Wanted, *, repair: bool) -> str:
        """Say what is wrong with a mount, "" when nothing is, and make it as it should be."""
        assert place.open
        spec = wanted.mount.spec
        with place.open() as namespace:
            found = namespace.look(spec.target)
            stacked = bool(found.mount) and namespace.is_stacked(spec.target)
            if not found.mount:
                detail = "it is not mounted"
            elif stacked:
                detail = "an exchange was cut short"
            elif not self._shows(found, wanted):
                detail = "something else is mounted there"
            elif found.read_only != self._is_read_only(wanted):
                detail = "it cannot be written" if found.read_only else "it can be written"
            else:
                return ""
            if repair:
                place.admit(wanted.mount)
                self._remake(namespace, wanted)
            return detail

    def _remake(self, namespace: MountNamespace, wanted: Wanted) -> None:
        target = wanted.mount.spec.target
        while namespace.is_stacked(target):
            namespace.detach(target, lazy=True)
        found = namespace.look(target)
        if found.mount and self._shows(found, wanted) and found.read_only == self._is_read_only(wanted):
            return
        with closing(self._mounting.tree_of(wanted.mount, wanted.volume, wanted.layers)) as tree:
            if found.mount:
                namespace.exchange(tree, target)
            else:
                namespace.attach(tree, target, found.missing)

    def _shows(self, found: Target, wanted: Wanted) -> bool:
        """Say whether what is mounted is what a volume's mount or a bind shows; of others this cannot be told."""
        if wanted.mount.spec.type not in (MountType.VOLUME, MountType.BIND):
            return True
        with closing(self._mounting.source_of(wanted.mount, wanted.volume)) as source:
            status = os.fstat(source)
        return found.identity == (status.st_dev, status.st_ino)

    def _is_read_only(self, wanted: Wanted) -> bool:
        """Say whether it is to be read-only, asked for or because its file system is."""
        spec = wanted.mount.spec
        if spec.read_only or spec.type not in (MountType.VOLUME, MountType.BIND):
            return spec.read_only
        with closing(self._mounting.source_of(wanted.mount, wanted.volume)) as source:
            return bool(os.fstatvfs(source).f_flag & os.ST_RDONLY)

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
        if error.errno == errno.EBUSY and place.open is not None:
            holders = ", ".join(await in_thread(_holders, place.open, target)) or "a process"
            return InUse(
                f"{target} in {place.name} is in use by {holders}",
                hint="end what uses it, or unmount it with force (--force)",
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


def resolve_mount(tx: Transaction, spec: MountSpec) -> Wanted:
    """Find what a mount asks for.

    Raises:
        NotFound: no such volume or image.
        FailedPrecondition: the volume cannot be mounted.
    """
    if spec.type is MountType.VOLUME:
        if not spec.source:
            raise InvalidArgument("spec.source", "", "the name or id of a volume: none is made here")
        volume = tx.volumes.find(spec.source)
        refuse_filling(volume)
        return Wanted(Mount(spec=spec, source=volume.mountpoint, volume_id=volume.id, volume=volume.name), volume)
    if spec.type is MountType.IMAGE:
        image = find_image(tx, spec.source)
        return Wanted(Mount(spec=spec, source=image.id), layers=image.layers)
    return Wanted(Mount(spec=spec, source=spec.source))


def _as_stored(tx: Transaction, mount: Mount) -> Wanted:
    volume = tx.volumes.require(mount.volume_id) if mount.volume_id else None
    return Wanted(mount, volume, tx.images.require(mount.source).layers if mount.spec.type is MountType.IMAGE else ())


def _prepare(place: Place, namespace: MountNamespace, target: str, *, known: bool) -> tuple[str, ...]:
    """Look at the target and return what has to be made for it."""
    try:
        found = namespace.look(target)
    except KernelError as error:
        raise _bad_target(place, target, error) from error
    if found.path == "/proc" or found.path.startswith("/proc/"):
        raise _bad_target(place, target, KernelError(errno.EXDEV, "mounting at", target))
    if found.mount and not known:
        raise _taken(place, target, "something is mounted there that is not netstore's")
    return found.missing


def _device(mount: Mount) -> int:
    """Return the number of the device that a mount of a volume of mode BLOCK shows, 0 for all others."""
    if not mount.volume_id or mount.spec.subpath:  # what is in a volume is not ours: containers can make nodes
        return 0
    try:
        status = os.stat(mount.source)
    except OSError:
        return 0
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else 0


def _holders(opened: Callable[[], AbstractContextManager[MountNamespace]], target: str) -> list[str]:
    with opened() as namespace:
        return namespace.holders(target)


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
        f"{target} in {place.name}: {what}", hint="replace it (--replace), unmount it first, or choose another",
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
