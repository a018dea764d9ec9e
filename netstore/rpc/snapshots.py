"""SnapshotService: messages in, calls of the snapshots, messages out."""

from __future__ import annotations

from typing import Any

from netstore.api.v1 import snapshot_pb2 as pb
from netstore.api.v1 import snapshot_pb2_grpc
from netstore.errors import InvalidArgument
from netstore.model import Consistency, Snapshot, Volume, VolumeSpec
from netstore.rpc import volumes
from netstore.rpc.fields import (
    Filters,
    check_labels,
    check_name,
    check_request_id,
    duration,
    missing_allowed,
    page,
    timestamp,
)
from netstore.volumes.manager import VolumeManager

__all__ = ["CONSISTENCY", "SnapshotServicer"]

CONSISTENCY = {each: getattr(pb, f"SNAPSHOT_CONSISTENCY_{each.name}") for each in Consistency}


class SnapshotServicer(snapshot_pb2_grpc.SnapshotServiceServicer):
    """Implements `netstore.v1.SnapshotService`."""

    def __init__(self, manager: VolumeManager) -> None:
        self._volumes = manager
        self._snapshots = manager.snapshots

    async def CreateSnapshot(self, request: pb.CreateSnapshotRequest, context: Any) -> pb.CreateSnapshotResponse:
        wanted = request.snapshot
        made = await self._snapshots.create(
            wanted.spec.volume,
            check_name("name", wanted.name) if wanted.name else "",
            labels=check_labels(wanted.labels),
            request_id=check_request_id(request.request_id),
        )
        return pb.CreateSnapshotResponse(snapshot=_to_message(*made))

    async def GetSnapshot(self, request: pb.GetSnapshotRequest, context: Any) -> pb.GetSnapshotResponse:
        return pb.GetSnapshotResponse(
            snapshot=_to_message(*await self._snapshots.get(request.volume, request.snapshot))
        )

    async def ListSnapshots(self, request: pb.ListSnapshotsRequest, context: Any) -> pb.ListSnapshotsResponse:
        filters = Filters(request.filter, ("label", "name", "scheduled"))
        scheduled = filters.flag("scheduled")
        found = [
            (snapshot, volume)
            for snapshot, volume in await self._snapshots.all(request.volume)
            if filters.any("name", lambda value, s=snapshot: value in s.name)  # type: ignore[misc]
            and filters.labels(snapshot.labels)
            and scheduled in (None, snapshot.scheduled)
        ]
        shown, token = page(found, request.page_size, request.page_token, lambda pair: pair[0])
        return pb.ListSnapshotsResponse(snapshots=[_to_message(*pair) for pair in shown], next_page_token=token)

    async def DeleteSnapshot(self, request: pb.DeleteSnapshotRequest, context: Any) -> pb.DeleteSnapshotResponse:
        with missing_allowed(allow=request.allow_missing):
            await self._snapshots.delete(request.volume, request.snapshot)
        return pb.DeleteSnapshotResponse()

    async def RestoreSnapshot(self, request: pb.RestoreSnapshotRequest, context: Any) -> pb.RestoreSnapshotResponse:
        volume = await self._snapshots.restore(request.volume, request.snapshot)
        return pb.RestoreSnapshotResponse(volume=volumes.to_message(*await self._volumes.get(volume.id)))

    async def CloneVolume(self, request: pb.CloneVolumeRequest, context: Any) -> pb.CloneVolumeResponse:
        wanted = request.volume
        if not wanted.name:
            raise InvalidArgument("volume.name", "", "the name of the new volume")
        spec: VolumeSpec | None = volumes.to_spec(wanted.spec) if wanted.HasField("spec") else None
        volume, taken = await self._volumes.filling.clone(
            request.source_volume, request.source_snapshot, check_name("volume.name", wanted.name), spec,
            labels=check_labels(wanted.labels, field="volume.labels"),
            request_id=check_request_id(request.request_id),
        )  # fmt: skip
        self._volumes.chores.wake()
        return pb.CloneVolumeResponse(
            volume=volumes.to_message(volume, []),
            consistency=CONSISTENCY[taken.consistency],
            frozen_time=duration(taken.frozen_seconds),
        )


def _to_message(snapshot: Snapshot, volume: Volume) -> pb.Snapshot:
    return pb.Snapshot(
        id=snapshot.id,
        name=snapshot.name,
        labels=snapshot.labels,
        etag=str(snapshot.revision),
        create_time=timestamp(snapshot.create_time),
        spec=pb.SnapshotSpec(volume=volume.name),
        status=pb.SnapshotStatus(
            ready=True,
            size_bytes=snapshot.size_bytes,
            consistency=CONSISTENCY[snapshot.consistency],
            frozen_time=duration(snapshot.frozen_seconds),
            scheduled=snapshot.scheduled,
            volume_id=volume.id,
        ),
    )
