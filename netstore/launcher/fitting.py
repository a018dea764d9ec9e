"""Whether what a container is given fits its root filesystem: said in the caller's words, before the runtime fails."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from netstore.errors import FailedPrecondition, KernelError
from netstore.kernel.paths import closing, open_in_root
from netstore.model import ContainerSpec, Mount

__all__ = ["check_mounts", "check_working_dir"]

_RUNTIMES = ("/dev", "/proc", "/sys")  # what the image has there is hidden
_DIRECTORY, _FILE, _BENEATH_A_FILE = "a directory", "a file", "beneath a file"

Staged = Sequence[tuple[Mount, Path | None]]


def check_mounts(root: int, spec: ContainerSpec, staged: Staged) -> None:
    """Refuse a file that is to be mounted on a directory, and the reverse. Blocking.

    Raises:
        FailedPrecondition: naming the mount.
    """
    places = {os.path.normpath(mount.spec.target): place for mount, place in staged}
    for target, (mount, place) in zip(places, staged, strict=False):
        given = _DIRECTORY if place is None or place.is_dir() else _FILE
        there = _at(root, {at: found for at, found in places.items() if at != target}, target)
        if there in ("", given):
            continue
        field = f"spec.mounts[{spec.mounts.index(mount.spec)}].target" if mount.spec in spec.mounts else "mount"
        source = mount.volume or mount.spec.source or mount.spec.type.value
        raise FailedPrecondition(
            f"{field}: {target} is {there} in the container, and {source} is {given}",
            hint=f"choose a target that is {given}, or where nothing is; or another source",
            reason="MOUNT_DOES_NOT_FIT", field=field, target=target,
        )  # fmt: skip


def check_working_dir(root: int, path: str, staged: Staged) -> None:
    """Refuse a working directory that is none. Blocking.

    Raises:
        FailedPrecondition: it is a file, or beneath one.
    """
    there = _at(root, {os.path.normpath(mount.spec.target): place for mount, place in staged}, os.path.normpath(path))
    if there not in ("", _DIRECTORY):
        raise FailedPrecondition(
            f"spec.working_dir: {path} is {there} in the container", field="spec.working_dir",
            hint="name a directory (-w), or a path where nothing is: it is made", reason="NOT_A_DIRECTORY",
        )  # fmt: skip


def _at(root: int, places: Mapping[str, Path | None], path: str) -> str:
    """Say what is at a path of a container, "" when that is nothing, or the runtime's."""
    above = [at for at in (*places, *_RUNTIMES) if path == at or path.startswith(f"{at}/")]
    nearest = max(above, key=len, default="/")
    place = places.get(nearest)
    if above and place is None:
        return ""
    try:
        if place is None:
            return _kind(root, path)
        if nearest == path:
            return _DIRECTORY if place.is_dir() else _FILE
        with closing(os.open(place, os.O_PATH | os.O_CLOEXEC)) as mounted:
            return _kind(mounted, path.removeprefix(nearest))
    except KernelError as error:
        return _BENEATH_A_FILE if error.errno == errno.ENOTDIR else ""  # the runtime knows more of what is odd


def _kind(root: int, path: str) -> str:
    with closing(open_in_root(root, path, os.O_PATH)) as found:
        return _DIRECTORY if stat.S_ISDIR(os.fstat(found).st_mode) else _FILE
