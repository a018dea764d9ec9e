"""Every field of every request about volumes, snapshots, archives and mounts, with a bad value."""

from __future__ import annotations

import pytest
from bad_input import INVALID, MISSING, PRECONDITION, UNIMPLEMENTED, mask, refused
from conftest import Node

from netstore.api.v1 import archive_pb2, mount_pb2, snapshot_pb2, volume_pb2
from netstore.client import BlockingClient as Client

BIND, TMPFS, IMAGE = mount_pb2.MOUNT_TYPE_BIND, mount_pb2.MOUNT_TYPE_TMPFS, mount_pb2.MOUNT_TYPE_IMAGE


def volume(**spec):
    return volume_pb2.CreateVolumeRequest(volume={"name": "v", "spec": spec})


def importing(**start: object) -> list[archive_pb2.ImportVolumeRequest]:
    return [archive_pb2.ImportVolumeRequest(start=start), archive_pb2.ImportVolumeRequest(end={})]  # type: ignore[arg-type]


def hot(target: str = "/t", *, ref=None, replace=False, **spec):
    spec = mount_pb2.MountSpec(**{"source": "v", "target": target, **spec})
    return mount_pb2.MountRequest(namespace={"container": "c"} if ref is None else ref, spec=spec, replace=replace)


MOUNTS = [
    ("Mount", hot(ref={}), INVALID, "namespace"),
    ("Mount", hot(ref={"container": "c", "pid": 1}), INVALID, "namespace"),
    ("Mount", hot(ref={"container": "nosuch"}, type=TMPFS, source=""), MISSING, "nosuch"),
    ("Mount", hot(ref={"pid": -1}, type=TMPFS, source=""), INVALID, "namespace.pid"),
    ("Mount", hot(ref={"pid": 2**31 - 1}, type=TMPFS, source=""), INVALID, "namespace.pid"),
    ("Mount", hot(ref={"path": "relative"}, type=TMPFS, source=""), INVALID, "namespace.path"),
    ("Mount", hot(ref={"path": "/dev/zero"}, type=TMPFS, source=""), INVALID, "namespace.path"),
    ("Mount", hot(ref={"path": "/nosuch"}, type=TMPFS, source=""), INVALID, "namespace.path"),
    ("Mount", hot(ref={"path": "/proc/self/ns/net"}, type=TMPFS, source=""), INVALID, "namespace.path"),
    ("Mount", hot(ref={"path": "/proc/self/ns/mnt"}, type=TMPFS, source=""), INVALID, "namespace.path"),
    ("Mount", hot(ref={"pid": 1}, chown=True), INVALID, "spec.chown"),
    ("Mount", hot("relative"), INVALID, "spec.target"),
    ("Mount", hot("/"), INVALID, "spec.target"),
    ("Mount", hot("/a/../../b"), INVALID, "spec.target"),
    ("Mount", hot("/proc/sys"), INVALID, "spec.target"),
    ("Mount", hot(source="nosuch"), MISSING, "nosuch"),
    ("Mount", hot(source=""), INVALID, "spec.source"),
    ("Mount", hot(no_copy=True), INVALID, "spec.no_copy"),
    ("Mount", hot(volume_driver="local"), INVALID, "spec.volume_driver"),
    ("Mount", hot(volume_options={"a": "b"}), INVALID, "spec.volume_options"),
    ("Mount", hot(volume_labels={"a": "b"}), INVALID, "spec.volume_labels"),
    ("Mount", hot(type=BIND, source="/tmp", create_source=True), INVALID, "spec.create_source"),
    ("Mount", hot(subpath="../x"), INVALID, "spec.subpath"),
    ("Unmount", mount_pb2.UnmountRequest(target="/t"), INVALID, "namespace"),
    ("Unmount", mount_pb2.UnmountRequest(namespace={"container": "nosuch"}, target="/t"), MISSING, "nosuch"),
    ("Unmount", mount_pb2.UnmountRequest(namespace={"container": "c"}, target="t"), INVALID, "target"),
    ("ListMounts", mount_pb2.ListMountsRequest(namespace={"container": "nosuch"}), MISSING, "nosuch"),
    ("ListMounts", mount_pb2.ListMountsRequest(namespace={"path": "/dev/null"}), INVALID, "namespace.path"),
    ("ListMounts", mount_pb2.ListMountsRequest(page_size=-1), INVALID, "page_size"),
    ("ListMounts", mount_pb2.ListMountsRequest(page_token="x"), INVALID, "page_token"),
]  # fmt: skip

VOLUMES = [
    ("CreateVolume", volume_pb2.CreateVolumeRequest(volume={"name": "../x"}), INVALID, "name"),
    ("CreateVolume", volume_pb2.CreateVolumeRequest(volume={"name": "v", "labels": {"": ""}}), INVALID, "labels"),
    ("CreateVolume", volume_pb2.CreateVolumeRequest(volume={"name": "v", "spec": {"driver": "x"}}), INVALID, "spec.driver"),
    ("CreateVolume", volume_pb2.CreateVolumeRequest(volume={"name": "v", "spec": {"options": {"a": "b"}}}), INVALID, "spec.options"),
    ("CreateVolume", volume_pb2.CreateVolumeRequest(volume={"name": "v", "spec": {"size_bytes": -1}}), INVALID, "spec.size_bytes"),
    ("CreateVolume", volume(driver="local", size_bytes=9), UNIMPLEMENTED, "size_bytes"),
    ("CreateVolume", volume(size_bytes=9), INVALID, "spec.size_bytes"),
    ("CreateVolume", volume(options={"size": "banana"}), INVALID, "spec.options[size]"),
    ("CreateVolume", volume(options={"size": "10M"}, size_bytes=9), INVALID, "spec.options[size]"),
    ("CreateVolume", volume(mode=9), INVALID, "spec.mode"),
    ("CreateVolume", volume(mode="VOLUME_MODE_BLOCK"), INVALID, "spec.mode"),
    ("CreateVolume", volume(driver="image"), INVALID, "spec.size_bytes"),
    ("CreateVolume", volume(driver="image", size_bytes=1 << 50), INVALID, "spec.size_bytes"),
    ("CreateVolume", volume(driver="image", size_bytes=1 << 24, options={"fs": "vfat"}), INVALID, "spec.options[fs]"),
    ("CreateVolume", volume(driver="image", size_bytes=1 << 24, options={"sparse": "x"}), INVALID, "spec.options[sparse]"),
    ("CreateVolume", volume(driver="tmpfs", options={"mode": "9"}), INVALID, "spec.options[mode]"),
    ("CreateVolume", volume(driver="tmpfs", options={"uid": "root"}), INVALID, "spec.options[uid]"),
    ("CreateVolume", volume(driver="tmpfs", size_bytes=1), INVALID, "spec.size_bytes"),
    ("CreateVolume", volume(driver="btrfs"), PRECONDITION, "btrfs-pool"),
    ("CreateVolume", volume(driver="block"), INVALID, "serial, wwn, label, path"),
    ("CreateVolume", volume(driver="block", options={"path": "/etc/passwd"}), INVALID, "spec.options[path]"),
    ("CreateVolume", volume(driver="block", options={"path": "/dev/x", "format": "vfat"}), INVALID, "spec.options[format]"),
    ("CreateVolume", volume(driver="block", options={"path": "/dev/x"}, size_bytes=1 << 30), UNIMPLEMENTED, "spec.size_bytes"),
    ("CreateVolume", volume(driver="image", size_bytes=1 << 24, options={"fs": "xfs"}, mode="VOLUME_MODE_BLOCK"), INVALID, "spec."),
    ("CreateVolume", volume(options={"o": "bind"}), INVALID, "spec.options[type]"),
    ("CreateVolume", volume(options={"type": "x y", "device": "d"}), INVALID, "spec.options[type]"),
    ("CreateVolume", volume(options={"type": "none", "device": "relative", "o": "bind"}), INVALID, "spec.options[device]"),
    ("UpdateVolume", volume_pb2.UpdateVolumeRequest(volume={"name": "v"}, update_mask=mask("spec.driver")), PRECONDITION, "spec.driver"),
    ("StageVolume", volume_pb2.StageVolumeRequest(volume="nosuch", holder="h"), MISSING, "nosuch"),
    ("StageVolume", volume_pb2.StageVolumeRequest(volume="v"), INVALID, "holder"),
    ("TrimVolume", volume_pb2.TrimVolumeRequest(volume="nosuch"), MISSING, "nosuch"),
    ("TrimVolume", volume_pb2.TrimVolumeRequest(), INVALID, "volume"),
    ("CreateVolume", volume(driver="image", size_bytes=1 << 24, options={"o": "discard"}), INVALID, "spec.options[o]"),
    ("CreateVolume", volume(driver="image", size_bytes=1 << 24, options={"mkfs": "-d /dev/x"}), INVALID, "spec.options[mkfs]"),
    ("CreateVolume", volume(driver="image", size_bytes=1 << 24, options={"o": "noexec"}, mode="VOLUME_MODE_BLOCK"), INVALID, "spec.options[o]"),
    ("UnstageVolume", volume_pb2.UnstageVolumeRequest(volume="v", holder="../x"), INVALID, "holder"),
    ("CreateVolume", volume_pb2.CreateVolumeRequest(request_id="x"), INVALID, "request_id"),
    ("GetVolume", volume_pb2.GetVolumeRequest(volume="nosuch"), MISSING, "nosuch"),
    ("ListVolumes", volume_pb2.ListVolumesRequest(page_token="@"), INVALID, "page_token"),
    ("UpdateVolume", volume_pb2.UpdateVolumeRequest(volume={"name": "nosuch"}, update_mask=mask("labels")), MISSING, "nosuch"),
    ("UpdateVolume", volume_pb2.UpdateVolumeRequest(update_mask=mask("name")), PRECONDITION, "name"),
    ("DeleteVolume", volume_pb2.DeleteVolumeRequest(volume="nosuch"), MISSING, "nosuch"),
    ("PruneVolumes", volume_pb2.PruneVolumesRequest(filter=["until=1h"]), INVALID, "filter"),
]  # fmt: skip
VOLUMES += [
    ("CreateVolume", volume_pb2.CreateVolumeRequest(volume={"name": "v", "spec": {"snapshot_schedule": "@often"}}), INVALID, "spec.snapshot_schedule"),
    ("CreateVolume", volume_pb2.CreateVolumeRequest(volume={"name": "v", "spec": {"snapshot_keep": -1}}), INVALID, "spec.snapshot_keep"),
    ("UpdateVolume", volume_pb2.UpdateVolumeRequest(volume={"spec": {"size_bytes": -1}}, update_mask=mask("spec.size_bytes")), INVALID, "spec.size_bytes"),
    ("UpdateVolume", volume_pb2.UpdateVolumeRequest(volume={"name": "nosuch"}, update_mask=mask("spec.driver")), PRECONDITION, "spec.driver"),
    ("DeleteVolume", volume_pb2.DeleteVolumeRequest(volume="nosuch", trash_period={"seconds": -1}), INVALID, "trash_period"),
    ("DeleteVolume", volume_pb2.DeleteVolumeRequest(volume="nosuch", trash_period={"seconds": 10**10}), INVALID, "trash_period"),
    ("PruneVolumes", volume_pb2.PruneVolumesRequest(trash_period={"seconds": -1}), INVALID, "trash_period"),
    ("RenameVolume", volume_pb2.RenameVolumeRequest(volume="nosuch", name="n"), MISSING, "nosuch"),
    ("RenameVolume", volume_pb2.RenameVolumeRequest(volume="nosuch", name="a/b"), INVALID, "name"),
    ("RenameVolume", volume_pb2.RenameVolumeRequest(volume="nosuch"), INVALID, "name"),
    ("ListTrashedVolumes", volume_pb2.ListTrashedVolumesRequest(page_token="@"), INVALID, "page_token"),
    ("ListTrashedVolumes", volume_pb2.ListTrashedVolumesRequest(page_size=-1), INVALID, "page_size"),
    ("RestoreTrashedVolume", volume_pb2.RestoreTrashedVolumeRequest(), INVALID, "volume"),
    ("RestoreTrashedVolume", volume_pb2.RestoreTrashedVolumeRequest(volume="nosuch"), MISSING, "nosuch"),
    ("RestoreTrashedVolume", volume_pb2.RestoreTrashedVolumeRequest(volume="nosuch", name="a/b"), INVALID, "name"),
    ("EmptyTrash", volume_pb2.EmptyTrashRequest(volumes=["nosuch"]), MISSING, "nosuch"),
]  # fmt: skip

SNAPSHOTS = [
    ("CreateSnapshot", snapshot_pb2.CreateSnapshotRequest(), INVALID, "volume"),
    ("CreateSnapshot", snapshot_pb2.CreateSnapshotRequest(snapshot={"spec": {"volume": "nosuch"}}), MISSING, "nosuch"),
    ("CreateSnapshot", snapshot_pb2.CreateSnapshotRequest(snapshot={"name": "a/b", "spec": {"volume": "v"}}), INVALID, "name"),
    ("CreateSnapshot", snapshot_pb2.CreateSnapshotRequest(snapshot={"labels": {"": ""}, "spec": {"volume": "v"}}), INVALID, "labels"),
    ("CreateSnapshot", snapshot_pb2.CreateSnapshotRequest(request_id="x"), INVALID, "request_id"),
    ("GetSnapshot", snapshot_pb2.GetSnapshotRequest(volume="nosuch", snapshot="s"), MISSING, "nosuch"),
    ("ListSnapshots", snapshot_pb2.ListSnapshotsRequest(volume="nosuch"), MISSING, "nosuch"),
    ("ListSnapshots", snapshot_pb2.ListSnapshotsRequest(filter=["x=y"]), INVALID, "filter"),
    ("ListSnapshots", snapshot_pb2.ListSnapshotsRequest(filter=["scheduled=perhaps"]), INVALID, "true or false"),
    ("ListSnapshots", snapshot_pb2.ListSnapshotsRequest(page_size=-1), INVALID, "page_size"),
    ("DeleteSnapshot", snapshot_pb2.DeleteSnapshotRequest(volume="nosuch", snapshot="s"), MISSING, "nosuch"),
    ("RestoreSnapshot", snapshot_pb2.RestoreSnapshotRequest(volume="nosuch", snapshot="s"), MISSING, "nosuch"),
    ("CloneVolume", snapshot_pb2.CloneVolumeRequest(source_volume="nosuch", volume={"name": "n"}), MISSING, "nosuch"),
    ("CloneVolume", snapshot_pb2.CloneVolumeRequest(source_volume="v"), INVALID, "volume.name"),
    ("CloneVolume", snapshot_pb2.CloneVolumeRequest(source_volume="v", volume={"name": "a/b"}), INVALID, "volume.name"),
    ("CloneVolume", snapshot_pb2.CloneVolumeRequest(volume={"name": "n", "spec": {"size_bytes": -1}}), INVALID, "spec.size_bytes"),
    ("CloneVolume", snapshot_pb2.CloneVolumeRequest(volume={"name": "n"}, request_id="x"), INVALID, "request_id"),
]  # fmt: skip

ARCHIVES = [
    ("ExportVolume", archive_pb2.ExportVolumeRequest(volume="nosuch"), MISSING, "nosuch"),
    ("ExportVolume", archive_pb2.ExportVolumeRequest(volume="v", offset=-1), INVALID, "offset"),
    ("ExportVolume", archive_pb2.ExportVolumeRequest(volume="v", level=20), INVALID, "level"),
    ("ExportVolume", archive_pb2.ExportVolumeRequest(volume="v", compression=9), INVALID, "compression"),
    ("ImportVolume", [], INVALID, "start"),
    ("ImportVolume", [archive_pb2.ImportVolumeRequest(chunk=b"x")], INVALID, "start"),
    ("ImportVolume", [archive_pb2.ImportVolumeRequest(start={})], INVALID, "volume.name"),
    ("ImportVolume", importing(volume={"name": "a/b"}), INVALID, "volume.name"),
    ("ImportVolume", importing(volume={"name": "v", "labels": {"": ""}}), INVALID, "volume.labels"),
    ("ImportVolume", importing(volume={"name": "v", "spec": {"size_bytes": -1}}), INVALID, "spec.size_bytes"),
    ("ImportVolume", importing(volume={"name": "v", "spec": {"driver": "x"}}), INVALID, "spec.driver"),
    ("ImportVolume", importing(volume={"name": "v", "spec": {"options": {"type": "tmpfs", "device": "tmpfs"}}}), INVALID, "spec.options[type]"),
    ("ImportVolume", importing(volume={"name": "v"}, upload_id="../../x"), INVALID, "upload_id"),
    ("ImportVolume", importing(volume={"name": "v"}, offset=1), INVALID, "offset"),
    ("ImportVolume", importing(volume={"name": "v"}, offset=-1), INVALID, "offset"),
    ("ImportVolume", [*importing(volume={"name": "v"})[:1], archive_pb2.ImportVolumeRequest(end={"sha256": "x"})], INVALID, "end.sha256"),
    ("GetPath", archive_pb2.GetPathRequest(volume="nosuch", path="/"), MISSING, "nosuch"),
    ("GetPath", archive_pb2.GetPathRequest(volume="nosuch"), INVALID, "path"),
    ("ReadPath", archive_pb2.ReadPathRequest(volume="nosuch", path="/"), MISSING, "nosuch"),
    ("ReadPath", archive_pb2.ReadPathRequest(volume="nosuch"), INVALID, "path"),
    ("WritePath", [], INVALID, "start"),
    ("WritePath", [archive_pb2.WritePathRequest(chunk=b"x")], INVALID, "start"),
    ("WritePath", [archive_pb2.WritePathRequest(start={"volume": "nosuch", "path": "/"})], MISSING, "nosuch"),
    ("WritePath", [archive_pb2.WritePathRequest(start={"volume": "nosuch"})], INVALID, "path"),
    ("VerifyVolume", archive_pb2.VerifyVolumeRequest(volume="nosuch"), MISSING, "nosuch"),
    ("GetUpload", archive_pb2.GetUploadRequest(), INVALID, "upload_id"),
    ("GetUpload", archive_pb2.GetUploadRequest(upload_id="../x"), INVALID, "upload_id"),
    ("GetUpload", archive_pb2.GetUploadRequest(upload_id="0" * 32), MISSING, "upload"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("service", "table"),
    [("volumes", VOLUMES), ("snapshots", SNAPSHOTS), ("archives", ARCHIVES), ("mounts", MOUNTS)],
)  # fmt: skip
def test_bad_values_are_named_and_change_nothing(
    node: Node, client: Client, image: str, service: str, table: list
) -> None:
    refused(node, client, service, table)
