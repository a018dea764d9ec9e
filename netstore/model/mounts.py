"""Mounts: what containers, and namespaces of others, see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["ForeignMount", "IdMapping", "Mount", "MountRef", "MountSpec", "MountType"]


class MountType(StrEnum):
    """What is mounted."""

    VOLUME = "volume"
    BIND = "bind"
    TMPFS = "tmpfs"
    IMAGE = "image"


@dataclass(frozen=True, slots=True)
class IdMapping:
    """`count` ids from `stored_id` on show as those from `mount_id` on."""

    stored_id: int
    mount_id: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MountSpec:
    """What a container asks to see at `target`."""

    target: str
    type: MountType = MountType.VOLUME
    source: str = ""
    read_only: bool = False
    no_copy: bool = False
    create_source: bool = False
    propagation: str = ""
    tmpfs_size_bytes: int = 0
    tmpfs_mode: int = 0
    tmpfs_options: tuple[str, ...] = ()
    volume_driver: str = ""
    volume_options: Mapping[str, str] = field(default_factory=dict)
    volume_labels: Mapping[str, str] = field(default_factory=dict)
    subpath: str = ""
    recursive: str = ""
    no_exec: bool = False
    no_suid: bool = False
    no_dev: bool = False
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()
    chown: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A resolved mount of a container: `source` is a host path, an image's id, or "" for tmpfs; `volume_id` and
    `volume` are "" where it is no volume's. `made` are the paths inside that were made for an attached one.
    """

    spec: MountSpec
    source: str = ""
    volume_id: str = ""
    volume: str = ""
    attached: bool = False
    made: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MountRef:
    """How a caller names a mount namespace: one of the three."""

    container: str = ""
    pid: int = 0
    path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignMount:
    """A mount in a namespace that is no container's. `inode` is the namespace's, `start_time` (clock ticks) tells the
    process from its pid's next owner.
    """

    id: str
    ref: MountRef
    inode: int
    mount: Mount
    start_time: int = 0
    create_time: float = 0.0
    revision: int = 0
