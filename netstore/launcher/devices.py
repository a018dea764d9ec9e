"""Which block devices a running container may use: its cgroup's list (cgroup-v1/devices.rst).

With cgroup v2 alone that is a program, which the runtime loaded at the start, and stays as it is.
"""

from __future__ import annotations

import os
from pathlib import Path

from netstore.errors import KernelError, Unsupported

__all__ = ["allow"]

_HIERARCHY = Path("/sys/fs/cgroup/devices")


def allow(pid: int, device: int, access: str) -> None:
    """Let the container of a process use a device: to "rw", to "r", or not at all. Blocking, and idempotent.

    Raises:
        Unsupported: this node has no such list.
        KernelError: the kernel refused.
    """
    group = _group(pid)
    if group is None:
        raise Unsupported(
            "with cgroup v2 alone a running container keeps the devices that it was started with",
            hint="stop the container, change its mounts, and start it again", reason="NO_LIVE_DEVICES",
        )  # fmt: skip
    numbers = f"b {os.major(device)}:{os.minor(device)}"
    try:
        for name, letters in (("allow", access), ("deny", "".join(each for each in "rw" if each not in access))):
            if letters:
                (group / f"devices.{name}").write_text(f"{numbers} {letters}")
    except OSError as error:
        raise KernelError(error.errno or 0, "changing the devices of", f"the container of process {pid}") from error


def _group(pid: int) -> Path | None:
    """Return the cgroup of a process in the hierarchy of devices (cgroups(7)), None where there is none."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if "devices" in controllers.split(",") and path != "/":
            return _HIERARCHY / path.lstrip("/")
    return None
