"""The interface of volume drivers.

A volume's storage is made by `create` and gone after `remove`. Between them `stage` makes its filesystem appear on the
node, at `mountpoint`, and `unstage` takes it away (CSI: NodeStageVolume); what is published into a container is always
a bind of what is staged. Who counts the users is the manager, never a driver.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from netstore.drivers.options import Option, mode, number, parse
from netstore.errors import InvalidArgument, KernelError, NetstoreError, Unsupported
from netstore.kernel.filesystems import mounts_below, space
from netstore.kernel.mounts import is_mount_point
from netstore.model import Volume, VolumeSpec

__all__ = ["OWNER", "Capability", "Node", "Observed", "Usage", "VolumeDriver", "load_drivers"]


OWNER = (
    Option("uid", number(0, 2**32 - 2), None, "owner of its root, while it is empty; by default root"),
    Option("gid", number(0, 2**32 - 2), None, "group of its root, likewise"),
    Option("mode", mode, None, "mode of its root, octal, likewise; by default 0755"),
)
"""For drivers whose volumes begin as an empty directory: `Staging` gives it to its owner."""


class Capability(StrEnum):
    """What a driver can beyond the verbs that every one has."""

    SIZE = "size"  # holds a size: writing past it fails
    GROW = "grow"  # the size grows while the volume is used
    SHRINK = "shrink"  # it also shrinks, down to what is used
    SNAPSHOT = "snapshot"  # snapshot, remove_snapshot, restore
    CLONE = "clone"  # clone, from a volume or a snapshot
    BLOCK = "block"  # may be published as a device node


@dataclass(frozen=True, slots=True)
class Node:
    """What a driver knows of its node: the state directory, and the settings of `[volumes]`."""

    state_dir: Path
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a volume holds. None is not known without a walk through its directories; `size_bytes` 0 is no limit."""

    used_bytes: int | None = None
    inodes_used: int | None = None
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Observed:
    """Ids of what a driver finds: `present` is any trace, `whole` what `create` finished, `staged` what is mounted."""

    present: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    staged: frozenset[str] = frozenset()


class VolumeDriver(ABC):
    """Makes volumes real.

    All verbs but `validate`, `mountpoint` and `stages` block; all are idempotent, and those that undo tolerate what is
    gone. A volume's traces are one directory named by its id, so that what no row owns is found and reaped.
    """

    name: str
    options: Sequence[Option] = ()
    capabilities: frozenset[Capability] = frozenset()
    devices = False
    """Its volumes are devices that come and go: `is_there`."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.root = node.state_dir / "volumes" / self.name

    def parsed(self, spec: VolumeSpec) -> dict[str, Any]:
        """Return the typed value of every option.

        Raises:
            InvalidArgument: naming the option.
        """
        return parse(self.options, spec.options)

    def validate(self, spec: VolumeSpec) -> None:
        """Check a spec. Pure.

        Raises:
            InvalidArgument, Unsupported: naming the field.
        """
        self.parsed(spec)
        if spec.block and Capability.BLOCK not in self.capabilities:
            raise InvalidArgument("spec.mode", "BLOCK", f"a filesystem: the driver {self.name} has no devices")
        if spec.size_bytes and Capability.SIZE not in self.capabilities:
            raise Unsupported(
                f"spec.size_bytes: the driver {self.name}: {self.cannot_hold_size()}",
                hint="leave out the driver, or the size",
            )

    def directory(self, volume: Volume) -> Path:
        """Return where the volume's traces are. Pure."""
        return self.root / volume.id

    def mountpoint(self, volume: Volume) -> Path:
        """Return where the volume's data is once it is staged. Pure."""
        return self.directory(volume) / "_data"

    def stages(self, volume: Volume) -> bool:
        """Say whether staging does anything: a directory is always there. Pure."""
        return True

    def start(self) -> None:  # noqa: B027 (most need nothing)
        """Prepare what all volumes need, such as a pool; called once, before all else.

        Raises:
            NetstoreError: it cannot be made; volumes that need it fail.
        """

    @property
    def available(self) -> str:
        """Return why the driver makes no volumes on this node, "" when it does."""
        return ""

    def available_bytes(self) -> int:
        """Return how much new volumes can still take on this node; 0 when that is not the node's to say."""
        place = next(each for each in (self.root, *self.root.parents) if each.exists())
        return space(place).free_bytes

    def cannot_hold_size(self) -> str:
        """Return why the driver holds no size on this node, "" when it does. Does not block."""
        return "" if Capability.SIZE in self.capabilities else "it holds no size"

    def enforcement(self, volume: Volume) -> str:
        """Say in a few words what holds the volume's size, "" when nothing does. Pure."""
        return ""

    @abstractmethod
    def create(self, volume: Volume) -> None:
        """Make the volume's storage where it is missing: wholly or not at all."""

    @abstractmethod
    def remove(self, volume: Volume) -> None:
        """Remove the volume's storage; unstages it first."""

    @abstractmethod
    def stage(self, volume: Volume) -> None:
        """Make the volume's data appear at `mountpoint`."""

    @abstractmethod
    def unstage(self, volume: Volume) -> None:
        """Take it away from there. What containers have mounted stays theirs."""

    def staged(self, volume: Volume) -> bool:
        """Say whether the volume's data is at `mountpoint`; asks no server."""
        return not self.stages(volume) or is_mount_point(self.mountpoint(volume))

    def ask(self, volume: Volume) -> None:  # noqa: B027 (most ask nobody)
        """See that whoever has the data of a staged volume answers: who opens what a server has that is gone waits in
        the kernel, and cannot be stopped.

        Raises:
            Unavailable: no answer.
        """

    def observe(self) -> Observed:
        """Return what there is."""
        try:
            present = {path.name for path in self.root.iterdir() if not path.name.startswith(".")}
        except FileNotFoundError:
            return Observed()
        whole = {name for name in present if self._is_whole(self.root / name)}
        staged = {Path(path).parent.name for path in mounts_below(self.root) if path.endswith("/_data")}
        return Observed(frozenset(present), frozenset(whole), frozenset(staged & present))

    def _is_whole(self, directory: Path) -> bool:
        return True

    def usage(self, volume: Volume) -> Usage:
        """Return what the volume holds, without walking through it."""
        if volume.spec.block or not is_mount_point(self.mountpoint(volume)):
            return Usage(size_bytes=volume.spec.size_bytes)
        found = space(self.mountpoint(volume))
        return Usage(found.used_bytes, found.inodes_used, found.size_bytes)

    def measure(self, volume: Volume) -> int:
        """Return the bytes of the node's storage that the volume takes. May be slow: for df and prune alone."""
        return self.usage(volume).used_bytes or 0

    def health(self, volume: Volume) -> str:
        """Return what is wrong with the volume, "" when nothing is."""
        if not self._is_whole(self.directory(volume)):
            return "its storage is missing"
        return ""

    def resize(self, volume: Volume, size_bytes: int) -> None:
        """Change the size; the volume may be staged.

        Raises:
            InvalidArgument: it cannot have that size.
            Unsupported: the driver or the kernel cannot.
        """
        raise self._cannot("changes no size")

    def trim(self, volume: Volume) -> int:
        """Give blocks that the filesystem of a staged volume no longer uses back to what it lies on; returns the bytes.

        Raises:
            Unsupported: it has none to give back.
        """
        raise self._cannot("trims nothing")

    def thin(self, volume: Volume) -> bool:
        """Say whether the volume takes space of the node only as it is used, so that a full node loses writes. Pure."""
        return False

    def is_there(self, volume: Volume) -> bool:
        """Say whether the volume's device is connected."""
        return True

    def fits(self, volume: Volume) -> bool:
        """Say whether the volume has the size that its spec says; not so after a crash in the middle of `resize`."""
        return True

    def snapshot(self, volume: Volume, snapshot_id: str) -> None:
        """Keep the volume's data as it is now, read-only, under an id. Of one moment, also while it is written."""
        raise self._cannot("has no snapshots")

    def remove_snapshot(self, volume: Volume, snapshot_id: str) -> None:
        """Remove a snapshot."""
        raise self._cannot("has no snapshots")

    def snapshots(self, volume: Volume) -> set[str]:
        """Return the ids of the snapshots that there are."""
        return set()

    def snapshot_bytes(self, volume: Volume, snapshot_id: str) -> int:
        """Return the storage that a snapshot takes, where that is known, else 0."""
        return 0

    def restore(self, volume: Volume, snapshot_id: str) -> None:
        """Make the volume's data that of a snapshot; the volume must not be staged. The old data goes last."""
        raise self._cannot("has no snapshots")

    def clone(self, source: Volume, snapshot_id: str, target: Volume) -> None:
        """Make the storage of `target` a copy of a volume, or of its snapshot unless `snapshot_id` is ""."""
        raise self._cannot("makes no clones")

    def _cannot(self, what: str) -> Unsupported:
        return Unsupported(f"the driver {self.name} {what}", hint="`netstore volume drivers` shows which does")

    def _refuse_smaller(self, volume: Volume, size_bytes: int) -> None:
        if size_bytes < volume.spec.size_bytes:
            raise InvalidArgument(
                "spec.size_bytes", size_bytes, f"at least {volume.spec.size_bytes}: {self.name} does not shrink"
            )


def os_error(error: OSError, doing: str, volume: Volume) -> KernelError:
    """Turn what the kernel said about a volume's files into an error of ours."""
    return KernelError(error.errno or 0, doing, f"volume {volume.name}", hint=_HINTS.get(error.errno or 0, ""))


_HINTS = {28: "free some space on the file system of the state directory", 30: "mount the state directory writable"}


def load_drivers(node: Node) -> dict[str, VolumeDriver]:
    """Return every driver that the entry point group `netstore.volume_drivers` names, by its name.

    Raises:
        NetstoreError: one cannot be loaded.
    """
    drivers: dict[str, VolumeDriver] = {}
    for point in entry_points(group="netstore.volume_drivers"):
        try:
            drivers[point.name] = point.load()(node)
        except Exception as error:
            raise NetstoreError(
                f"loading volume driver {point.name} ({point.value}): {error}", hint="repair or remove its package"
            ) from error
    return drivers
