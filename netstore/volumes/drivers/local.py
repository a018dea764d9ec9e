"""The driver `local`: a directory, `volumes/<name>/_data` below the state directory, as Docker's."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from netstore.drivers.options import parse
from netstore.errors import KernelError, Unsupported
from netstore.model import Volume, VolumeSpec
from netstore.volumes.drivers.base import VolumeDriver

__all__ = ["LocalDriver"]


class LocalDriver(VolumeDriver):
    """Data in `_data`, owned by root, 0755; the directory above it is closed to others."""

    name = "local"

    def __init__(self, root: Path) -> None:
        super().__init__(root / "volumes")
        self._trash = root / "volumes-removed"
        self.root.mkdir(parents=True, exist_ok=True, mode=0o701)
        shutil.rmtree(self._trash, ignore_errors=True)
        self._trash.mkdir(mode=0o700)

    def validate(self, spec: VolumeSpec) -> None:
        """Take no option and no size."""
        parse(self.options, spec.options)
        if spec.size_bytes:
            raise Unsupported("spec.size_bytes: the driver local sets no size limit", hint="leave it out")

    def mountpoint(self, volume: Volume) -> Path:
        """Return the data's directory."""
        return self.root / volume.name / "_data"

    def apply(self, volume: Volume) -> None:
        """Make the directory, durably."""
        data = self.mountpoint(volume)
        try:
            data.parent.mkdir(exist_ok=True, mode=0o701)
            data.mkdir(exist_ok=True, mode=0o755)
            for directory in (data.parent, self.root):
                descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                os.fsync(descriptor)
                os.close(descriptor)
        except OSError as error:
            raise KernelError(error.errno or errno.EIO, "making the directory of volume", volume.name) from error

    def remove(self, volume: Volume) -> None:
        """Move the directory out of sight, then remove it: on ext4 files made soon after many are removed are slow."""
        hidden = self._trash / volume.id
        try:
            (self.root / volume.name).rename(hidden)
        except FileNotFoundError:
            return
        shutil.rmtree(hidden, ignore_errors=True)

    def observe(self) -> set[str]:
        """Return the names of the directories."""
        return {path.name for path in self.root.iterdir() if (path / "_data").is_dir()}

    def usage(self, volume: Volume) -> int:
        """Add up the sizes of the files."""
        total = 0
        for directory, _, names in os.walk(self.mountpoint(volume)):
            total += sum(os.lstat(os.path.join(directory, name)).st_size for name in names)
        return total
