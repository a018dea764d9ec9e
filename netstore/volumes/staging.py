"""Staging: a volume's filesystem is on the node while somebody holds it, and no longer.

Holders are counted here, in memory. Who holds lasting claims says so again after a restart: the launcher for the
containers that run, engines by the rows of `volume_stages`. `settle` then takes away what nobody claimed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import structlog

from netstore.errors import NetstoreError
from netstore.model import Finding, Kind, Volume
from netstore.networks.context import KeyedLocks
from netstore.threads import in_thread
from netstore.volumes.drivers.base import VolumeDriver
from netstore.volumes.ownership import begin, has_owner

__all__ = ["Staging"]

log = structlog.get_logger(__name__)


class Staging:
    """Who holds which volume, and the lock of each volume."""

    def __init__(self, drivers: Mapping[str, VolumeDriver]) -> None:
        self._drivers = drivers
        self._holders: dict[str, set[str]] = {}  # by volume id
        self._claims: dict[str, dict[str, Volume]] = {}  # by holder, then by volume id
        self._locks = KeyedLocks()

    def holders(self, volume_id: str) -> frozenset[str]:
        """Return who holds a volume."""
        return frozenset(self._holders.get(volume_id, ()))

    @asynccontextmanager
    async def alone(self, volume: Volume) -> AsyncIterator[None]:
        """Keep a volume from being staged, unstaged, made or removed by others meanwhile."""
        async with self._locks.hold(volume.id):
            yield

    async def hold(self, volume: Volume, holder: str, *, again: bool = False) -> None:
        """Stage a volume where it is not, and keep it so for a holder; doing it again is a success. `again` says that
        the holder had it before a restart: what is mounted is taken as it is.

        Raises:
            NetstoreError: it cannot be mounted, or does not answer; the holder does not hold it.
        """
        driver = self._drivers[volume.spec.driver]
        async with self._locks.hold(volume.id):
            try:
                if driver.stages(volume):  # a directory needs no thread: the common case
                    if not again and await in_thread(driver.staged, volume):
                        await in_thread(driver.ask, volume)
                    await in_thread(driver.stage, volume)
                if has_owner(volume.spec):
                    await in_thread(begin, driver.mountpoint(volume), volume.spec)
            except BaseException:
                if driver.stages(volume) and not self._holders.get(volume.id):
                    with suppress(NetstoreError):
                        await in_thread(driver.unstage, volume)
                raise
            self._holders.setdefault(volume.id, set()).add(holder)
            self._claims.setdefault(holder, {})[volume.id] = volume

    async def release(self, volume: Volume, holder: str) -> None:
        """Give a hold back, and unstage after the last. What cannot be unmounted now is left to the reconciler."""
        driver = self._drivers[volume.spec.driver]
        async with self._locks.hold(volume.id):
            if not self._drop(volume.id, holder) or not driver.stages(volume):
                return
            try:
                await in_thread(driver.unstage, volume)
            except NetstoreError as error:
                log.warning("unstaging a volume failed", volume=volume.name, error=str(error))

    async def release_all(self, holder: str) -> None:
        """Give back everything that a holder holds."""
        for volume in list(self._claims.get(holder, {}).values()):
            await self.release(volume, holder)

    def _drop(self, volume_id: str, holder: str) -> bool:
        """Forget a hold; True when it was the last."""
        claims = self._claims.get(holder, {})
        if claims.pop(volume_id, None) is None:
            return False
        if not claims:
            del self._claims[holder]
        holders = self._holders[volume_id]
        holders.discard(holder)
        if not holders:
            del self._holders[volume_id]
        return not holders

    def forget(self, volume_id: str) -> None:
        """Forget a volume that is gone."""
        for holder in self.holders(volume_id):
            self._drop(volume_id, holder)

    @asynccontextmanager
    async def held(self, volumes: Iterable[Volume], holder: str) -> AsyncIterator[None]:
        """Hold volumes for as long as the block runs."""
        taken: list[Volume] = []
        try:
            for volume in volumes:
                await self.hold(volume, holder)
                taken.append(volume)
            yield
        finally:
            for volume in taken:
                await self.release(volume, holder)

    async def follow(self, volume: Volume, *, there: bool) -> None:
        """Mount a volume that is held and whose device came back; let go of one whose device went."""
        driver = self._drivers[volume.spec.driver]
        async with self._locks.hold(volume.id):
            work = driver.stage if there and self._holders.get(volume.id) else driver.unstage
            await in_thread(work, volume)

    async def check(self, volumes: Iterable[Volume], staged: frozenset[str], *, repair: bool) -> list[Finding]:
        """Stage what is held and is not there, unstage what nobody holds."""
        findings = []
        for volume in volumes:
            driver = self._drivers[volume.spec.driver]
            if not driver.stages(volume) or (volume.id in staged) == bool(self._holders.get(volume.id)):
                continue
            async with self._locks.hold(volume.id):
                wanted = bool(self._holders.get(volume.id))
                if await in_thread(driver.staged, volume) == wanted:
                    continue
                detail = "it is used and not mounted" if wanted else "it is mounted and nobody uses it"
                finding = Finding(kind=Kind.VOLUME, resource_id=volume.id, name=volume.name, detail=detail)
                if repair:
                    try:
                        await in_thread(driver.stage if wanted else driver.unstage, volume)
                        finding = replace(finding, repaired=True)
                    except NetstoreError as error:
                        finding = replace(finding, error=str(error))
                findings.append(finding)
        return findings
