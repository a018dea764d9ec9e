"""OCI bundles: the config.json (runtime-spec 1.0) of a container, as tight as Docker's default profile."""

from __future__ import annotations

import functools
import json
import os
import platform
import resource
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netstore.launcher.users import Identity
from netstore.model import Mount

__all__ = ["Bundle", "process", "root_propagation", "specification"]

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SECCOMP = Path("/usr/share/containers/seccomp.json")  # Debian: golang-github-containers-common

# moby profiles: the capabilities of a container that asks for none.
_CAPABILITIES = [
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL",
    "CAP_AUDIT_WRITE",
]  # fmt: skip
_MASKED = [
    "/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
    "/sys/devices/virtual/powercap",
]  # fmt: skip
_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
_DEVICES = ["c 1:3", "c 1:5", "c 1:7", "c 1:8", "c 1:9", "c 5:0", "c 5:2", "c 136:*"]
_ATTRIBUTES = {
    os.ST_RDONLY: "ro", os.ST_NOSUID: "nosuid", os.ST_NODEV: "nodev", os.ST_NOEXEC: "noexec", os.ST_NOATIME: "noatime",
    os.ST_NODIRATIME: "nodiratime", os.ST_RELATIME: "relatime",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """What a config.json is made from. `namespace` is the sandbox's path, "" for the host's own; each mount goes with
    where it is staged, None for a tmpfs; `files` is the directory of hosts and resolv.conf.
    """

    container_id: str
    rootfs: Path
    directory: Path
    files: Path
    args: Sequence[str]
    env: Sequence[str]
    working_dir: str
    identity: Identity
    hostname: str
    domainname: str
    namespace: str
    mounts: Sequence[tuple[Mount, Path | None]]
    read_only: bool
    terminal: bool


def process(
    args: Sequence[str], env: Sequence[str], working_dir: str, identity: Identity, *, hostname: str, terminal: bool
) -> dict[str, Any]:
    """Return the `process` object of a container, or of an exec in it."""
    merged = {"PATH": _PATH, "HOSTNAME": hostname, "HOME": identity.home} | ({"TERM": "xterm"} if terminal else {})
    for pair in env:
        key, separator, value = pair.partition("=")
        if separator:
            merged[key] = value
        else:
            merged.pop(key, None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    sets = ["bounding", "effective", "permitted"] if identity.uid == 0 else ["bounding"]
    return {
        "terminal": terminal,
        "user": {"uid": identity.uid, "gid": identity.gid, "additionalGids": list(identity.groups), "umask": 0o022},
        "args": list(args),
        "env": [f"{key}={value}" for key, value in merged.items()],
        "cwd": working_dir or "/",
        "capabilities": dict.fromkeys(sets, _CAPABILITIES),
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": min(soft, hard), "hard": hard}],
        "noNewPrivileges": False,
    }


def specification(bundle: Bundle) -> dict[str, Any]:
    """Return the whole config.json."""
    private = bool(bundle.namespace)
    namespaces: list[dict[str, str]] = [{"type": kind} for kind in ("pid", "ipc", "mount")]
    if private:
        namespaces += [{"type": "uts"}, {"type": "network", "path": bundle.namespace}]
    # A cgroup of the same name in every hierarchy; the namespace hides the host's tree where it is unified.
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        namespaces.append({"type": "cgroup"})
    linux: dict[str, Any] = {
        "namespaces": namespaces,
        "maskedPaths": _MASKED,
        "readonlyPaths": _READ_ONLY,
        "cgroupsPath": f"/netstore/{bundle.container_id}",
        "resources": {"devices": [*_device_rules(), *_published_devices(bundle.mounts)]},
    }
    if spread := root_propagation(mount for mount, _ in bundle.mounts):
        linux["rootfsPropagation"] = spread
    if private:
        linux["sysctl"] = {"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647"}
    if _SECCOMP.exists():
        linux["seccomp"] = _seccomp(tuple(_CAPABILITIES))
    etc = [pair for pair in bundle.mounts if pair[0].spec.target == "/etc"]  # what is above our files comes before them
    document = {
        "ociVersion": "1.0.2",
        "process": process(
            bundle.args, bundle.env, bundle.working_dir, bundle.identity, hostname=bundle.hostname,
            terminal=bundle.terminal,
        ),
        "root": {"path": str(bundle.rootfs), "readonly": bundle.read_only},
        "mounts": [
            *_system_mounts(private=private),
            *(_mount(mount, staged) for mount, staged in etc),
            *_files(bundle, etc),
            *(_mount(mount, staged) for mount, staged in _ordered(bundle.mounts) if (mount, staged) not in etc),
        ],
        "linux": linux,
    }  # fmt: skip
    names = {"hostname": bundle.hostname} | ({"domainname": bundle.domainname} if bundle.domainname else {})
    return document | (names if private else {})


def _device_rules() -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    for device in _DEVICES:
        kind, numbers = device.split(" ")
        major, minor = numbers.split(":")
        rule = {"allow": True, "type": kind, "major": int(major), "access": "rwm"}
        rules.append(rule if minor == "*" else rule | {"minor": int(minor)})
    for kind in "cb":  # mknod is harmless without access
        rules.append({"allow": True, "type": kind, "access": "m"})
    return rules


def _system_mounts(*, private: bool) -> list[dict[str, Any]]:
    secure = ["nosuid", "noexec", "nodev"]
    sysfs = {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*secure, "ro"]}
    if not private:  # sysfs shows a network namespace, which is not ours to mount: bind the host's
        sysfs = {"destination": "/sys", "type": "bind", "source": "/sys", "options": [*secure, "ro", "rbind"]}
    tmpfs = {"type": "tmpfs", "source": "tmpfs"}
    return [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": secure},
        {"destination": "/dev", **tmpfs, "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
         "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": secure},
        {"destination": "/dev/shm", **tmpfs, "source": "shm", "options": [*secure, "mode=1777", "size=67108864"]},
        sysfs,
        *([{"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": [*secure, "ro"]}]
          if private else []),
    ]  # fmt: skip


def _files(bundle: Bundle, etc: Sequence[tuple[Mount, Path | None]]) -> list[dict[str, Any]]:
    """The three files that every container has of its own; not where an /etc that is read-only has no place for one."""
    closed = [staged for mount, staged in etc if mount.spec.read_only]
    return [
        {"destination": f"/etc/{name}", "type": "bind", "source": str(bundle.files / name),
         "options": ["bind", "rprivate"]}
        for name in ("hosts", "hostname", "resolv.conf")
        if all(staged and os.path.lexists(staged / name) for staged in closed)
    ]  # fmt: skip


def _ordered(mounts: Sequence[tuple[Mount, Path | None]]) -> list[tuple[Mount, Path | None]]:
    """Parents before children, so that none hides another."""
    return sorted(mounts, key=lambda pair: pair[0].spec.target.rstrip("/").count("/"))


def _published_devices(mounts: Sequence[tuple[Mount, Path | None]]) -> Iterator[dict[str, Any]]:
    """Yield what lets a container use the devices among its mounts: volumes of mode BLOCK, whose nodes are ours.

    Never a node that is in a volume: containers can make those.
    """
    for mount, staged in mounts:
        status = staged.stat() if mount.volume_id and staged and not mount.spec.subpath else None
        if status and stat.S_ISBLK(status.st_mode):
            device = {"type": "b", "major": os.major(status.st_rdev), "minor": os.minor(status.st_rdev)}
            yield {"allow": True, **device, "access": "r" if mount.spec.read_only else "rw"}


def _mount(mount: Mount, staged: Path | None) -> dict[str, Any]:
    spec = mount.spec
    if staged is not None:
        # Its attributes are set; the runtime would clear those of the topmost mount that it is not told.
        flags = os.statvfs(staged).f_flag
        kept = [option for bit, option in _ATTRIBUTES.items() if flags & bit]
        return {"destination": spec.target, "type": "bind", "source": str(staged),
                "options": ["rbind", spec.propagation or "rprivate", *kept]}  # fmt: skip
    # As Docker: noexec, nosuid and nodev unless the options say otherwise.
    options = [f"no{each}" for each in ("suid", "dev", "exec") if each not in spec.tmpfs_options]
    options += ["ro" if spec.read_only else "rw", f"mode={spec.tmpfs_mode or 0o1777:o}"]
    options += [f"size={spec.tmpfs_size_bytes}"] if spec.tmpfs_size_bytes else []
    options += [option for option in spec.tmpfs_options if option not in options]
    return {"destination": spec.target, "type": "tmpfs", "source": "tmpfs", "options": options}


def root_propagation(mounts: Iterable[Mount]) -> str:
    """Return what the root must be for the mounts to propagate as they ask, "" when none does."""
    wanted = {mount.spec.propagation.removeprefix("r") for mount in mounts}
    return "rshared" if "shared" in wanted else "rslave" if "slave" in wanted else ""


@functools.cache
def _seccomp(capabilities: tuple[str, ...]) -> dict[str, Any]:
    """Make linux.seccomp of containers/common's profile, for these capabilities and this machine."""
    profile = json.loads(_SECCOMP.read_text())
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    native = {"amd64": "SCMP_ARCH_X86_64", "arm64": "SCMP_ARCH_AARCH64"}.get(machine)
    rules = []
    for rule in profile["syscalls"]:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        if not _applies(includes, capabilities, machine) or _excluded(excludes, capabilities, machine):
            continue
        kept = {key: rule[key] for key in ("names", "action", "args", "errnoRet") if rule.get(key) is not None}
        if kept.get("args") == []:
            del kept["args"]
        rules.append(kept)
    architectures = next(
        ([entry["architecture"], *entry["subArchitectures"]] for entry in profile.get("archMap", [])
         if entry["architecture"] == native), [],
    )  # fmt: skip
    found: dict[str, Any] = {"defaultAction": profile["defaultAction"], "syscalls": rules}
    if "defaultErrnoRet" in profile:
        found["defaultErrnoRet"] = profile["defaultErrnoRet"]
    return found | ({"architectures": architectures} if architectures else {})


def _applies(includes: Mapping[str, Any], capabilities: Sequence[str], machine: str) -> bool:
    wanted, machines = includes.get("caps") or [], includes.get("arches") or []
    return all(each in capabilities for each in wanted) and (not machines or machine in machines)


def _excluded(excludes: Mapping[str, Any], capabilities: Sequence[str], machine: str) -> bool:
    return any(each in capabilities for each in excludes.get("caps") or []) or machine in (excludes.get("arches") or [])
