"""Watches disks come and go: volumes of the driver block are mounted again, or let go, and it is told as an event."""

from __future__ import annotations

import asyncio
from types import TracebackType

from netstore.kernel.devices import DiskEvents
from netstore.networks.watch import Soon
from netstore.volumes.manager import VolumeManager

__all__ = ["DiskWatch"]


class DiskWatch:
    """Lets the manager look at its devices soon after one came or went."""

    def __init__(self, manager: VolumeManager) -> None:
        self._manager = manager
        self._events = DiskEvents()
        self._look = Soon("look at devices", manager.look_at_devices)

    def __enter__(self) -> DiskWatch:
        asyncio.get_running_loop().add_reader(self._events.fileno(), self._read)
        self._look.ask()  # for what changed while nobody watched
        return self

    def _read(self) -> None:
        if self._events.drain():
            self._look.ask()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._events.fileno())
        self._look.cancel()
