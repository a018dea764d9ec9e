"""VolumeService: messages in, manager calls, messages out."""

from __future__ import annotations

from typing import Any

from netstore.api.v1 import volume_pb2 as pb
from netstore.api.v1 import volume_pb2_grpc
from netstore.errors import InvalidArgument
from netstore.model import Volume, VolumeSpec
from netstore.rpc.fields import (
    Filters,
    check_labels,
    check_mask,
    check_name,
    check_request_id,
    missing_allowed,
    page,
    timestamp,
)
from netstore.volumes.manager import VolumeManager

__all__ = ["VolumeServicer", "to_message", "to_spec"]


class VolumeServicer(volume_pb2_grpc.VolumeServiceServicer):
    """Implements `netstore.v1.VolumeService`."""

    def __init__(self, manager: VolumeManager) -> None:
        self._volumes = manager

    async def GetVolume(self, request: pb.GetVolumeRequest, context: Any) -> pb.GetVolumeResponse:
        return pb.GetVolumeResponse(volume=to_message(*await self._volumes.get(request.volume)))

    async def ListVolumes(self, request: pb.ListVolumesRequest, context: Any) -> pb.ListVolumesResponse:
        filters = Filters(request.filter, ("driver", "label", "name", "dangling"))
        dangling = filters.flag("dangling")
        found = [
            (volume, containers)
            for volume, containers in await self._volumes.all()
            if filters.any("driver", lambda value, v=volume: value == v.spec.driver)  # type: ignore[misc]
            and filters.any("name", lambda value, v=volume: value in v.name)  # type: ignore[misc]
            and filters.labels(volume.labels)
            and dangling in (None, not containers)
        ]
        shown, token = page(found, request.page_size, request.page_token, lambda pair: pair[0])
        return pb.ListVolumesResponse(volumes=[to_message(*pair) for pair in shown], next_page_token=token)

    async def CreateVolume(self, request: pb.CreateVolumeRequest, context: Any) -> pb.CreateVolumeResponse:
        wanted = request.volume
        made = await self._volumes.create(
            check_name("name", wanted.name) if wanted.name else "",
            to_spec(wanted.spec),
            labels=check_labels(wanted.labels),
            request_id=check_request_id(request.request_id),
        )
        return pb.CreateVolumeResponse(volume=to_message(*made))

    async def UpdateVolume(self, request: pb.UpdateVolumeRequest, context: Any) -> pb.UpdateVolumeResponse:
        check_mask(request.update_mask, mutable=["labels"], immutable=["name", "spec"])
        wanted = request.volume
        updated = await self._volumes.update_labels(wanted.id or wanted.name, check_labels(wanted.labels), wanted.etag)
        return pb.UpdateVolumeResponse(volume=to_message(*updated))

    async def DeleteVolume(self, request: pb.DeleteVolumeRequest, context: Any) -> pb.DeleteVolumeResponse:
        with missing_allowed(allow=request.allow_missing):
            await self._volumes.delete(request.volume)
        return pb.DeleteVolumeResponse()

    async def PruneVolumes(self, request: pb.PruneVolumesRequest, context: Any) -> pb.PruneVolumesResponse:
        filters = Filters(request.filter, ("label", "label!"))
        names, reclaimed = await self._volumes.prune(
            lambda volume: filters.labels(volume.labels), all_=request.all, dry_run=request.dry_run
        )
        return pb.PruneVolumesResponse(volumes=names, reclaimed_bytes=reclaimed)


def to_spec(spec: pb.VolumeSpec) -> VolumeSpec:
    """Translate a spec that was asked for.

    Raises:
        InvalidArgument: naming the field.
    """
    if spec.size_bytes < 0:
        raise InvalidArgument("spec.size_bytes", spec.size_bytes, "0 (no limit), or a size in bytes")
    return VolumeSpec(driver=spec.driver or "local", options=dict(spec.options), size_bytes=spec.size_bytes)


def to_message(volume: Volume, containers: list[str]) -> pb.Volume:
    """Translate a volume, with the names of the containers that mount it."""
    spec = volume.spec
    return pb.Volume(
        id=volume.id,
        name=volume.name,
        labels=volume.labels,
        etag=str(volume.revision),
        create_time=timestamp(volume.create_time),
        spec=pb.VolumeSpec(driver=spec.driver, options=spec.options, size_bytes=spec.size_bytes),
        status=pb.VolumeStatus(
            state=pb.VOLUME_STATE_CREATING if volume.filling else pb.VOLUME_STATE_ACTIVE,
            message=volume.filling,
            mountpoint=volume.mountpoint,
            containers=containers,
            anonymous=volume.anonymous,
        ),
    )
