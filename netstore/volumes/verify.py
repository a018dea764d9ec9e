"""Is a volume's data sound? What can be said differs: a filesystem is checked, a pool scrubbed, files are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from netstore.errors import KernelError, NetstoreError
from netstore.kernel.files import files_below
from netstore.kernel.filesystems import CHECK_SECONDS
from netstore.kernel.paths import closing
from netstore.kernel.tools import run_tool
from netstore.model import new_id
from netstore.threads import in_thread
from netstore.volumes.copies import reading, snapshot_file
from netstore.volumes.drivers.base import VolumeDriver
from netstore.volumes.manager import VolumeManager
from netstore.volumes.snapshots import refuse_filling

__all__ = ["Verdict", "verify"]

_CHECKS: dict[str, Sequence[str]] = {
    "ext4": ("e2fsck", "-f", "-n"), "xfs": ("xfs_repair", "-n"), "btrfs": ("btrfs", "check", "--readonly"),
}  # fmt: skip
_PACKAGES = {"ext4": "e2fsprogs", "xfs": "xfsprogs", "btrfs": "btrfs-progs"}
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was done, and what was found wrong; `read_bytes` were read of files."""

    checks: tuple[str, ...]
    problems: tuple[str, ...]
    read_bytes: int


async def verify(volumes: VolumeManager, reference: str, snapshot: str) -> Verdict:
    """Check a volume, or its snapshot. A volume in an image that is used is checked by a snapshot, removed afterwards.

    Raises:
        NotFound: no such volume or snapshot.
        NetstoreError: it cannot be checked.
    """
    volume = refuse_filling((await volumes.get(reference))[0])
    driver = volumes.driver_of(volume)
    found = (await volumes.snapshots.get(volume.id, snapshot))[0].id if snapshot else ""
    holder = f"export {new_id()[:12]} {found or volume.id}"  # keeps snapshot and volume meanwhile
    async with volumes.staging.held([volume], holder), AsyncExitStack() as stack:
        if driver.name == "image" and not found:
            found, _ = await stack.enter_async_context(volumes.snapshots.passing(volume))
        checks, problems = [], []
        if file := snapshot_file(driver, volume, found):
            checks.append(f"{' '.join(_CHECKS[_kind(driver, volume.spec.options)])} of the image")
            problems += await in_thread(_check_image, _kind(driver, volume.spec.options), file)
        read_bytes = 0
        try:
            with reading(driver, volume, found) as place:
                if driver.name == "btrfs":
                    checks.append("a read-only scrub of the whole pool")
                    problems += await in_thread(_scrub, place)
                checks.append("every file was read")
                read_bytes, unreadable = await in_thread(_read, place)
                problems += unreadable
        except KernelError as error:  # it cannot even be mounted
            problems.append(str(error))
        return Verdict(tuple(checks), tuple(problems), read_bytes)


def _kind(driver: VolumeDriver, options: object) -> str:
    return str(dict(options).get("fs", "ext4"))  # type: ignore[call-overload]


def _check_image(kind: str, file: Path) -> list[str]:
    try:
        run_tool([*_CHECKS[kind], str(file)], "checking the filesystem", timeout=CHECK_SECONDS, package=_PACKAGES[kind])
    except NetstoreError as error:
        if error.reason != "TOOL_FAILED":
            raise
        return [error.what]
    return []


def _scrub(place: Path) -> list[str]:
    try:
        run_tool(
            ["btrfs", "scrub", "start", "-B", "-r", str(place)],
            "scrubbing",
            timeout=CHECK_SECONDS,
            package="btrfs-progs",
        )
    except NetstoreError as error:
        if error.reason != "TOOL_FAILED":
            raise
        return [error.what]
    return []


def _read(place: Path) -> tuple[int, list[str]]:
    """Read every file; returns the bytes, and the names of those that the kernel cannot read."""
    total, problems = 0, []

    def note(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # removed meanwhile
            problems.append(f"{os.path.relpath(os.fsdecode(error.filename), place)}: {error.strerror}")

    for file in files_below(place, note):
        try:
            if file.is_file(follow_symlinks=False):
                total += _read_file(file.path)
        except OSError as error:
            note(error)
    return total, problems


def _read_file(path: str) -> int:
    total = 0
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOATIME
    with closing(os.open(path, flags)) as descriptor:
        while data := os.read(descriptor, _CHUNK):
            total += len(data)
    return total
