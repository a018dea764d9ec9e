"""What is due by itself: snapshots of schedules (those missed while down: one), the trash, a look at the disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import structlog

from netstore.errors import NetstoreError
from netstore.model import Kind, Volume
from netstore.store import Store, Transaction
from netstore.threads import in_thread
from netstore.volumes.removal import Removal
from netstore.volumes.reserve import Reserve
from netstore.volumes.schedules import Schedule
from netstore.volumes.snapshots import Snapshots

__all__ = ["DEFAULT_KEEP", "Chores"]

log = structlog.get_logger(__name__)

DEFAULT_KEEP = 24
_PASS_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class _Due:
    volume: Volume
    at: float


class Chores:
    """Does what is due while it runs."""

    def __init__(self, store: Store, snapshots: Snapshots, removal: Removal, reserve: Reserve) -> None:
        self._store = store
        self._reserve = reserve
        self._snapshots = snapshots
        self._removal = removal
        self._woken = asyncio.Event()
        self.sweeps: list[Callable[[], None]] = []  # what else is to be done from time to time; may block

    def wake(self) -> None:
        """Look again: a schedule has changed."""
        self._woken.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Do what is due, until the block ends."""
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._run(), name="volume chores")
            yield
            task.cancel()

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            wait, now = _PASS_SECONDS, time.time()  # one time for all: a clock that jumps meanwhile is the next pass's
            try:
                await self._follow_clock(now)
                for due in await self._store.read(_schedules):
                    if due.at <= now:
                        await self._take(due.volume)
                        wait = 0.0
                    else:
                        wait = min(wait, due.at - now)
                await self._reserve.look()
                await self._removal.empty(only_expired=True)
                if self._removal.expire:
                    await self._removal.expire()
                for sweep in self.sweeps:
                    await in_thread(sweep)
            except (NetstoreError, OSError) as error:
                log.error("a chore failed", error=str(error))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), max(wait, 0.05))

    async def _follow_clock(self, now: float) -> None:
        """Count schedules from now where the last snapshot is ahead of us: the clock went back."""
        ahead = "SELECT count(*) FROM snapshot_schedules WHERE last > ?"
        if (await self._store.read(lambda tx: tx.rows(ahead, now)))[0][0]:
            await self._store.write(
                lambda tx: tx.execute("UPDATE snapshot_schedules SET last = ? WHERE last > ?", now, now)
            )

    async def _take(self, volume: Volume) -> None:
        """Make a volume's snapshot, and remove those that are too many."""
        try:
            name = time.strftime("auto-%Y%m%dT%H%M%SZ", time.gmtime())
            await self._snapshots.create(volume.id, name, labels={}, scheduled=True)
            scheduled = [each for each, _ in await self._snapshots.all(volume.id) if each.scheduled]
            for old in scheduled[: -(volume.spec.snapshot_keep or DEFAULT_KEEP)]:
                await self._snapshots.delete(volume.id, old.id)
        except NetstoreError as error:
            log.error("a scheduled snapshot failed", volume=volume.name, error=str(error))
            attributes = {"error": error.what}
            await self._store.write(
                lambda tx: tx.event(Kind.VOLUME, "snapshot-failed", volume.id, volume.name, **attributes)
            )
        await self._store.write(
            lambda tx: tx.execute("UPDATE snapshot_schedules SET last = ? WHERE volume_id = ?", time.time(), volume.id)
        )


def _schedules(tx: Transaction) -> list[_Due]:
    found = []
    for volume_id, last in tx.rows("SELECT volume_id, last FROM snapshot_schedules"):
        volume = tx.volumes.get(volume_id)
        if volume and volume.spec.snapshot_schedule and not volume.filling:
            found.append(_Due(volume, Schedule.parse(volume.spec.snapshot_schedule).after(last)))
    return found
