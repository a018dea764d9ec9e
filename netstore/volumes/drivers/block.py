"""The driver `block`: a whole device, found by what does not change. What is on it is never wiped, only added to."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from netstore.drivers.options import Option, choice
from netstore.errors import FailedPrecondition, InUse, InvalidArgument, KernelError
from netstore.kernel.devices import Disk, disks, is_in_use, probe, signature
from netstore.kernel.files import remove_tree
from netstore.kernel.filesystems import MAKERS, make_filesystem, mount, space, trim, unmount_all
from netstore.kernel.mounts import is_mount_point
from netstore.model import Volume, VolumeSpec
from netstore.volumes.drivers.base import Capability, Node, VolumeDriver, os_error

__all__ = ["BlockDriver"]

_KEYS = ("serial", "wwn", "label", "path")


def _named(text: str) -> str:
    if not text or len(text) > 255 or "\0" in text:
        raise ValueError("1 to 255 characters")
    return text


def _path(text: str) -> str:
    if not text.startswith("/dev/") or ".." in text.split("/") or "\0" in text:
        raise ValueError("a path below /dev, better one that stays, such as /dev/disk/by-id/…")
    return text


class BlockDriver(VolumeDriver):
    """`device` in the volume's directory is written once the device is ours; it says what was found on it."""

    name = "block"
    options = (
        Option("serial", _named, "", "the device's serial number"),
        Option("wwn", _named, "", "its World Wide Name"),
        Option("label", _named, "", "the label of the filesystem on it"),
        Option("path", _path, "", "its path, better one that stays: /dev/disk/by-id/…, /dev/disk/by-path/…"),
        Option("format", choice("ext4", "xfs", "btrfs"), "", "make this filesystem; the device must be blank"),
        Option("o", _named, "", "mount options, separated by commas, such as noatime or ro"),
    )
    capabilities = frozenset({Capability.BLOCK})
    devices = True

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._taking = threading.Lock()

    def validate(self, spec: VolumeSpec) -> None:
        """Check a spec: exactly one thing says which device."""
        super().validate(spec)
        values = self.parsed(spec)
        given = [key for key in _KEYS if values[key]]
        if len(given) != 1:
            raise InvalidArgument("spec.options", ", ".join(given), f"exactly one of {', '.join(_KEYS)}")
        if spec.block and (values["format"] or values["o"]):
            raise InvalidArgument(
                "spec.options", "format, o", "neither, with mode BLOCK: there is no filesystem of ours"
            )
        if values["format"] and values["label"]:
            raise InvalidArgument(
                "spec.options[format]", values["format"], "another way to find it: a blank has no label"
            )

    def available_bytes(self) -> int:
        """Return 0: devices are as large as they are."""
        return 0

    def enforcement(self, volume: Volume) -> str:
        """Name it: the device ends where it ends."""
        return "the device"

    def create(self, volume: Volume) -> None:
        """Take the device: refuse what is used or holds something else; format it where that was asked for."""
        with self._taking:
            if not self._is_whole(self.directory(volume)):
                self._take(volume)

    def _take(self, volume: Volume) -> None:
        directory = self.directory(volume)
        values = self.parsed(volume.spec)
        disk = self._required(volume)
        draft = directory / "draft"
        resumed = draft.exists() and draft.read_text() == disk.path  # we were killed while we formatted it
        self._check(volume, disk, resumed=resumed)
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o711)
            if values["format"]:
                draft.write_text(disk.path)
                make_filesystem(values["format"], disk.path, zeroed=False)
            found = {} if volume.spec.block else probe(disk.path)
            document = {"identity": _identity(disk), "type": found.get("TYPE", ""), "uuid": found.get("UUID", "")}
            draft.write_text(json.dumps(document))
            draft.rename(directory / "device")
        except BaseException as error:
            remove_tree(directory)
            if isinstance(error, OSError):
                raise os_error(error, "taking the device of", volume) from error
            raise

    def _check(self, volume: Volume, disk: Disk, *, resumed: bool) -> None:
        for other in self.root.glob("*/device"):
            owner = other.parent.name
            if json.loads(other.read_text())["identity"] == _identity(disk) and owner != volume.id:
                raise InUse(f"{disk.path} is another volume's already", hint=f"remove {owner[:12]} first", volume=owner)
        if is_in_use(disk.path):
            raise InUse(f"{disk.path} is mounted or otherwise in use", hint="unmount it, or name another device")
        found = signature(disk.path)
        wanted = self.parsed(volume.spec)["format"]
        if (wanted and found and not resumed) or (volume.spec.block and found):
            raise FailedPrecondition(
                f"{disk.path} holds {found}", reason="DEVICE_HAS_SIGNATURE", device=disk.path, found=found,
                hint="name a blank device, or wipe this one yourself (wipefs -a)",
            )  # fmt: skip
        if not wanted and not volume.spec.block and found not in MAKERS:
            raise FailedPrecondition(
                f"{disk.path} holds {found or 'no filesystem'}", reason="NO_FILESYSTEM", device=disk.path,
                hint="format a blank device by --format ext4, or take it as it is by --type block",
            )  # fmt: skip

    def find(self, volume: Volume) -> Disk | None:
        """Return the device, None when it is not there."""
        values = self.parsed(volume.spec)
        key = next(key for key in _KEYS if values[key])
        return next((disk for disk in disks() if disk.matches(key, values[key])), None)

    def is_there(self, volume: Volume) -> bool:
        """Say whether the device is connected."""
        return self.find(volume) is not None

    def _required(self, volume: Volume) -> Disk:
        disk = self.find(volume)
        if disk is None:
            raise FailedPrecondition(
                f"volume {volume.name}: {self._missing(volume)}", reason="NO_DEVICE",
                hint="connect it: `lsblk -do NAME,SERIAL,WWN,LABEL` shows what is there",
            )  # fmt: skip
        return disk

    def _missing(self, volume: Volume) -> str:
        values = self.parsed(volume.spec)
        return next(f"no device with {key} {values[key]}" for key in _KEYS if values[key])

    def remove(self, volume: Volume) -> None:
        """Let the device go, as it is."""
        self.unstage(volume)
        remove_tree(self.directory(volume))

    def stage(self, volume: Volume) -> None:
        """Mount the device; or with mode BLOCK bind its node, so that the path says the same after its name changes."""
        target = self.mountpoint(volume)
        if is_mount_point(target):
            return
        disk = self._required(volume)
        known = json.loads((self.directory(volume) / "device").read_text())
        if not volume.spec.block and (found := probe(disk.path).get("UUID", "")) != known["uuid"]:
            raise FailedPrecondition(
                f"volume {volume.name}: {disk.path} holds another filesystem (UUID {found or 'none'}) than it did",
                hint="connect the right device, or make the volume anew", reason="FOREIGN_DEVICE",
            )  # fmt: skip
        try:
            if volume.spec.block:
                target.touch(mode=0o600)
                mount(disk.path, target, "", "bind")
            else:
                target.mkdir(exist_ok=True, mode=0o755)
                mount(disk.path, target, known["type"], self.parsed(volume.spec)["o"])
        except KernelError:
            if not is_mount_point(target):
                self._remove_target(target)
            raise
        except OSError as error:
            raise os_error(error, "mounting", volume) from error

    def unstage(self, volume: Volume) -> None:
        """Unmount; lazily, because the device may be gone."""
        target = self.mountpoint(volume)
        unmount_all(target, lazy=True)
        self._remove_target(target)

    def _remove_target(self, target: Path) -> None:
        if target.is_dir():
            target.rmdir()
        else:
            target.unlink(missing_ok=True)

    def trim(self, volume: Volume) -> int:
        """Tell the disk which blocks hold nothing."""
        if volume.spec.block:
            raise self._cannot("trims no volume of mode BLOCK: what is on it is not ours")
        return trim(self.mountpoint(volume))

    def _is_whole(self, directory: Path) -> bool:
        return (directory / "device").exists()

    def health(self, volume: Volume) -> str:
        """Say whether the device is there, and can be written."""
        wrong = super().health(volume)
        if wrong:
            return wrong
        disk = self.find(volume)
        if disk is None:
            return self._missing(volume)
        options = self.parsed(volume.spec)["o"].split(",")
        if (
            self.staged(volume)
            and not volume.spec.block
            and "ro" not in options
            and space(self.mountpoint(volume)).read_only
        ):
            return "it is read-only after an error: see the kernel's log"
        return ""

    def measure(self, volume: Volume) -> int:
        """Return nothing: it takes nothing of the node's own storage."""
        return 0


def _identity(disk: Disk) -> str:
    return disk.serial or disk.wwn or disk.path
