"""Volumes, their snapshots, the trash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["Consistency", "Snapshot", "TrashedVolume", "Volume", "VolumeSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeSpec:
    """What was asked for. `block` is the mode: a device node instead of a filesystem."""

    driver: str = "local"
    options: Mapping[str, str] = field(default_factory=dict)
    size_bytes: int = 0
    snapshot_schedule: str = ""
    snapshot_keep: int = 0
    block: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """Named storage that outlives containers."""

    id: str
    name: str
    spec: VolumeSpec
    labels: Mapping[str, str] = field(default_factory=dict)
    mountpoint: str = ""
    anonymous: bool = False
    filling: str = ""
    create_time: float = 0.0
    revision: int = 0


class Consistency(StrEnum):
    """What a copy of a volume is of: one moment while it was used, a volume that nobody used, or files one by one."""

    MOMENT = "moment"
    UNUSED = "unused"
    LIVE = "live"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A read-only point in time of a volume. `scheduled` ones go by themselves when there are newer ones enough."""

    id: str
    name: str
    volume_id: str
    labels: Mapping[str, str] = field(default_factory=dict)
    consistency: Consistency = Consistency.UNUSED
    frozen_seconds: float = 0.0
    size_bytes: int = 0
    scheduled: bool = False
    create_time: float = 0.0
    revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrashedVolume:
    """A volume that was removed and can come back until `expire_time`, or as long after it was removed as that is:
    `boot` and `uptime` are that moment for `clock.since`.
    """

    volume: Volume
    remove_time: float
    expire_time: float
    revision: int = 0
    boot: str = ""
    uptime: float = 0.0

    @property
    def id(self) -> str:
        """The volume's id."""
        return self.volume.id

    @property
    def create_time(self) -> float:
        """When it was removed: lists are ordered by it."""
        return self.remove_time
