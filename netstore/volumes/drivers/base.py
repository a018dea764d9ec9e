"""The interface of volume drivers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from netstore.drivers.options import Option
from netstore.errors import NetstoreError
from netstore.model import Volume, VolumeSpec

__all__ = ["VolumeDriver", "load_drivers"]


class VolumeDriver(ABC):
    """Makes volumes real. All verbs but `validate` block; `apply` is idempotent, `remove` tolerates what is gone."""

    name: str
    options: Sequence[Option] = ()

    def __init__(self, root: Path) -> None:
        self.root = root

    @abstractmethod
    def validate(self, spec: VolumeSpec) -> None:
        """Check a spec. Pure.

        Raises:
            InvalidArgument, Unsupported: naming the field.
        """

    @abstractmethod
    def mountpoint(self, volume: Volume) -> Path:
        """Return where the volume's data is. Pure."""

    @abstractmethod
    def apply(self, volume: Volume) -> None:
        """Make the volume's storage where it is missing."""

    @abstractmethod
    def remove(self, volume: Volume) -> None:
        """Remove the volume's storage."""

    @abstractmethod
    def observe(self) -> set[str]:
        """Return the names of the volumes whose storage there is."""

    @abstractmethod
    def usage(self, volume: Volume) -> int:
        """Return the bytes that the volume holds."""


def load_drivers(root: Path) -> dict[str, VolumeDriver]:
    """Return every driver that the entry point group `netstore.volume_drivers` names, by its name.

    Raises:
        NetstoreError: one cannot be loaded.
    """
    drivers: dict[str, VolumeDriver] = {}
    for point in entry_points(group="netstore.volume_drivers"):
        try:
            drivers[point.name] = point.load()(root)
        except Exception as error:
            raise NetstoreError(
                f"loading volume driver {point.name} ({point.value}): {error}", hint="repair or remove its package"
            ) from error
    return drivers
