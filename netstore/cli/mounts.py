"""The grammar of -v, --mount, --tmpfs and --volumes-from: Docker's, and what is ours besides."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from netstore.api.v1 import mount_pb2
from netstore.cli.grammar import comma_separated, parse_bytes

__all__ = ["parse_mount", "parse_tmpfs", "parse_volume", "set_options"]

_PROPAGATIONS = ("private", "rprivate", "shared", "rshared", "slave", "rslave")
_IGNORED = ("z", "Z", "consistent", "cached", "delegated")
_RECURSIVE = ("enabled", "disabled", "writable", "readonly")
_SWITCHES = {
    "ro": ("read_only", True), "rw": ("read_only", False), "noexec": ("no_exec", True), "exec": ("no_exec", False),
    "nosuid": ("no_suid", True), "suid": ("no_suid", False), "nodev": ("no_dev", True), "dev": ("no_dev", False),
    "U": ("chown", True),
}  # fmt: skip
_TYPES = {
    "volume": mount_pb2.MOUNT_TYPE_VOLUME,
    "bind": mount_pb2.MOUNT_TYPE_BIND,
    "tmpfs": mount_pb2.MOUNT_TYPE_TMPFS,
    "image": mount_pb2.MOUNT_TYPE_IMAGE,
}
_GRAMMAR = "[SOURCE:]TARGET[:OPTIONS]"


def parse_volume(text: str) -> mount_pb2.MountSpec:
    """Parse `[SOURCE:]TARGET[:OPTIONS]` of -v."""
    parts = text.split(":")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise click.UsageError(f"-v: {text!r}: write {_GRAMMAR}")
    source, target = ("", parts[0]) if len(parts) == 1 else (parts[0], parts[1])
    if not target.startswith("/"):
        raise click.UsageError(f"-v: {text!r}: the target {target!r} is not an absolute path: write {_GRAMMAR}")
    bind = source.startswith((".", "~", "/"))
    mount = mount_pb2.MountSpec(
        type=mount_pb2.MOUNT_TYPE_BIND if bind else mount_pb2.MOUNT_TYPE_VOLUME,
        source=_absolute(source) if bind else source, target=target, create_source=bind,
    )  # fmt: skip
    set_options(mount, parts[2] if len(parts) == 3 else "", f"-v: {text!r}")
    return mount


def set_options(mount: mount_pb2.MountSpec, text: str, what: str) -> None:
    """Set the comma-separated options of -v; of each sort at most one, as Docker."""
    seen: dict[str, str] = {}
    for option in text.split(",") if text else ():
        sort = _set_option(mount, option)
        if not sort:
            raise click.UsageError(
                f"{what}: option {option!r} is none of {', '.join(_SWITCHES)}, idmap=…, z, Z, "
                + (", ".join(_PROPAGATIONS) if mount.type == mount_pb2.MOUNT_TYPE_BIND else "nocopy")
            )
        if sort in seen:
            raise click.UsageError(f"{what}: options {seen[sort]!r} and {option!r} exclude each other")
        seen[sort] = option


def _set_option(mount: mount_pb2.MountSpec, option: str) -> str:
    """Set one option of -v; returns its sort, "" when it is none."""
    bind = mount.type == mount_pb2.MOUNT_TYPE_BIND
    if option in _SWITCHES:
        field, value = _SWITCHES[option]
        setattr(mount, field, value)
        return field
    if option == "nocopy" and not bind:
        mount.no_copy = True
        return "no_copy"
    if option in _PROPAGATIONS and bind:
        mount.propagation = option
        return "propagation"
    if option.startswith("idmap="):
        _set_mappings(mount, option.removeprefix("idmap="), "-v idmap")
        return "idmap"
    return {"z": "label", "Z": "label"}.get(option, "consistency") if option in _IGNORED else ""


def _set_mappings(mount: mount_pb2.MountSpec, text: str, flag: str) -> None:
    """Parse `uids=STORED-SHOWN-COUNT[#…][;gids=…]`."""
    for part in text.split(";"):
        key, _, ranges = part.partition("=")
        if key not in ("uids", "gids"):
            raise click.UsageError(f"{flag}: {text!r}: write uids=STORED-SHOWN-COUNT[#…][;gids=…]")
        mappings = mount.uid_mappings if key == "uids" else mount.gid_mappings
        for each in ranges.split("#"):
            numbers = each.split("-")
            if len(numbers) != 3 or not all(n.isdecimal() and int(n) < 1 << 32 for n in numbers):
                raise click.UsageError(f"{flag}: {each!r}: write STORED-SHOWN-COUNT, three numbers of 32 bits")
            stored, shown, count = map(int, numbers)
            mappings.add(stored_id=stored, mount_id=shown, count=count)


def parse_tmpfs(text: str) -> mount_pb2.MountSpec:
    """Parse `TARGET[:OPTIONS]` of --tmpfs."""
    target, _, options = text.partition(":")
    mount = mount_pb2.MountSpec(type=mount_pb2.MOUNT_TYPE_TMPFS, target=target)
    for option in options.split(",") if options else ():
        key, _, value = option.partition("=")
        if key == "size":
            mount.tmpfs_size_bytes = parse_bytes(value, "--tmpfs size")
        elif key == "mode":
            mount.tmpfs_mode = _octal(value, "--tmpfs mode")
        elif option in ("ro", "rw"):
            mount.read_only = option == "ro"
        else:
            mount.tmpfs_options.append(option)
    return mount


def parse_mount(text: str) -> mount_pb2.MountSpec:
    """Parse the comma-separated `key=value` of --mount."""
    mount = mount_pb2.MountSpec(type=mount_pb2.MOUNT_TYPE_VOLUME)
    for part in comma_separated(text, "--mount"):
        key, separator, value = part.partition("=")
        if key != key.strip() or value != value.strip():
            raise click.UsageError(f"--mount: {part!r}: no spaces around key and value")
        _set_key(mount, key.lower(), value, flag=not separator)
    if mount.type == mount_pb2.MOUNT_TYPE_BIND and mount.source.startswith((".", "~")):
        mount.source = _absolute(mount.source)
    return mount


def _set_key(mount: mount_pb2.MountSpec, key: str, value: str, *, flag: bool) -> None:
    if key in _BOOLEANS:
        setattr(mount, _BOOLEANS[key], _truth(value, key, flag=flag))
    elif key in _TEXTS and not flag:
        setattr(mount, _TEXTS[key], value)
    elif key in _PARSED and not flag:
        _PARSED[key](mount, value)
    elif key == "bind-nonrecursive":
        raise click.UsageError("--mount: bind-nonrecursive is no more: write bind-recursive=disabled")
    elif key in _TEXTS or key in _PARSED:
        raise click.UsageError(f"--mount: {key!r} needs a value: write {key}=…")
    elif key != "consistency":
        known = ", ".join((*_PARSED, *_TEXTS, *_BOOLEANS))
        raise click.UsageError(f"--mount: key {key!r} is none of {known}")


def _set_type(mount: mount_pb2.MountSpec, value: str) -> None:
    if value not in _TYPES:
        raise click.UsageError(f"--mount: type {value!r} is none of {', '.join(_TYPES)}")
    mount.type = _TYPES[value]


def _set_recursive(mount: mount_pb2.MountSpec, value: str) -> None:
    if value not in _RECURSIVE:
        raise click.UsageError(f"--mount: bind-recursive {value!r} is none of {', '.join(_RECURSIVE)}")
    mount.recursive = value


def _set_item(field: str, key: str) -> Callable[[mount_pb2.MountSpec, str], None]:
    def set_item(mount: mount_pb2.MountSpec, value: str) -> None:
        name, _, text = value.partition("=")
        if not name:
            raise click.UsageError(f"--mount: {key} {value!r} has no key: write {key}=KEY=VALUE")
        getattr(mount, field)[name] = text

    return set_item


def _set_number(field: str, parse: Callable[[str, str], int], key: str) -> Callable[[mount_pb2.MountSpec, str], None]:
    return lambda mount, value: setattr(mount, field, parse(value, f"--mount {key}"))


def _octal(value: str, flag: str) -> int:
    try:
        mode = int(value, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o7777:
        raise click.UsageError(f"{flag}: {value!r} is no file mode: write an octal number up to 7777")
    return mode


_BOOLEANS: Mapping[str, str] = {
    "readonly": "read_only", "ro": "read_only", "volume-nocopy": "no_copy", "bind-create-src": "create_source",
    "noexec": "no_exec", "nosuid": "no_suid", "nodev": "no_dev", "chown": "chown", "u": "chown",
}  # fmt: skip
_TEXTS: Mapping[str, str] = {
    "source": "source", "src": "source", "target": "target", "dst": "target", "destination": "target",
    "bind-propagation": "propagation", "volume-subpath": "subpath", "image-subpath": "subpath",
    "volume-driver": "volume_driver",
}  # fmt: skip
_PARSED: Mapping[str, Callable[[mount_pb2.MountSpec, str], Any]] = {
    "type": _set_type,
    "bind-recursive": _set_recursive,
    "tmpfs-size": _set_number("tmpfs_size_bytes", parse_bytes, "tmpfs-size"),
    "tmpfs-mode": _set_number("tmpfs_mode", _octal, "tmpfs-mode"),
    "volume-opt": _set_item("volume_options", "volume-opt"),
    "volume-label": _set_item("volume_labels", "volume-label"),
    "idmap": lambda mount, value: _set_mappings(mount, value, "--mount idmap"),
}


def _truth(value: str, key: str, *, flag: bool) -> bool:
    if flag or value.lower() in ("true", "1"):
        return True
    if value.lower() in ("false", "0"):
        return False
    raise click.UsageError(f"--mount: {key}={value!r}: true or false")


def _absolute(path: str) -> str:
    return str(Path(os.path.expanduser(path)).absolute())
