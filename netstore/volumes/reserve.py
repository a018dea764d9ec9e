"""What the node's disk has to spare for volumes that take its space only as they are used: full, it loses writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from netstore.kernel.files import spare_bytes
from netstore.store import Store, Transaction
from netstore.threads import in_thread
from netstore.volumes import rows
from netstore.volumes.drivers.base import VolumeDriver

__all__ = ["Reserve"]


class Reserve:
    """Tells, as events of those volumes, when the disk of the state directory runs low and when it has room again."""

    def __init__(self, store: Store, drivers: Mapping[str, VolumeDriver], state_dir: Path) -> None:
        self._store = store
        self._drivers = drivers
        self._state_dir = state_dir
        self._low = False

    async def look(self) -> None:
        """Look once: one statvfs(3), and the rows of volumes only when it has changed."""
        low = await in_thread(spare_bytes, self._state_dir) < 0
        if low == self._low:
            return

        def tell(tx: Transaction) -> None:
            for volume in tx.volumes.all():
                driver = self._drivers.get(volume.spec.driver)
                if driver and driver.thin(volume):
                    rows.note(tx, volume, "space-low" if low else "space-enough")

        await self._store.write(tell)
        self._low = low
