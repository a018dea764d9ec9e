"""What CSI's words are in netstore's."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

import grpc

from netstore.adapters.csi.pb import csi_pb2 as csi
from netstore.api.v1 import snapshot_pb2, volume_pb2
from netstore.client import Client
from netstore.errors import InvalidArgument, NotFound
from netstore.kernel.mounts import MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY

__all__ = [
    "FLAGS",
    "NAME",
    "SOURCE",
    "TOPOLOGY",
    "check_capabilities",
    "condition",
    "content_source",
    "find_volume",
    "holder",
    "is_block",
    "is_published",
    "labels_of",
    "mismatch",
    "resource_name",
    "snapshot_id",
    "split_snapshot_id",
    "unsupported",
    "volume_message",
]

NAME, SOURCE = "netstore.csi/name", "netstore.csi/source"
"""Labels of what was made through CSI: the orchestrator's name for it, and the id of what it is a copy of."""

TOPOLOGY = "netstore.node"
"""The one topology key: the id of the node that a volume is on."""

FLAGS = {
    "ro": MOUNT_ATTR_RDONLY,
    "rw": 0,
    "nosuid": MOUNT_ATTR_NOSUID,
    "nodev": MOUNT_ATTR_NODEV,
    "noexec": MOUNT_ATTR_NOEXEC,
}
"""The mount flags that there are, and what they are to mount_setattr(2)."""

Mode = csi.VolumeCapability.AccessMode
_NODE_MODES = (
    Mode.SINGLE_NODE_WRITER,
    Mode.SINGLE_NODE_READER_ONLY,
    Mode.SINGLE_NODE_SINGLE_WRITER,
    Mode.SINGLE_NODE_MULTI_WRITER,
)
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")
_BANNED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_KUBERNETES = "csi.storage.k8s.io/"
_ID = re.compile(r"[0-9a-f]{64}")
_SNAPSHOT_DIGITS = 32  # CSI gives ids 128 bytes


def resource_name(field: str, name: str) -> str:
    """Return netstore's name for a name of CSI's, which may have nearly any character.

    Raises:
        InvalidArgument: it is empty, longer than 128 bytes, or has control characters.
    """
    if not name or len(name.encode()) > 128 or _BANNED.search(name):
        raise InvalidArgument(field, name, "1 to 128 bytes without control characters")
    return name if _NAME.fullmatch(name) else f"csi-{hashlib.sha256(name.encode()).hexdigest()[:32]}"


def unsupported(capability: csi.VolumeCapability) -> str:
    """Return why a volume cannot be used in a way, "" when it can."""
    mode = capability.access_mode.mode
    if mode not in _NODE_MODES:
        return f"access mode {Mode.Mode.Name(mode)}: volumes are on one node; use a SINGLE_NODE mode"
    if is_block(capability) and mode == Mode.SINGLE_NODE_READER_ONLY:
        return "a device that is read-only: a mount does not stop writes to it; use another SINGLE_NODE mode"
    if capability.mount.volume_mount_group:
        return "volume_mount_group: give uid, gid and mode as parameters of the volume"
    for flag in capability.mount.mount_flags:
        if flag not in FLAGS:
            return f"mount flag {flag}: there are {', '.join(FLAGS)}"
    return ""


def mismatch(volume: volume_pb2.Volume, capability: csi.VolumeCapability) -> str:
    """Return why a volume is not what a capability takes it for, "" when it is."""
    block, spec, wanted = is_block(capability), volume.spec, capability.mount.fs_type
    if block != (spec.mode == volume_pb2.VOLUME_MODE_BLOCK):
        return "it is a filesystem, not a device" if block else "it is a device, not a filesystem"
    if wanted and spec.driver != "image":
        return f"fs_type {wanted}: the driver {spec.driver} has none to choose; leave it out"
    if wanted and wanted != spec.options.get("fs", "ext4"):
        return f"fs_type {wanted}: the volume is {spec.options.get('fs', 'ext4')}"
    return ""


def check_capabilities(field: str, capabilities: Iterable[csi.VolumeCapability]) -> None:
    """Check that there are some, and that each can be had.

    Raises:
        InvalidArgument: naming the field.
    """
    given = list(capabilities)
    if not given:
        raise InvalidArgument(field, "", "at least one capability")
    for each in given:
        if not each.WhichOneof("access_type"):
            raise InvalidArgument(f"{field}.access_type", "", "block or mount")
        if each.access_mode.mode not in Mode.Mode.values() or each.access_mode.mode == Mode.UNKNOWN:
            raise InvalidArgument(f"{field}.access_mode", each.access_mode.mode, "a mode of the specification")
        if why := unsupported(each):
            raise InvalidArgument(field, Mode.Mode.Name(each.access_mode.mode), why)
    if len({is_block(each) for each in given}) > 1:
        raise InvalidArgument(f"{field}.access_type", "block and mount", "one of them")


def is_block(capability: csi.VolumeCapability) -> bool:
    """Say whether a volume is wanted as a device."""
    return capability.WhichOneof("access_type") == "block"


def holder(kind: str, path: str) -> str:
    """Return the name by which a path holds a volume. `kind` is "stage", "publish", or "single" (the only writer)."""
    return f"csi.{kind}.{hashlib.sha256(path.encode()).hexdigest()[:40]}"


def is_published(holder: str) -> bool:
    """Say whether a holder is a target path."""
    return holder.startswith(("csi.publish.", "csi.single."))


async def find_volume(client: Client, volume_id: str, field: str = "volume_id") -> volume_pb2.Volume:
    """Return a volume by its whole id.

    Raises:
        InvalidArgument: the id is empty.
        NotFound: there is no such volume.
    """
    if not volume_id:
        raise InvalidArgument(field, volume_id, "the id of a volume")
    if not _ID.fullmatch(volume_id):
        raise NotFound("volume", volume_id)
    try:
        return (await client.volumes.GetVolume(volume_pb2.GetVolumeRequest(volume=volume_id))).volume
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            raise NotFound("volume", volume_id) from error
        raise


def snapshot_id(snapshot: snapshot_pb2.Snapshot) -> str:
    """Return CSI's id of a snapshot: its volume's, and enough of its own."""
    return f"{snapshot.status.volume_id}/{snapshot.id[:_SNAPSHOT_DIGITS]}"


def split_snapshot_id(text: str) -> tuple[str, str]:
    """Return the ids of a snapshot's volume and of the snapshot.

    Raises:
        NotFound: no snapshot can have that id.
    """
    volume, _, snapshot = text.partition("/")
    if not _ID.fullmatch(volume) or not re.fullmatch(rf"[0-9a-f]{{{_SNAPSHOT_DIGITS}}}", snapshot):
        raise NotFound("snapshot", text)
    return volume, snapshot


def content_source(text: str) -> csi.VolumeContentSource | None:
    """Return the source that a label names."""
    if not text:
        return None
    if "/" in text:
        return csi.VolumeContentSource(snapshot=csi.VolumeContentSource.SnapshotSource(snapshot_id=text))
    return csi.VolumeContentSource(volume=csi.VolumeContentSource.VolumeSource(volume_id=text))


def volume_message(volume: volume_pb2.Volume) -> csi.Volume:
    """Translate a volume."""
    return csi.Volume(
        volume_id=volume.id,
        capacity_bytes=volume.spec.size_bytes,
        content_source=content_source(volume.labels.get(SOURCE, "")),
        accessible_topology=[csi.Topology(segments=volume.status.accessible_topology)],
    )


def condition(volume: volume_pb2.Volume) -> csi.VolumeCondition:
    """Translate a volume's health."""
    failed = volume.status.state == volume_pb2.VOLUME_STATE_FAILED
    return csi.VolumeCondition(abnormal=failed, message=volume.status.message or "the volume is well")


def labels_of(parameters: Mapping[str, str]) -> dict[str, str]:
    """Return what Kubernetes says of the claim, of parameters that are not for us."""
    return {key: value for key, value in parameters.items() if key.startswith(_KUBERNETES)}
