"""The driver `local`: a directory; or with Docker's options `type`, `device`, `o` whatever mount(8) can mount.

Remote filesystems are mounted and measured by a child process that is killed when its server does not answer: a
process that waits in the kernel for a dead server must not be us.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from pathlib import Path

from netstore.drivers.options import Option, hidden, number, parse
from netstore.errors import InvalidArgument, NetstoreError, Unavailable
from netstore.kernel import quota
from netstore.kernel.files import remove_tree, sync_directory, tree_bytes
from netstore.kernel.filesystems import mount, space, unmount_all
from netstore.kernel.mounts import is_mount_point
from netstore.kernel.tools import run_tool
from netstore.model import Volume, VolumeSpec
from netstore.volumes.drivers.base import OWNER, Capability, Node, Usage, VolumeDriver, os_error

__all__ = ["LocalDriver"]

_REMOTE = re.compile(r"nfs4?|cifs|smb3|9p|ceph|glusterfs|fuse(\..+)?")
_FIRST_PROJECT = 1 << 28  # ours begin here: administrators number theirs from 1
_SECRETS = ("password=", "pass=")


def _kind(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9_.]{1,32}", text):
        raise ValueError("a kind of filesystem, such as nfs, cifs, tmpfs, ext4, xfs, btrfs, or none to bind")
    return text


def _words(text: str) -> str:
    if "\0" in text or any(not word for word in text.split(",")):
        raise ValueError("options of mount(8), separated by commas")
    return text


def _device(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("a device, a directory (o=bind), server:/export (nfs) or //server/share (cifs)")
    return text


class LocalDriver(VolumeDriver):
    """Data in `_data`, owned by root, 0755; or mounted there at first use and unmounted after the last."""

    name = "local"
    options = (
        Option("type", _kind, "", "filesystem: nfs, cifs, tmpfs, ext4, xfs, btrfs, …; none to bind a directory"),
        Option("device", _device, "", "what is mounted: a device, a directory, server:/export, //server/share"),
        Option("o", _words, "", "mount options, separated by commas: addr=…, ro, bind, size=100m, uid=1000"),
        Option("timeout", number(1, 600), 30, "seconds after which a server that does not answer is given up"),
        *OWNER,
    )

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._trash = self.root / ".removed"
        self._no_quota = "it has not looked at the state directory yet"

    def start(self) -> None:
        """Finish removals that a crash cut short, and see whether the filesystem holds project quotas."""
        remove_tree(self._trash)
        self._no_quota = quota.enforced(self.node.state_dir)
        if not self._no_quota:
            self.capabilities = frozenset({Capability.SIZE, Capability.GROW, Capability.SHRINK})

    def cannot_hold_size(self) -> str:
        """Say why there are no project quotas."""
        return self._no_quota

    def enforcement(self, volume: Volume) -> str:
        """Name it."""
        return "a project quota" if volume.spec.size_bytes else ""

    def validate(self, spec: VolumeSpec) -> None:
        """Check a spec: Docker's rule is that `device` needs `type`, and `o` needs both."""
        super().validate(spec)
        values = parse(self.options, spec.options)
        if values["type"] and spec.size_bytes:
            raise InvalidArgument(
                "spec.size_bytes", spec.size_bytes, "0: what is mounted has its own (o=size=… of tmpfs)"
            )
        for key, needed in (("device", ("type",)), ("o", ("type", "device")), ("type", ("device",))):
            for other in needed:
                if values[key] and not values[other]:
                    raise InvalidArgument(f"spec.options[{other}]", "", f"a value: {key} needs it")
        for option in OWNER if values["type"] else ():
            if values[option.key] is not None:
                raise InvalidArgument(
                    f"spec.options[{option.key}]", spec.options[option.key], "nothing: what is mounted has its own"
                )
        binds = {"bind", "rbind"} & set(values["o"].split(","))
        if values["type"] in ("none", "bind") and not binds:
            raise InvalidArgument("spec.options[o]", hidden(values["o"]), "bind among the options, for type=none")
        if binds and not values["device"].startswith("/"):
            raise InvalidArgument("spec.options[device]", values["device"], "the absolute path of a directory to bind")

    def stages(self, volume: Volume) -> bool:
        """Only what is mounted is staged."""
        return "type" in volume.spec.options

    def create(self, volume: Volume) -> None:
        """Make the directory, durably. What is mounted is not touched: a server may be away now and there later."""
        if not self.stages(volume):
            data = self.mountpoint(volume)
            try:
                data.parent.mkdir(parents=True, exist_ok=True, mode=0o711)
                if not self._no_quota:
                    self._join_project(volume)
                data.mkdir(exist_ok=True, mode=0o755)
                for directory in (data.parent, self.root):
                    sync_directory(directory)
            except OSError as error:
                raise os_error(error, "making the directory of", volume) from error
            return
        try:
            self.directory(volume).mkdir(parents=True, exist_ok=True, mode=0o711)
            (self.directory(volume) / "mounted").touch()
        except OSError as error:
            raise os_error(error, "making the directory of", volume) from error

    def _join_project(self, volume: Volume) -> None:
        """Give the directory, and all that will be made in it, a project of its own."""
        directory = self.directory(volume)
        project = quota.project(directory)
        if not project:
            project = _FIRST_PROJECT | int(volume.id[:7], 16)
            while (taken := quota.get(self.root, project)) and (taken.limit_bytes or taken.inodes_used):
                project += 1
            quota.set_project(directory, project)
        quota.set_limit(directory, project, volume.spec.size_bytes)

    def _is_whole(self, directory: Path) -> bool:
        return (directory / "mounted").exists() or (directory / "_data").is_dir()

    def remove(self, volume: Volume) -> None:
        """Move the directory out of sight, then remove it: on ext4 files made soon after many are removed are slow."""
        self.unstage(volume)
        hidden = self._trash / volume.id
        if not self.directory(volume).exists():
            return
        project = 0 if self._no_quota else quota.project(self.directory(volume))
        try:
            self._trash.mkdir(exist_ok=True, mode=0o700)
            self.directory(volume).rename(hidden)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise os_error(error, "removing", volume) from error
            hidden = self.directory(volume)  # a full disk has no room for a name elsewhere
        remove_tree(hidden)
        if project:
            quota.set_limit(self.root, project, 0)

    def stage(self, volume: Volume) -> None:
        """Mount what the options say."""
        target = self.mountpoint(volume)
        if not self.stages(volume) or is_mount_point(target):
            return
        values = self.parsed(volume.spec)
        kind, device, options = values["type"], values["device"], values["o"]
        target.mkdir(exist_ok=True, mode=0o755)
        try:
            if _REMOTE.fullmatch(kind):
                _mount_remote(kind, device, target, options, values["timeout"])
            else:
                mount(device, target, "" if kind in ("none", "bind") else kind, options)
        except NetstoreError:
            if not is_mount_point(target):
                target.rmdir()
            raise

    def ask(self, volume: Volume) -> None:
        """Ask the server, where there is one."""
        values = self.parsed(volume.spec)
        if _REMOTE.fullmatch(values["type"]):
            _ask(self.mountpoint(volume), min(values["timeout"], 5))

    def unstage(self, volume: Volume) -> None:
        """Unmount; lazily, because a server that is gone never lets go."""
        target = self.mountpoint(volume)
        if not self.stages(volume):  # also of an orphan, of which nothing is known
            _unmount(target)
            return
        if _REMOTE.fullmatch(self.parsed(volume.spec)["type"]):
            _unmount(target)
        else:
            unmount_all(target, lazy=True)
        if target.is_dir():
            target.rmdir()

    def usage(self, volume: Volume) -> Usage:
        """Ask the quota, or the filesystem that is mounted; else it is not known without a walk."""
        if not self.stages(volume):
            found = None if self._no_quota else self._quota(volume)
            return Usage(found.used_bytes, found.inodes_used, found.limit_bytes) if found else Usage()
        if not self.staged(volume):
            return Usage()
        values = self.parsed(volume.spec)
        if not _REMOTE.fullmatch(values["type"]):
            return super().usage(volume)
        shown = _ask(self.mountpoint(volume), min(values["timeout"], 5))
        blocks, free, unit, inodes, inodes_free = (int(part) for part in shown.split())
        return Usage((blocks - free) * unit, inodes - inodes_free, blocks * unit)

    def _quota(self, volume: Volume) -> quota.Quota | None:
        project = quota.project(self.directory(volume))
        return quota.get(self.root, project) if project else None

    def fits(self, volume: Volume) -> bool:
        """Say whether the quota has the size of the spec."""
        found = self._quota(volume) if volume.spec.size_bytes and not self._no_quota else None
        return found is None or found.limit_bytes >= volume.spec.size_bytes

    def resize(self, volume: Volume, size_bytes: int) -> None:
        """Change the quota, down to what is used."""
        if self._no_quota:
            raise self._cannot("changes no size here")
        used = self.usage(volume).used_bytes or 0
        if 0 < size_bytes < used:
            raise InvalidArgument("spec.size_bytes", size_bytes, f"at least what is used, {used}")
        quota.set_limit(self.root, quota.project(self.directory(volume)), size_bytes)

    def measure(self, volume: Volume) -> int:
        """Add up what the files of a directory take; what is mounted from elsewhere takes nothing here."""
        return 0 if self.stages(volume) else tree_bytes(self.mountpoint(volume))

    def health(self, volume: Volume) -> str:
        """Say whether the server answers, or the device is there."""
        wrong = super().health(volume)
        if wrong or not self.stages(volume):
            return wrong
        values = self.parsed(volume.spec)
        if _REMOTE.fullmatch(values["type"]):
            try:
                return "" if not self.staged(volume) or _ask(self.mountpoint(volume), 2) else "no answer"
            except NetstoreError as error:
                return error.what
        if values["device"].startswith("/") and not os.path.lexists(values["device"]):
            return f"{values['device']} does not exist"
        if self.staged(volume) and space(self.mountpoint(volume)).read_only and "ro" not in values["o"].split(","):
            return "the kernel made it read-only: see the kernel's log"
        return ""


def _mount_remote(kind: str, device: str, target: Path, options: str, timeout: int) -> None:
    """Mount by mount(8) and its helpers; a password goes through the environment, where ps does not show it."""
    words = [word for word in options.split(",") if word]
    secret = next((word.partition("=")[2] for word in words if word.startswith(_SECRETS)), "")
    server = next((word.partition("=")[2] for word in words if word.startswith("addr=")), "")
    if kind.startswith("nfs") and device.startswith(":") and server:  # as Docker has it; mount.nfs wants them together
        device = f"[{server}]{device}" if ":" in server else f"{server}{device}"
        words = [word for word in words if not word.startswith("addr=")]
    kept = [word for word in words if not (secret and word.startswith(_SECRETS))]
    flags = ["-o", ",".join(kept)] if kept else []
    environment = {"PASSWD": secret} if secret else {}
    doing = f"mounting {device} ({kind})"
    try:
        run_tool(
            ["mount", "-t", kind, *flags, "--", device, str(target)], doing, timeout=timeout, environment=environment
        )
    except NetstoreError as error:
        package = {"nfs": "nfs-common", "nfs4": "nfs-common", "cifs": "cifs-utils", "smb3": "cifs-utils"}.get(kind)
        if package and not Path(f"/sbin/mount.{kind}").exists():
            raise NetstoreError(error.what, hint=f"install {package}", reason="MOUNT_FAILED") from error
        raise NetstoreError(error.what, hint=error.hint or "is the server reachable?", reason="MOUNT_FAILED") from error


def _unmount(target: Path) -> None:
    """Unmount lazily in a child that can be killed: a kernel that lets go of a server tells it so, and waits."""
    while is_mount_point(target):
        with suppress(Unavailable):  # it is unmounted, and the server is gone
            run_tool(["umount", "--lazy", "--internal-only", "--no-canonicalize", str(target)], "unmounting", timeout=5)


def _ask(target: Path, timeout: int) -> str:
    """Ask a mounted filesystem for its figures, in a child that can be killed."""
    command = ["stat", "-f", "-c", "%b %f %S %c %d", str(target)]
    return run_tool(command, "asking the server", timeout=timeout)
