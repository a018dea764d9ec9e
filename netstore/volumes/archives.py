"""Volumes as streams: exported by tar and Zstandard, imported by the one tar reader of ours."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from pathlib import Path

from netstore.archive import unpack
from netstore.errors import (
    Exhausted,
    FailedPrecondition,
    InvalidArgument,
    KernelError,
    NetstoreError,
    NotFound,
)
from netstore.kernel.files import spare_bytes
from netstore.kernel.mounts import sync_file_system
from netstore.kernel.paths import closing
from netstore.kernel.tar import TRAILER_SIZE, Packer, digest_in
from netstore.model import Consistency, Volume, VolumeSpec, new_id
from netstore.networks.context import KeyedLocks
from netstore.threads import in_thread
from netstore.volumes.copies import Taken, of_one_moment, reading, refuse_content
from netstore.volumes.drivers.base import VolumeDriver
from netstore.volumes.manager import VolumeManager
from netstore.volumes.snapshots import refuse_filling

__all__ = ["Archives", "Begun", "Ended", "Wanted"]

_KEEP_UPLOADS_SECONDS = 24 * 3600.0
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Begun:
    """What is being exported: `snapshot` is "" for the volume itself; `used_bytes` is what it holds, where known."""

    volume: Volume
    snapshot: str
    used_bytes: int
    consistency: Consistency
    frozen_seconds: float


@dataclass(frozen=True, slots=True)
class Ended:
    """What was exported: sha256 (hexadecimal) and length of the whole stream, and bytes of the tar in it."""

    sha256: str
    size_bytes: int
    plain_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """An import: the volume to make, the upload's id, and whether setuid, capabilities and devices are kept."""

    name: str
    spec: VolumeSpec
    labels: Mapping[str, str]
    upload_id: str
    privileges: bool = False


class Archives:
    """Exports and imports of volumes."""

    def __init__(self, volumes: VolumeManager, state_dir: Path) -> None:
        self._volumes = volumes
        self._uploads = state_dir / "uploads"
        self._locks = KeyedLocks()
        self._running: set[asyncio.Task[Volume]] = set()

    async def export(
        self, reference: str, snapshot: str, *, level: int, offset: int = 0
    ) -> AsyncGenerator[Begun | bytes | Ended, None]:
        """Yield what is exported, the stream from `offset` on, and what it was. `level` 0 does not compress. Of a
        volume that is used a snapshot is exported and removed again, where snapshots are of one moment.

        Raises:
            NotFound: no such volume or snapshot.
            Exhausted: no space is left for the snapshot.
            FailedPrecondition: an offset, and no snapshot: a volume may change in between.
        """
        volume = refuse_filling((await self._volumes.get(reference))[0])
        if offset and not snapshot:
            raise FailedPrecondition(
                f"offset: volume {volume.name} may have changed since", reason="NOT_RESUMABLE",
                hint="export a snapshot of it: that stream can be taken up again",
            )  # fmt: skip
        found = (await self._volumes.snapshots.get(volume.id, snapshot))[0] if snapshot else None
        holder = f"export {new_id()[:12]} {found.id if found else volume.id}"
        driver, staging = self._volumes.driver_of(volume), self._volumes.staging
        used = any(not each.startswith("export ") for each in staging.holders(volume.id))
        async with staging.held([volume], holder), AsyncExitStack() as stack:
            used_bytes = found.size_bytes if found else (await self._volumes.usage(volume)).used_bytes
            shown, taken = "", Taken(Consistency.LIVE if used else Consistency.UNUSED)
            if found:
                shown, taken = found.id, Taken(found.consistency, found.frozen_seconds)
            elif used and of_one_moment(driver, volume):
                shown, taken = await stack.enter_async_context(self._volumes.snapshots.passing(volume))
            name = found.name if found else ""
            yield Begun(volume, name, used_bytes or 0, taken.consistency, taken.frozen_seconds)
            path = await in_thread(stack.enter_context, reading(driver, volume, shown))
            descriptor = await in_thread(lambda: stack.enter_context(closing(os.open(path, _DIRECTORY))))
            async with aclosing(pack(descriptor, ".", level=level, offset=offset)) as parts:
                async for part in parts:
                    yield part

    async def received(self, upload_id: str) -> int:
        """Return how many bytes of an upload are here.

        Raises:
            NotFound: none are.
        """
        try:
            return (await in_thread((self._uploads / upload_id).stat)).st_size
        except FileNotFoundError as error:
            raise NotFound("upload", upload_id, hint="begin it again: uploads are kept for a day") from error

    async def import_volume(
        self, wanted: Wanted, offset: int, chunks: AsyncIterator[bytes | str]
    ) -> tuple[Volume, int]:
        """Make a volume from a stream; its last item is a str, the sha256 of the whole stream or "". Returns the volume
        and the length of the stream. What came stays for a day when the stream is cut, to go on from there.

        Raises:
            AlreadyExists: the name is taken.
            InvalidArgument: the archive is damaged, or has what is refused; nothing is left.
            Exhausted: no space is left.
        """
        for made in await self._volumes.filling.answered(wanted.upload_id, "ImportVolume"):
            return (await self._volumes.get(made))[0], 0
        await self._volumes.filling.check(wanted.name, wanted.spec)
        async with self._locks.hold(wanted.upload_id):
            file = self._uploads / wanted.upload_id
            digest = await self._receive(file, offset, chunks)
            size = os.stat(file).st_size
            # It runs to its end when the caller goes away: its thread cannot be stopped.
            task = asyncio.create_task(self._unpack(wanted, file, digest), name="ImportVolume")
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            return await asyncio.shield(task), size

    async def _receive(self, file: Path, offset: int, chunks: AsyncIterator[bytes | str]) -> str:
        self._uploads.mkdir(exist_ok=True, mode=0o700)
        with closing(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as descriptor:
            there = os.fstat(descriptor).st_size
            if not 0 <= offset <= there:
                if not there:
                    os.unlink(file)
                raise InvalidArgument("offset", offset, f"0 to {there}, the bytes that are here")
            os.ftruncate(descriptor, offset)
            os.lseek(descriptor, offset, os.SEEK_SET)
            try:
                async for chunk in chunks:
                    if isinstance(chunk, str):
                        return chunk
                    await in_thread(_write, descriptor, chunk)
            except NetstoreError:
                os.unlink(file)
                raise
            kept = os.fstat(descriptor).st_size
        raise FailedPrecondition(
            f"the stream of {file.name} ended before its `end`", hint=f"go on from offset {kept}", reason="INCOMPLETE",
            offset=kept,
        )  # fmt: skip

    async def _unpack(self, wanted: Wanted, file: Path, digest: str) -> Volume:
        try:
            filling = self._volumes.filling.making(
                wanted.name, wanted.spec, "an archive is being unpacked", labels=wanted.labels,
                request_id=wanted.upload_id, method="ImportVolume",
            )  # fmt: skip
            async with filling as volume:
                driver = self._volumes.driver_of(volume)
                await in_thread(_unpack, driver, volume, file, digest, harmless=not wanted.privileges)
        finally:
            await in_thread(file.unlink, missing_ok=True)
        self._volumes.chores.wake()
        return (await self._volumes.get(volume.id))[0]

    def expire(self) -> None:
        """Remove uploads that nobody went on with for a day. Blocks."""
        for file in self._uploads.glob("*"):
            with suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > _KEEP_UPLOADS_SECONDS and not self._locks.held(file.name):
                    file.unlink()


async def pack(directory: int, name: str, *, level: int, offset: int = 0) -> AsyncGenerator[bytes | Ended, None]:
    """Yield the tar stream of a directory, or of a name in it, from an offset on, and what it was."""
    packer = await in_thread(Packer, directory, name, level=level)
    following = asyncio.ensure_future(asyncio.to_thread(packer.read))
    try:
        while data := await following:
            following = asyncio.ensure_future(asyncio.to_thread(packer.read))  # while this one is sent
            skipped = min(offset, len(data))
            offset -= skipped
            if skipped < len(data):
                yield data[skipped:] if skipped else data
        if offset:
            raise InvalidArgument("offset", packer.size_bytes + offset, f"0 to {packer.size_bytes}, the whole stream")
        yield Ended(packer.sha256.hexdigest(), packer.size_bytes, packer.plain_bytes)
    finally:
        packer.stop()
        await asyncio.wait([following])
        if not following.cancelled():
            following.exception()
        packer.close()


class _Hashed:
    """A file whose bytes are counted into a digest, up to its trailer."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.left = os.fstat(descriptor).st_size
        trailer = os.pread(descriptor, TRAILER_SIZE, self.left - TRAILER_SIZE) if self.left > TRAILER_SIZE else b""
        self.promised = digest_in(trailer)
        self.trailer = trailer if self.promised else b""
        self.left -= len(self.trailer)
        self.sha256 = hashlib.sha256()

    def read(self, size: int, /) -> bytes:
        data = os.read(self._descriptor, min(size, self.left)) if self.left else b""
        self.sha256.update(data)
        self.left -= len(data)
        return data


def _unpack(driver: VolumeDriver, volume: Volume, file: Path, digest: str, *, harmless: bool) -> None:
    driver.create(volume)
    driver.stage(volume)
    try:
        refuse_content(driver, volume)
        with (
            closing(os.open(driver.mountpoint(volume), _DIRECTORY)) as root,
            closing(os.open(file, os.O_RDONLY | os.O_CLOEXEC)) as descriptor,
        ):
            source = _Hashed(descriptor)
            unpack(source, root, harmless=harmless)
            while source.read(1 << 20):
                pass
            _verify(source, digest)
            sync_file_system(root)
    finally:
        driver.unstage(volume)


def _verify(source: _Hashed, digest: str) -> None:
    found = source.sha256.hexdigest()
    if source.promised not in ("", found):
        raise _wrong(found, source.promised)
    source.sha256.update(source.trailer)
    if digest not in ("", source.sha256.hexdigest()):
        raise _wrong(source.sha256.hexdigest(), digest)


def _wrong(found: str, wanted: str) -> InvalidArgument:
    return InvalidArgument(
        "archive", f"sha256 {found}", f"the stream whose sha256 is {wanted}: send it again", reason="ARCHIVE_DAMAGED"
    )


def _write(descriptor: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    try:
        if spare_bytes(descriptor) < len(chunk):  # who fills the disk stops everybody on it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Exhausted("receiving the archive: no space is left", hint="free some on this node") from error
        raise KernelError(error.errno or errno.EIO, "receiving", "the archive") from error
