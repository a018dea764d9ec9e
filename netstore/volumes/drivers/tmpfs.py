"""The driver `tmpfs`: memory that outlives containers, but not the node's uptime."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from netstore.drivers.options import Option, mode, number
from netstore.errors import InvalidArgument, KernelError
from netstore.kernel.files import remove_tree
from netstore.kernel.filesystems import mount, unmount_all
from netstore.kernel.mounts import is_mount_point
from netstore.model import Volume, VolumeSpec
from netstore.volumes.drivers.base import Capability, VolumeDriver, os_error

__all__ = ["TmpfsDriver"]


class TmpfsDriver(VolumeDriver):
    """A tmpfs, mounted from create to remove: what containers leave in it, the next ones find."""

    name = "tmpfs"
    options = (
        Option("mode", mode, None, "mode of its root, octal; by default 0755"),
        Option("uid", number(0, 2**32 - 2), 0, "owner of its root"),
        Option("gid", number(0, 2**32 - 2), 0, "group of its root"),
        Option("inodes", number(1, 2**40), 0, "most files and directories; by default the kernel's"),
    )
    capabilities = frozenset({Capability.SIZE, Capability.GROW, Capability.SHRINK})

    def validate(self, spec: VolumeSpec) -> None:
        """Check a spec: without a size the kernel's default holds, half of the memory."""
        super().validate(spec)
        if 0 < spec.size_bytes < 4096:
            raise InvalidArgument("spec.size_bytes", spec.size_bytes, "at least 4096, or 0 for half of the memory")

    def stages(self, volume: Volume) -> bool:
        """No: its data is the mount."""
        return False

    def available_bytes(self) -> int:
        """Return the memory that nobody uses."""
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def enforcement(self, volume: Volume) -> str:
        """Name it."""
        return "tmpfs"

    def create(self, volume: Volume) -> None:
        """Mount it."""
        target = self.mountpoint(volume)
        if is_mount_point(target):
            return
        values = self.parsed(volume.spec)
        access = 0o755 if values["mode"] is None else values["mode"]
        options = f"mode={access:o},uid={values['uid']},gid={values['gid']},nosuid,nodev"
        options += f",nr_inodes={values['inodes']}" if values["inodes"] else ""
        try:
            target.mkdir(parents=True, exist_ok=True, mode=0o755)
            mount("netstore", target, "tmpfs", options + _size(volume.spec.size_bytes))
        except OSError as error:
            self.remove(volume)
            raise os_error(error, "making the directory of", volume) from error
        except BaseException:
            self.remove(volume)
            raise

    def remove(self, volume: Volume) -> None:
        """Unmount it, which frees the memory, and remove its directory."""
        unmount_all(self.mountpoint(volume), lazy=True)
        remove_tree(self.directory(volume))

    def stage(self, volume: Volume) -> None:
        """Do what `create` does."""
        self.create(volume)

    def unstage(self, volume: Volume) -> None:
        """Do nothing."""

    def _is_whole(self, directory: Path) -> bool:
        return is_mount_point(directory / "_data")

    def resize(self, volume: Volume, size_bytes: int) -> None:
        """Change the size, down to what is used."""
        try:
            mount("none", self.mountpoint(volume), "tmpfs", "remount,nosuid,nodev" + _size(size_bytes))
        except KernelError as error:
            if error.errno != errno.EINVAL:
                raise
            used = self.usage(volume).used_bytes
            raise InvalidArgument("spec.size_bytes", size_bytes, f"at least what is used, {used}") from error


def _size(size_bytes: int) -> str:
    return f",size={size_bytes}" if size_bytes else ""
