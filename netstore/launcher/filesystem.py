"""A container's directory: its writable layer, its root filesystem, and the three files that it has of its own.

containers/<id>/diff     what it wrote, kept over restarts
containers/<id>/work     overlayfs's own
containers/<id>/rootfs   where the root filesystem is mounted while it runs
containers/<id>/mounts   where its mounts wait for the runtime to take them, while it is created
containers/<id>/…        config.json, hosts, hostname, resolv.conf, pid files, container.log
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from netstore.errors import KernelError
from netstore.kernel.files import remove_tree
from netstore.kernel.mounts import MS_PRIVATE, attach, detach, is_mount_point, overlay, set_attributes, unmount
from netstore.kernel.paths import closing, open_in_root
from netstore.launcher.images.layers import Layers

__all__ = ["Directories", "make_directory"]


class Directories:
    """The containers' directories below one root. Blocking."""

    def __init__(self, root: Path, layers: Layers) -> None:
        self._root = root
        self._trash = root.with_name("containers-removed")
        self._layers = layers

    def path(self, container_id: str) -> Path:
        """Return a container's directory."""
        return self._root / container_id

    def log(self, container_id: str) -> Path:
        """Return a container's log."""
        return self.path(container_id) / "container.log"

    def make(self, container_id: str) -> None:
        """Make a container's directory."""
        for name in ("diff", "work", "rootfs"):
            (self.path(container_id) / name).mkdir(parents=True, mode=0o755)
        self.path(container_id).chmod(0o710)

    def overlay(self, container_id: str, layers: Sequence[str]) -> int:
        """Return a detached mount of a container's root filesystem; the caller closes it."""
        place = self.path(container_id)
        return overlay([self._layers.path(layer) for layer in reversed(layers)], place / "diff", place / "work")

    def open_root(self, container_id: str, layers: Sequence[str]) -> int:
        """Return a container's root filesystem, that of its run or a detached one; the caller closes it."""
        target = self.path(container_id) / "rootfs"
        if is_mount_point(target):
            return os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return self.overlay(container_id, layers)

    def mount(self, container_id: str, layers: Sequence[str]) -> Path:
        """Mount a container's root filesystem and return where."""
        target = self.path(container_id) / "rootfs"
        if not is_mount_point(target):
            with closing(self.overlay(container_id, layers)) as mount:
                attach(mount, target)
                set_attributes(mount, str(target), propagation=MS_PRIVATE)
        return target

    def stage(self, container_id: str, number: int, tree: int) -> Path:
        """Attach a mount where only root can reach it, for the runtime to bind, and return where."""
        target = self.path(container_id) / "mounts" / str(number)
        target.parent.mkdir(exist_ok=True, mode=0o700)
        if stat.S_ISDIR(os.fstat(tree).st_mode):
            target.mkdir()
        else:
            target.touch()
        attach(tree, target)
        return target

    def unstage(self, container_id: str) -> None:
        """Detach what is staged; the container keeps what the runtime has taken."""
        place = self.path(container_id) / "mounts"
        try:
            staged = list(place.iterdir())
        except FileNotFoundError:
            return
        for target in staged:  # all of them first: a bind of what is above us shows the others, and keeps them busy
            while detach(target):
                pass
        for target in staged:
            # Never rmtree: if something were mounted still, this fails.
            if target.is_dir():
                target.rmdir()
            else:
                target.unlink()
        place.rmdir()

    def unmount(self, container_id: str) -> None:
        """Unmount a container's root filesystem and what is staged; what is not mounted is a success."""
        self.unstage(container_id)
        target = self.path(container_id) / "rootfs"
        while is_mount_point(target):
            unmount(target, lazy=True)

    def remove(self, container_id: str) -> None:
        """Remove a container's directory: out of sight at once, then file by file."""
        self.unmount(container_id)
        self._trash.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self.path(container_id).rename(self._trash / container_id)
        except FileNotFoundError:
            return
        remove_tree(self._trash / container_id)

    def clean(self, known: Iterable[str]) -> list[str]:
        """Remove what belongs to no container and return its names."""
        self._root.mkdir(parents=True, exist_ok=True, mode=0o710)
        remove_tree(self._trash)
        orphans = sorted({path.name for path in self._root.iterdir()} - set(known))
        for name in orphans:
            self.remove(name)
        return orphans


def make_directory(rootfs: int, path: str, uid: int, gid: int) -> None:
    """Make a directory that the image lacks, such as the working directory; links stay inside the root."""
    made = ""
    for part in [part for part in path.split("/") if part]:
        parent, made = made or "/", f"{made}/{part}"
        try:
            os.close(open_in_root(rootfs, made, os.O_PATH | os.O_DIRECTORY))
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            with closing(open_in_root(rootfs, parent, os.O_RDONLY | os.O_DIRECTORY)) as directory:
                os.mkdir(part, 0o755, dir_fd=directory)
                os.chown(part, uid, gid, dir_fd=directory)
