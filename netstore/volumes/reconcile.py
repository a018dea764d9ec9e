"""Makes volumes' storage and mounts match the store: after a crash or a reboot, and on demand."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from netstore.errors import NetstoreError
from netstore.model import Finding, Kind, Volume, VolumeSpec
from netstore.threads import in_thread
from netstore.volumes.drivers.base import Observed, VolumeDriver
from netstore.volumes.staging import Staging

__all__ = ["check_storage"]

_Work = Callable[[Volume], None]


async def check_storage(
    drivers: Mapping[str, VolumeDriver], volumes: Callable[[], Awaitable[Sequence[Volume]]], staging: Staging,
    *, repair: bool,
) -> tuple[list[Finding], Sequence[Volume], frozenset[str]]:  # fmt: skip
    """Compare storage and store; returns findings, the volumes that the store has, and ids of what is staged.

    Storage is looked at first: what is made meanwhile has a row by the time that the rows are read.
    """
    observed, findings = {}, []
    for name, driver in drivers.items():
        try:
            observed[name] = await in_thread(driver.observe)
        except NetstoreError as error:  # such as a pool's device that is away: its volumes are left alone
            findings.append(Finding(name=name, detail="a volume driver that cannot work", error=str(error)))
    known = await volumes()
    for name, found in observed.items():
        owned = {volume.id: volume for volume in known if volume.spec.driver == name}
        for finding, work, volume in await in_thread(_differences, drivers[name], found, owned):
            findings.append(await _repaired(finding, work, volume, staging, repair=repair))
    return findings, known, frozenset[str]().union(*(found.staged for found in observed.values()))


def _differences(
    driver: VolumeDriver, found: Observed, owned: Mapping[str, Volume]
) -> list[tuple[Finding, _Work, Volume]]:
    differences: list[tuple[Finding, _Work, Volume]] = []

    def note(volume: Volume, detail: str, work: _Work) -> None:
        finding = Finding(kind=Kind.VOLUME, resource_id=volume.id, name=volume.name, detail=detail)
        differences.append((finding, work, volume))

    for volume in owned.values():
        if volume.filling:  # whoever fills it makes it, or removes it
            continue
        if volume.id not in found.whole:
            note(volume, "its data is missing", driver.create)
        elif not driver.fits(volume):
            note(volume, "its size differs", partial(driver.resize, size_bytes=volume.spec.size_bytes))
    for leftover in sorted(found.present - set(owned)):
        orphan = Volume(id=leftover, name=leftover, spec=VolumeSpec(driver=driver.name))
        finding = Finding(name=leftover, detail=f"storage of the driver {driver.name} that no volume owns")
        differences.append((finding, driver.remove, orphan))
    return differences


async def _repaired(finding: Finding, work: _Work, volume: Volume, staging: Staging, *, repair: bool) -> Finding:
    if not repair:
        return finding
    try:
        async with staging.alone(volume):
            await in_thread(work, volume)
    except NetstoreError as error:
        return replace(finding, error=str(error))
    return replace(finding, repaired=True)
