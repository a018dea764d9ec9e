"""Files in and out of volumes, used or not: paths are the volume's own, links in it lead nowhere else."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass

from netstore.archive import Unpacked, unpack
from netstore.errors import InvalidArgument, KernelError, NetstoreError, NotFound
from netstore.kernel.paths import closing, open_in_root
from netstore.model import Volume, new_id
from netstore.threads import in_thread
from netstore.volumes.archives import Ended, pack
from netstore.volumes.manager import VolumeManager
from netstore.volumes.snapshots import refuse_filling

__all__ = ["PathInfo", "Paths"]


@dataclass(frozen=True, slots=True)
class PathInfo:
    """What is at a path: its last part, mode with the type (inode(7)), bytes, time, and where a link leads."""

    name: str
    mode: int
    size_bytes: int
    mtime: float
    link: str = ""


class Paths:
    """Reads and writes below the roots of volumes."""

    def __init__(self, volumes: VolumeManager) -> None:
        self._volumes = volumes

    async def look(self, reference: str, path: str) -> PathInfo:
        """Return what is at a path; a link is looked at itself.

        Raises:
            NotFound: nothing is there.
        """
        async with self._root(reference) as root:
            return await in_thread(_look, root, path)

    async def read(self, reference: str, path: str) -> AsyncGenerator[PathInfo | bytes | Ended, None]:
        """Yield what is at a path, and it as a tar: a directory's members as "./…", all else by its name."""
        async with self._root(reference) as root:
            info = await in_thread(_look, root, path)
            yield info
            with ExitStack() as stack:
                whole = stat.S_ISDIR(info.mode)
                place = path if whole else os.path.dirname(path.rstrip("/"))
                flags = os.O_RDONLY | os.O_DIRECTORY
                directory = stack.enter_context(closing(open_in_root(root, place or ".", flags)))
                async with aclosing(pack(directory, "." if whole else f"./{info.name}", level=0)) as parts:
                    async for part in parts:
                        yield part

    async def write(
        self, reference: str, path: str, chunks: AsyncIterator[bytes], *, make: bool, privileges: bool
    ) -> Unpacked:
        """Unpack a tar into the directory at a path, made with `make` where it is missing and its parent is not. What
        has the same names is replaced; what came before an error stays.

        Raises:
            NotFound: there is no such directory.
            InvalidArgument: the archive is damaged, or would leave the directory.
        """
        async with self._root(reference) as root:
            directory = await in_thread(_directory, root, path, make=make)
            reading, writing = os.pipe()
            with closing(directory), os.fdopen(reading, "rb") as source:
                unpacking = asyncio.create_task(
                    asyncio.to_thread(_unpack, source, directory, harmless=not privileges), name="WritePath"
                )
                try:
                    with closing(writing), suppress(BrokenPipeError):  # the unpacking says why
                        async for chunk in chunks:
                            await in_thread(_write, writing, chunk)
                finally:
                    await asyncio.wait([unpacking])
                return unpacking.result()

    @asynccontextmanager
    async def _root(self, reference: str) -> AsyncGenerator[int, None]:
        volume: Volume = refuse_filling((await self._volumes.get(reference))[0])
        if volume.spec.block:
            raise InvalidArgument("volume", volume.name, "a volume with a filesystem: this is a device")
        holder = f"copy {new_id()[:12]}"
        await self._volumes.staging.hold(volume, holder)
        try:
            async with self._volumes.root(volume.id) as root:
                yield root
        finally:
            await self._volumes.staging.release(volume, holder)


def _look(root: int, path: str) -> PathInfo:
    if "\0" in path or ".." in path.split("/"):
        raise InvalidArgument("path", path, "a path in the volume, without '..'")
    clean = path.strip("/")
    parent, _, name = clean.rpartition("/")
    try:
        with closing(open_in_root(root, parent or ".", os.O_PATH | os.O_DIRECTORY)) as directory:
            status = os.stat(name or ".", dir_fd=directory, follow_symlinks=False)
            link = os.readlink(name, dir_fd=directory) if stat.S_ISLNK(status.st_mode) else ""
    except KernelError as error:
        raise _missing(path, error) from error
    except OSError as error:
        raise _missing(path, KernelError(error.errno or errno.EIO, "looking at", path)) from error
    return PathInfo(name, status.st_mode, status.st_size, status.st_mtime, link)


def _directory(root: int, path: str, *, make: bool) -> int:
    """Open the directory at a path, made where it is missing."""
    if "\0" in path or ".." in path.split("/"):
        raise InvalidArgument("path", path, "a path in the volume, without '..'")
    clean, flags = path.strip("/"), os.O_RDONLY | os.O_DIRECTORY
    try:
        if make and clean:
            parent, _, name = clean.rpartition("/")
            with closing(open_in_root(root, parent or ".", flags)) as directory, suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=directory)
        return open_in_root(root, clean or ".", flags)
    except KernelError as error:
        raise _missing(path, error) from error
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "making the directory", path) from error


def _missing(path: str, error: KernelError) -> NetstoreError:
    if error.errno == errno.ENOENT:
        return NotFound("path", f"/{path.strip('/')} in the volume")
    if error.errno == errno.ENOTDIR:
        return InvalidArgument("path", path, "a path whose parents are directories")
    return error


def _unpack(source: object, directory: int, *, harmless: bool) -> Unpacked:
    try:
        return unpack(source, directory, harmless=harmless)  # type: ignore[arg-type]
    finally:
        source.close()  # type: ignore[attr-defined]


def _write(writing: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(writing, view) :]
