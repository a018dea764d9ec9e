"""Mounts of container specs: checked and translated."""

from __future__ import annotations

from netstore.api.v1 import mount_pb2 as pb
from netstore.errors import InvalidArgument
from netstore.model import Mount, MountSpec, MountType
from netstore.rpc.fields import check_labels, check_name

__all__ = ["to_mount", "to_mount_message", "to_status_message"]

_TYPES = {
    pb.MOUNT_TYPE_UNSPECIFIED: MountType.VOLUME,
    pb.MOUNT_TYPE_VOLUME: MountType.VOLUME,
    pb.MOUNT_TYPE_BIND: MountType.BIND,
    pb.MOUNT_TYPE_TMPFS: MountType.TMPFS,
}
_MESSAGES = {kind: value for value, kind in _TYPES.items() if value}
_PROPAGATIONS = ("", "rprivate", "private", "rshared", "shared", "rslave", "slave")
_TMPFS_OPTIONS = ("exec", "noexec", "suid", "nosuid", "dev", "nodev", "ro", "rw", "noatime", "relatime")
_TMPFS_VALUES = ("uid", "gid", "nr_inodes")
_OF_TYPE = {
    "no_copy": MountType.VOLUME, "volume_driver": MountType.VOLUME, "volume_options": MountType.VOLUME,
    "volume_labels": MountType.VOLUME, "create_source": MountType.BIND, "propagation": MountType.BIND,
    "tmpfs_size_bytes": MountType.TMPFS, "tmpfs_mode": MountType.TMPFS, "tmpfs_options": MountType.TMPFS,
}  # fmt: skip


def to_mount(mount: pb.MountSpec, field: str) -> MountSpec:
    """Translate a mount.

    Raises:
        InvalidArgument: naming the field.
    """
    if mount.type not in _TYPES:
        raise InvalidArgument(f"{field}.type", mount.type, "a value of MountType")
    kind = _TYPES[mount.type]
    for name, owner in _OF_TYPE.items():
        if getattr(mount, name) and owner is not kind:
            raise InvalidArgument(f"{field}.{name}", getattr(mount, name), f"nothing: it is for mounts of type {owner}")
    _check_target(mount.target, f"{field}.target")
    _check_source(kind, mount.source, f"{field}.source")
    if mount.propagation not in _PROPAGATIONS:
        raise InvalidArgument(f"{field}.propagation", mount.propagation, f"one of {', '.join(_PROPAGATIONS[1:])}")
    if mount.tmpfs_size_bytes < 0:
        raise InvalidArgument(f"{field}.tmpfs_size_bytes", mount.tmpfs_size_bytes, "0, or a size in bytes")
    if mount.tmpfs_mode > 0o7777:
        raise InvalidArgument(f"{field}.tmpfs_mode", mount.tmpfs_mode, "a file mode up to 07777")
    for option in mount.tmpfs_options:
        key, _, value = option.partition("=")
        if option not in _TMPFS_OPTIONS and not (key in _TMPFS_VALUES and value.isdecimal()):
            accepted = ", ".join((*_TMPFS_OPTIONS, *(f"{name}=N" for name in _TMPFS_VALUES)))
            raise InvalidArgument(f"{field}.tmpfs_options", option, accepted)
    return MountSpec(
        type=kind,
        source=mount.source,
        target=mount.target,
        read_only=mount.read_only,
        no_copy=mount.no_copy,
        create_source=mount.create_source,
        propagation=mount.propagation,
        tmpfs_size_bytes=mount.tmpfs_size_bytes,
        tmpfs_mode=mount.tmpfs_mode,
        tmpfs_options=tuple(mount.tmpfs_options),
        volume_driver=mount.volume_driver,
        volume_options=dict(mount.volume_options),
        volume_labels=check_labels(mount.volume_labels, field=f"{field}.volume_labels"),
    )


def _check_target(target: str, field: str) -> None:
    parts = target.split("/")
    if not target.startswith("/") or not target.strip("/") or ".." in parts or "\0" in target:
        raise InvalidArgument(field, target, "an absolute path inside, not /, without '..'")


def _check_source(kind: MountType, source: str, field: str) -> None:
    if kind is MountType.TMPFS and source:
        raise InvalidArgument(field, source, "nothing: a tmpfs has no source")
    if kind is MountType.BIND and (not source.startswith("/") or "\0" in source):
        raise InvalidArgument(field, source, "an absolute path of the host")
    if kind is MountType.VOLUME and source:
        check_name(field, source)


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
    )


def to_status_message(mount: Mount) -> pb.MountStatus:
    """Translate a resolved mount."""
    return pb.MountStatus(
        type=_MESSAGES[mount.spec.type],
        volume=mount.volume,
        source=mount.source,
        target=mount.spec.target,
        read_only=mount.spec.read_only,
    )
