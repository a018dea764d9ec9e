"""A container's mounts from what the store says of them to trees that can be attached: filled, owned, staged."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from netstore.errors import KernelError
from netstore.kernel.paths import closing, open_in_root
from netstore.launcher.filesystem import Directories
from netstore.launcher.images.catalogue import Images
from netstore.launcher.trees import make_tree, open_source
from netstore.launcher.users import resolve
from netstore.model import Container, Image, Mount, MountType, Volume
from netstore.store import Store
from netstore.threads import in_thread
from netstore.volumes.copyup import copy_up
from netstore.volumes.manager import VolumeManager, open_data
from netstore.volumes.ownership import begin, give, has_owner

__all__ = ["Mounting"]


class Mounting:
    """Makes what mounts show, and the trees of them."""

    def __init__(self, store: Store, volumes: VolumeManager, images: Images, directories: Directories) -> None:
        self._store = store
        self._volumes = volumes
        self._images = images
        self._directories = directories

    async def tree(self, mount: Mount) -> int:
        """Return the detached tree of a mount, whose volume is staged; the caller closes it.

        Raises:
            FailedPrecondition, Unsupported, KernelError: see `make_tree`.
        """
        layers: Sequence[Path] = ()
        if mount.spec.type is MountType.IMAGE:
            image = await self._store.read(lambda tx: tx.images.require(mount.source))
            layers = self._images.layers.stack(image.layers)
        async with self._root(mount) as root:
            return await in_thread(make_tree, mount, root=root, layers=layers)

    def tree_of(self, mount: Mount, volume: Volume | None, layers: Sequence[str]) -> int:
        """Do what `tree` does, in the calling thread; the volume's lock is held."""
        stack = self._images.layers.stack(layers) if layers else ()
        if volume is None:
            return make_tree(mount, layers=stack)
        with closing(open_data(volume)) as root:
            return make_tree(mount, root=root)

    def source_of(self, mount: Mount, volume: Volume | None) -> int:
        """Return an O_PATH descriptor of what a volume's mount or a bind shows; the caller closes it. Blocking.

        Raises:
            FailedPrecondition: it is not there.
        """
        if volume is None:
            return open_source(mount, None)
        with closing(open_data(volume)) as root:
            return open_source(mount, root)

    @asynccontextmanager
    async def _root(self, mount: Mount) -> AsyncIterator[int | None]:
        if not mount.volume_id:
            yield None
            return
        async with self._volumes.root(mount.volume_id) as root:
            yield root

    async def fill(self, container: Container, image: Image, mounts: Sequence[Mount]) -> None:
        """Make missing sources of binds, copy the image's content into empty volumes, and give to the container's user
        what is to be.

        Raises:
            Exhausted: no space is left in a volume.
        """
        for mount in mounts:
            if mount.spec.type is MountType.BIND and mount.spec.create_source:
                await in_thread(_make_source, Path(mount.source))
        wanted = [mount for mount in mounts if mount.spec.chown or _copied(mount)]
        holder = f"copy-up of {container.id}"
        await self._volumes.hold((mount.volume_id for mount in wanted), holder)
        try:
            for mount in wanted:
                if _copied(mount):
                    await self._copy_up(container, image, mount)
                if mount.spec.chown:
                    await self.give(container, image, mount)
        finally:
            await self._volumes.staging.release_all(holder)

    async def _copy_up(self, container: Container, image: Image, mount: Mount) -> None:
        """Copy under the volume's lock: who else fills it, or is about to mount it, waits."""
        volume, users = await self._volumes.get(mount.volume_id)
        if volume.spec.block:
            return

        def work() -> None:
            with closing(self._directories.overlay(container.id, image.layers)) as rootfs:
                try:
                    source = open_in_root(rootfs, mount.spec.target, os.O_RDONLY | os.O_DIRECTORY)
                except KernelError:  # the image has nothing there
                    return
                with closing(source):
                    copied = copy_up(source, Path(mount.source), inside=len(users) > 1)
            if copied and has_owner(volume.spec):  # what was asked for, not what the image's directory has
                begin(Path(mount.source), volume.spec, empty=False)

        async with self._volumes.staging.alone(volume):
            await in_thread(work)

    async def give(self, container: Container, image: Image, mount: Mount) -> None:
        """Give what a mount shows to the container's user."""

        def work(root: int | None) -> None:
            if root is not None and stat.S_ISBLK(os.fstat(root).st_mode):
                return  # the node is the host's
            with closing(self._directories.open_root(container.id, image.layers)) as rootfs:
                user = resolve(rootfs, container.spec.user or image.config.user)
            with closing(open_source(mount, root)) as source:
                give(source, user.uid, user.gid)

        async with self._root(mount) as root:
            await in_thread(work, root)

    async def stage(self, container: Container) -> list[tuple[Mount, Path | None]]:
        """Stage a container's mounts, but those of memory, and return where each is.

        Raises:
            FailedPrecondition, Unsupported, KernelError: see `make_tree`.
        """
        await in_thread(self._directories.unstage, container.id)
        staged: list[tuple[Mount, Path | None]] = []
        for number, mount in enumerate(container.mounts):
            if mount.spec.type is MountType.TMPFS:
                staged.append((mount, None))
                continue
            with closing(await self.tree(mount)) as tree:
                staged.append((mount, await in_thread(self._directories.stage, container.id, number, tree)))
        return staged


def _make_source(source: Path) -> None:
    """Make a directory where there is nothing."""
    if source.exists():
        return
    try:
        source.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KernelError(error.errno or errno.EIO, "making the source of a bind,", str(source)) from error


def _copied(mount: Mount) -> bool:
    """As Docker: into whole volumes only."""
    return bool(mount.volume_id) and not mount.spec.no_copy and not mount.spec.subpath
