"""Block devices: what is on them, and who uses them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from netstore.errors import KernelError
from netstore.kernel.tools import run_tool

__all__ = ["device_size", "is_in_use", "signature"]


def signature(device: str) -> str:
    """Return what a device or file holds: a filesystem, a partition table, "" for nothing known (blkid(8), probing).

    Raises:
        NetstoreError: it cannot be read.
    """
    shown = run_tool(
        ["blkid", "-p", "-o", "export", device], f"probing {device}", accepted=(0, 2, 8), package="util-linux"
    )
    found = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    if not found and Path(device).exists():
        shown = run_tool(["wipefs", "-n", "-i", "-p", device], f"probing {device}", package="util-linux")
        kinds = [line.split(",")[-1] for line in shown.splitlines() if not line.startswith("#")]
        return kinds[0] if kinds else ""
    return found.get("TYPE") or (f"{found['PTTYPE']} partition table" if "PTTYPE" in found else "")


def is_in_use(device: str) -> bool:
    """Say whether something has a device for itself: a mount, a RAID, a volume group (open(2), O_EXCL)."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        raise KernelError(error.errno or 0, "opening", device) from error
    return False


def device_size(device: str) -> int:
    """Return a block device's size, bytes."""
    try:
        return int(Path(f"/sys/class/block/{Path(os.path.realpath(device)).name}/size").read_text()) * 512
    except OSError as error:
        raise KernelError(error.errno or 0, "measuring", device) from error
