"""Block devices: found by what does not change (serial, WWN, label, path), what is on them, who uses them, and when
they come and go. With udevd by its database; without it by sysfs, and by the kernel's own events.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pyudev

from netstore.errors import KernelError
from netstore.kernel.tools import run_tool

__all__ = ["Disk", "DiskEvents", "disks", "is_in_use", "probe", "signature"]


@dataclass(frozen=True, slots=True)
class Disk:
    """A whole device that has a medium. `serial` and `wwn` are "" where it has none."""

    path: str
    serial: str
    wwn: str
    size_bytes: int
    read_only: bool
    links: frozenset[str]
    udev_label: str

    def matches(self, key: str, value: str) -> bool:
        """Say whether a serial, wwn, path or label is the device's."""
        if key == "path":
            return value == self.path or value in self.links or os.path.realpath(value) == self.path
        if key == "label":
            return (self.udev_label or probe(self.path).get("LABEL", "")) == value
        return value == (self.serial if key == "serial" else self.wwn)


def disks() -> Iterator[Disk]:
    """Yield the node's disks: whole devices with a size, loop devices that have a file too."""
    for device in pyudev.Context().list_devices(subsystem="block", DEVTYPE="disk"):
        attributes, properties = device.attributes, device.properties
        size = int(_first(attributes, "size") or 0) * 512
        if not size or device.device_node is None:
            continue
        yield Disk(
            path=device.device_node,
            serial=properties.get("ID_SERIAL_SHORT")
            or _first(attributes, "serial")
            or _first(attributes, "device/serial"),
            wwn=properties.get("ID_WWN") or _first(attributes, "wwid") or _first(attributes, "device/wwid"),
            size_bytes=size,
            read_only=_first(attributes, "ro") == "1",
            links=frozenset(device.device_links),
            udev_label=properties.get("ID_FS_LABEL", ""),
        )


def _first(attributes: pyudev.Attributes, *names: str) -> str:
    """Return the first attribute that there is, "" when there is none."""
    for name in names:
        try:
            return str(attributes.asstring(name)).strip()
        except (KeyError, OSError, UnicodeDecodeError):
            continue
    return ""


class DiskEvents:
    """Tells that disks came or went: a descriptor that becomes readable, and `drain`, which says whether it was so."""

    def __init__(self) -> None:
        source = "udev" if os.path.exists("/run/udev/control") else "kernel"
        self._monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source=source)
        self._monitor.filter_by("block")
        self._monitor.start()

    def fileno(self) -> int:
        """Return the descriptor."""
        return int(self._monitor.fileno())

    def drain(self) -> bool:
        """Read what there is; True when any of it was about a disk."""
        seen = False
        while (device := self._monitor.poll(timeout=0)) is not None:
            seen = seen or device.device_type == "disk"
        return seen


def probe(device: str) -> dict[str, str]:
    """Return what blkid(8) finds on a device by reading it: TYPE, LABEL, UUID, PTTYPE.

    Raises:
        NetstoreError: it cannot be read.
    """
    command = ["blkid", "-p", "-o", "export", device]
    shown = run_tool(command, f"probing {device}", accepted=(0, 2, 8), package="util-linux")
    return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)


def signature(device: str) -> str:
    """Return what a device holds in a few words: a filesystem, a partition table, "" for nothing known.

    Raises:
        NetstoreError: it cannot be read.
    """
    found = probe(device)
    if "TYPE" in found or "PTTYPE" in found:
        return found.get("TYPE") or f"{found['PTTYPE']} partition table"
    shown = run_tool(["wipefs", "-n", "-i", "-p", device], f"probing {device}", package="util-linux")  # several at once
    kinds = [line.split(",")[-1] for line in shown.splitlines() if not line.startswith("#")]
    return " and ".join(kinds)


def is_in_use(device: str) -> bool:
    """Say whether something has a device for itself: a mount, a RAID, a volume group (open(2), O_EXCL)."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        raise KernelError(error.errno or 0, "opening", device) from error
    return False
