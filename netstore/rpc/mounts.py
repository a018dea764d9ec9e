"""Mounts of container specs: checked and translated."""

from __future__ import annotations

import os
from collections.abc import Sequence

from netstore.api.v1 import mount_pb2 as pb
from netstore.errors import InvalidArgument
from netstore.model import IdMapping, Mount, MountSpec, MountType
from netstore.rpc.fields import check_labels, check_name

__all__ = ["check_target", "to_mount", "to_mount_message", "to_status_message", "to_volumes_from"]

_TYPES = {
    pb.MOUNT_TYPE_UNSPECIFIED: MountType.VOLUME,
    pb.MOUNT_TYPE_VOLUME: MountType.VOLUME,
    pb.MOUNT_TYPE_BIND: MountType.BIND,
    pb.MOUNT_TYPE_TMPFS: MountType.TMPFS,
    pb.MOUNT_TYPE_IMAGE: MountType.IMAGE,
}
_MESSAGES = {kind: value for value, kind in _TYPES.items() if value}
_PROPAGATIONS = ("", "rprivate", "private", "rshared", "shared", "rslave", "slave")
_TMPFS_OPTIONS = ("exec", "noexec", "suid", "nosuid", "dev", "nodev", "ro", "rw", "noatime", "relatime")
_TMPFS_VALUES = ("uid", "gid", "nr_inodes")
_RECURSIVE = ("", "enabled", "disabled", "writable", "readonly")
_VOLUME, _BIND, _TMPFS, _IMAGE = MountType.VOLUME, MountType.BIND, MountType.TMPFS, MountType.IMAGE
_OF_TYPES = {
    "no_copy": (_VOLUME,), "volume_driver": (_VOLUME,), "volume_options": (_VOLUME,), "volume_labels": (_VOLUME,),
    "create_source": (_BIND,), "propagation": (_BIND,), "recursive": (_BIND,), "subpath": (_VOLUME, _IMAGE),
    "tmpfs_size_bytes": (_TMPFS,), "tmpfs_mode": (_TMPFS,), "tmpfs_options": (_TMPFS,),
    "no_exec": (_VOLUME, _BIND, _IMAGE), "no_suid": (_VOLUME, _BIND, _IMAGE), "no_dev": (_VOLUME, _BIND, _IMAGE),
    "uid_mappings": (_VOLUME, _BIND), "gid_mappings": (_VOLUME, _BIND), "chown": (_VOLUME, _BIND),
}  # fmt: skip
_MAX_RANGES = 340  # user_namespaces(7)


def to_mount(mount: pb.MountSpec, field: str) -> MountSpec:
    """Translate a mount.

    Raises:
        InvalidArgument: naming the field.
    """
    if mount.type not in _TYPES:
        raise InvalidArgument(f"{field}.type", mount.type, "a value of MountType")
    kind = _TYPES[mount.type]
    for name, owners in _OF_TYPES.items():
        if getattr(mount, name) and kind not in owners:
            shown = getattr(mount, name)
            accepted = f"nothing: it is for mounts of type {' or '.join(owners)}"
            raise InvalidArgument(
                f"{field}.{name}", shown if isinstance(shown, bool | str | int) else str(shown), accepted
            )
    check_target(mount.target, f"{field}.target")
    _check_source(kind, mount.source, f"{field}.source")
    _check_tmpfs(mount, field)
    _check_propagation(mount, field)
    _check_subpath(mount, field)
    if mount.chown and (mount.uid_mappings or mount.gid_mappings or mount.read_only):
        raise InvalidArgument(f"{field}.chown", True, "false with read_only, uid_mappings or gid_mappings")
    return MountSpec(
        type=kind,
        source=mount.source,
        target=mount.target,
        read_only=mount.read_only or kind is MountType.IMAGE,
        no_copy=mount.no_copy,
        create_source=mount.create_source,
        propagation=mount.propagation,
        tmpfs_size_bytes=mount.tmpfs_size_bytes,
        tmpfs_mode=mount.tmpfs_mode,
        tmpfs_options=tuple(mount.tmpfs_options),
        volume_driver=mount.volume_driver,
        volume_options=dict(mount.volume_options),
        volume_labels=check_labels(mount.volume_labels, field=f"{field}.volume_labels"),
        subpath=mount.subpath.strip("/"),
        recursive=mount.recursive,
        no_exec=mount.no_exec,
        no_suid=mount.no_suid,
        no_dev=mount.no_dev,
        uid_mappings=_to_mappings(mount.uid_mappings, f"{field}.uid_mappings"),
        gid_mappings=_to_mappings(mount.gid_mappings, f"{field}.gid_mappings"),
        chown=mount.chown,
    )


def to_volumes_from(references: Sequence[str], field: str) -> tuple[str, ...]:
    """Return references of `volumes_from`.

    Raises:
        InvalidArgument: naming the one that is none.
    """
    if len(references) > 64:
        raise InvalidArgument(field, f"{len(references)} containers", "at most 64")
    for index, text in enumerate(references):
        name, colon, mode = text.partition(":")
        if not name or (colon and mode not in ("ro", "rw", "z", "Z")):
            raise InvalidArgument(f"{field}[{index}]", text, "CONTAINER, CONTAINER:ro or CONTAINER:rw")
    return tuple(references)


def _check_tmpfs(mount: pb.MountSpec, field: str) -> None:
    if mount.tmpfs_size_bytes < 0:
        raise InvalidArgument(f"{field}.tmpfs_size_bytes", mount.tmpfs_size_bytes, "0, or a size in bytes")
    if mount.tmpfs_mode > 0o7777:
        raise InvalidArgument(f"{field}.tmpfs_mode", mount.tmpfs_mode, "a file mode up to 07777")
    for option in mount.tmpfs_options:
        key, _, value = option.partition("=")
        if option not in _TMPFS_OPTIONS and not (key in _TMPFS_VALUES and value.isdecimal()):
            accepted = ", ".join((*_TMPFS_OPTIONS, *(f"{name}=N" for name in _TMPFS_VALUES)))
            raise InvalidArgument(f"{field}.tmpfs_options", option, accepted)


def _check_propagation(mount: pb.MountSpec, field: str) -> None:
    if mount.propagation not in _PROPAGATIONS:
        raise InvalidArgument(f"{field}.propagation", mount.propagation, f"one of {', '.join(_PROPAGATIONS[1:])}")
    if mount.recursive not in _RECURSIVE:
        raise InvalidArgument(f"{field}.recursive", mount.recursive, f"one of {', '.join(_RECURSIVE[1:])}")
    if mount.recursive in ("writable", "readonly") and not mount.read_only:
        raise InvalidArgument(f"{field}.recursive", mount.recursive, "this with read_only only")
    if mount.recursive == "readonly" and mount.propagation not in ("", "rprivate", "private"):
        raise InvalidArgument(f"{field}.recursive", mount.recursive, "this with the propagation rprivate only")


def _check_subpath(mount: pb.MountSpec, field: str) -> None:
    path = mount.subpath
    if path and (path.startswith("/") or ".." in path.split("/") or "\0" in path or not path.strip("/.")):
        raise InvalidArgument(f"{field}.subpath", path, "a relative path without '..'")
    if path and not mount.source:
        raise InvalidArgument(f"{field}.subpath", path, "nothing for an anonymous volume: it is empty")


def _to_mappings(mappings: Sequence[pb.IdMapping], field: str) -> tuple[IdMapping, ...]:
    if len(mappings) > _MAX_RANGES:
        raise InvalidArgument(field, f"{len(mappings)} ranges", f"at most {_MAX_RANGES}")
    for index, each in enumerate(mappings):
        if not each.count or max(each.stored_id, each.mount_id) + each.count > 0xFFFFFFFF:
            shown = f"{each.stored_id}-{each.mount_id}-{each.count}"
            raise InvalidArgument(f"{field}[{index}]", shown, "a count of 1 or more, ids up to 4294967294")
    return tuple(IdMapping(each.stored_id, each.mount_id, each.count) for each in mappings)


def check_target(target: str, field: str) -> None:
    """Refuse a path that is no target of a mount.

    Raises:
        InvalidArgument: naming the field.
    """
    parts = target.split("/")
    if not target.startswith("/") or not target.strip("/") or ".." in parts or "\0" in target:
        raise InvalidArgument(field, target, "an absolute path inside, not /, without '..'")
    if os.path.normpath(target).split("/")[1] == "proc":
        raise InvalidArgument(field, target, "a path that is not in /proc")


def _check_source(kind: MountType, source: str, field: str) -> None:
    if kind is MountType.TMPFS and source:
        raise InvalidArgument(field, source, "nothing: a tmpfs has no source")
    if kind is MountType.BIND and (not source.startswith("/") or "\0" in source):
        raise InvalidArgument(field, source, "an absolute path of the host")
    if kind is MountType.VOLUME and source:
        check_name(field, source, otherwise="or an absolute path, for what is on the host")
    if kind is MountType.IMAGE and not source:
        raise InvalidArgument(field, source, "the name or id of an image")


def to_mount_message(spec: MountSpec) -> pb.MountSpec:
    """Translate a mount's spec back."""
    return pb.MountSpec(
        type=_MESSAGES[spec.type],
        source=spec.source,
        target=spec.target,
        read_only=spec.read_only,
        no_copy=spec.no_copy,
        create_source=spec.create_source,
        propagation=spec.propagation,
        tmpfs_size_bytes=spec.tmpfs_size_bytes,
        tmpfs_mode=spec.tmpfs_mode,
        tmpfs_options=spec.tmpfs_options,
        volume_driver=spec.volume_driver,
        volume_options=spec.volume_options,
        volume_labels=spec.volume_labels,
        subpath=spec.subpath,
        recursive=spec.recursive,
        no_exec=spec.no_exec,
        no_suid=spec.no_suid,
        no_dev=spec.no_dev,
        uid_mappings=[_to_mapping_message(each) for each in spec.uid_mappings],
        gid_mappings=[_to_mapping_message(each) for each in spec.gid_mappings],
        chown=spec.chown,
    )


def _to_mapping_message(mapping: IdMapping) -> pb.IdMapping:
    return pb.IdMapping(stored_id=mapping.stored_id, mount_id=mapping.mount_id, count=mapping.count)


def to_status_message(mount: Mount) -> pb.MountStatus:
    """Translate a resolved mount."""
    return pb.MountStatus(
        type=_MESSAGES[mount.spec.type],
        volume=mount.volume,
        source=mount.source,
        target=mount.spec.target,
        read_only=mount.spec.read_only,
        subpath=mount.spec.subpath,
        attached=mount.attached,
    )
