"""VolumeService: messages in, manager calls, messages out."""

from __future__ import annotations

import asyncio
from typing import Any

from netstore.api.v1 import volume_pb2 as pb
from netstore.api.v1 import volume_pb2_grpc
from netstore.drivers.options import hidden, shown
from netstore.errors import InvalidArgument
from netstore.model import Volume, VolumeSpec
from netstore.rpc.fields import (
    Filters,
    check_labels,
    check_mask,
    check_name,
    check_period,
    check_request_id,
    missing_allowed,
    next_page,
    page,
    page_bounds,
    timestamp,
)
from netstore.volumes.drivers.base import Usage, VolumeDriver
from netstore.volumes.manager import VolumeManager

__all__ = ["VolumeServicer", "to_message", "to_spec"]

_MUTABLE = ("size_bytes", "options", "snapshot_schedule", "snapshot_keep")


class VolumeServicer(volume_pb2_grpc.VolumeServiceServicer):
    """Implements `netstore.v1.VolumeService`."""

    def __init__(self, manager: VolumeManager, node_id: str) -> None:
        self._volumes = manager
        self._node_id = node_id

    async def GetVolume(self, request: pb.GetVolumeRequest, context: Any) -> pb.GetVolumeResponse:
        volume, containers = await self._volumes.get(request.volume)
        found = self._message(volume, containers)
        details = await self._volumes.details(volume)
        if details.health and not volume.filling:
            found.status.state, found.status.message = pb.VOLUME_STATE_FAILED, details.health
        found.status.staged = details.staged
        found.status.holders.extend(details.holders)
        _show_usage(found, details.usage)
        return pb.GetVolumeResponse(volume=found)

    async def ListVolumes(self, request: pb.ListVolumesRequest, context: Any) -> pb.ListVolumesResponse:
        filters = Filters(request.filter, ("driver", "label", "name", "dangling"))
        dangling = filters.flag("dangling")
        size, after = page_bounds(request.page_size, request.page_token)

        def wanted(volume: Volume, containers: list[str]) -> bool:
            return (
                filters.any("driver", lambda value: value == volume.spec.driver)
                and filters.any("name", lambda value: value in volume.name)
                and filters.labels(volume.labels)
                and dangling in (None, not containers)
            )

        shown, more = await self._volumes.page(after, size, wanted)
        token = next_page(shown[-1][0]) if more else ""
        usages = await self._volumes.usages([volume for volume, _ in shown])
        messages = []
        for volume, containers in shown:
            messages.append(self._message(volume, containers))
            _show_usage(messages[-1], usages.get(volume.id, Usage()))
        return pb.ListVolumesResponse(volumes=messages, next_page_token=token)

    async def CreateVolume(self, request: pb.CreateVolumeRequest, context: Any) -> pb.CreateVolumeResponse:
        wanted = request.volume
        made = await self._volumes.create(
            check_name("name", wanted.name) if wanted.name else "",
            to_spec(wanted.spec),
            labels=check_labels(wanted.labels),
            request_id=check_request_id(request.request_id),
        )
        return pb.CreateVolumeResponse(volume=self._message(*made))

    async def UpdateVolume(self, request: pb.UpdateVolumeRequest, context: Any) -> pb.UpdateVolumeResponse:
        mutable = ["labels", *(f"spec.{name}" for name in _MUTABLE)]
        paths = check_mask(request.update_mask, mutable=mutable, immutable=["name", "spec"])
        wanted = request.volume
        spec = to_spec(wanted.spec)
        updated = await self._volumes.update(
            wanted.id or wanted.name, wanted.etag,
            labels=check_labels(wanted.labels) if "labels" in paths else None,
            spec={name: getattr(spec, name) for name in _MUTABLE if f"spec.{name}" in paths},
        )  # fmt: skip
        return pb.UpdateVolumeResponse(volume=self._message(*updated))

    async def DeleteVolume(self, request: pb.DeleteVolumeRequest, context: Any) -> pb.DeleteVolumeResponse:
        with missing_allowed(allow=request.allow_missing):
            await self._volumes.removal.delete(request.volume, keep_seconds=_period(request))
        return pb.DeleteVolumeResponse()

    async def PruneVolumes(self, request: pb.PruneVolumesRequest, context: Any) -> pb.PruneVolumesResponse:
        filters = Filters(request.filter, ("label", "label!"))
        candidates = [
            volume
            for volume, containers in await self._volumes.all()
            if not containers
            and (volume.anonymous or request.all)
            and filters.labels(volume.labels)
            and (not request.volume_ids or volume.id in request.volume_ids)
        ]
        pruned = await self._volumes.removal.prune(candidates, dry_run=request.dry_run, keep_seconds=_period(request))
        return pb.PruneVolumesResponse(
            volumes=[each.volume.name for each in pruned],
            reclaimed_bytes=sum(each.size_bytes for each in pruned),
            pruned=[
                pb.PrunedVolume(id=each.volume.id, name=each.volume.name, size_bytes=each.size_bytes) for each in pruned
            ],
        )

    async def RenameVolume(self, request: pb.RenameVolumeRequest, context: Any) -> pb.RenameVolumeResponse:
        renamed = await self._volumes.rename(request.volume, check_name("name", request.name))
        return pb.RenameVolumeResponse(volume=self._message(*renamed))

    async def ListTrashedVolumes(
        self, request: pb.ListTrashedVolumesRequest, context: Any
    ) -> pb.ListTrashedVolumesResponse:
        found = await self._volumes.removal.trashed()
        shown, token = page(found, request.page_size, request.page_token, lambda trashed: trashed)
        messages = [
            pb.TrashedVolume(
                volume=to_message(each.volume, []), remove_time=timestamp(each.remove_time),
                expire_time=timestamp(each.expire_time),
            )
            for each in shown
        ]  # fmt: skip
        return pb.ListTrashedVolumesResponse(volumes=messages, next_page_token=token)

    async def RestoreTrashedVolume(
        self, request: pb.RestoreTrashedVolumeRequest, context: Any
    ) -> pb.RestoreTrashedVolumeResponse:
        name = check_name("name", request.name) if request.name else ""
        volume = await self._volumes.removal.restore(request.volume, name)
        self._volumes.chores.wake()
        return pb.RestoreTrashedVolumeResponse(volume=self._message(volume, []))

    async def EmptyTrash(self, request: pb.EmptyTrashRequest, context: Any) -> pb.EmptyTrashResponse:
        emptied = await self._volumes.removal.empty(list(request.volumes))
        return pb.EmptyTrashResponse(volumes=[each.volume.name for each in emptied])

    async def ListVolumeDrivers(
        self, request: pb.ListVolumeDriversRequest, context: Any
    ) -> pb.ListVolumeDriversResponse:
        drivers = [self._volumes.driver_named(name) for name in self._volumes.drivers]
        found = await asyncio.to_thread(lambda: [_driver_message(driver) for driver in drivers])
        return pb.ListVolumeDriversResponse(drivers=found)

    async def StageVolume(self, request: pb.StageVolumeRequest, context: Any) -> pb.StageVolumeResponse:
        staged = await self._volumes.stage(request.volume, check_name("holder", request.holder))
        message = self._message(*staged)
        message.status.staged = True
        return pb.StageVolumeResponse(volume=message)

    async def UnstageVolume(self, request: pb.UnstageVolumeRequest, context: Any) -> pb.UnstageVolumeResponse:
        with missing_allowed(allow=True):
            await self._volumes.unstage(request.volume, check_name("holder", request.holder))
        return pb.UnstageVolumeResponse()

    async def TrimVolume(self, request: pb.TrimVolumeRequest, context: Any) -> pb.TrimVolumeResponse:
        return pb.TrimVolumeResponse(trimmed_bytes=await self._volumes.trim(request.volume))

    def _message(self, volume: Volume, containers: list[str]) -> pb.Volume:
        """Translate a volume, with what its driver knows without a look."""
        driver = self._volumes.driver_of(volume)
        message = to_message(volume, containers)
        message.status.size_enforcement = driver.enforcement(volume)
        message.status.staged = not driver.stages(volume) or bool(self._volumes.staging.holders(volume.id))
        message.status.accessible_topology["netstore.node"] = self._node_id
        return message


def _period(request: pb.DeleteVolumeRequest | pb.PruneVolumesRequest) -> float | None:
    return check_period("trash_period", request.trash_period) if request.HasField("trash_period") else None


def _show_usage(message: pb.Volume, usage: Usage) -> None:
    message.status.capacity_bytes = usage.size_bytes
    for field, value in (("used_bytes", usage.used_bytes), ("used_inodes", usage.inodes_used)):
        if value is not None:
            setattr(message.status, field, value)


def to_spec(spec: pb.VolumeSpec) -> VolumeSpec:
    """Translate a spec that was asked for.

    Raises:
        InvalidArgument: naming the field.
    """
    if spec.size_bytes < 0:
        raise InvalidArgument("spec.size_bytes", spec.size_bytes, "0 (no limit), or a size in bytes")
    if spec.mode not in pb.VolumeMode.values():
        raise InvalidArgument("spec.mode", spec.mode, "a value of VolumeMode")
    return VolumeSpec(
        driver=spec.driver, options=dict(spec.options), size_bytes=spec.size_bytes,
        block=spec.mode == pb.VOLUME_MODE_BLOCK, snapshot_schedule=spec.snapshot_schedule,
        snapshot_keep=spec.snapshot_keep,
    )  # fmt: skip


def to_message(volume: Volume, containers: list[str]) -> pb.Volume:
    """Translate a volume, with the names of the containers that mount it."""
    spec = volume.spec
    mode = pb.VOLUME_MODE_BLOCK if spec.block else pb.VOLUME_MODE_FILESYSTEM
    options = {key: hidden(value) for key, value in spec.options.items()}
    return pb.Volume(
        id=volume.id,
        name=volume.name,
        labels=volume.labels,
        etag=str(volume.revision),
        create_time=timestamp(volume.create_time),
        spec=pb.VolumeSpec(
            driver=spec.driver,
            options=options,
            size_bytes=spec.size_bytes,
            mode=mode,
            snapshot_schedule=spec.snapshot_schedule,
            snapshot_keep=spec.snapshot_keep,
        ),
        status=pb.VolumeStatus(
            state=pb.VOLUME_STATE_CREATING if volume.filling else pb.VOLUME_STATE_ACTIVE,
            message=volume.filling,
            mountpoint=volume.mountpoint,
            containers=containers,
            anonymous=volume.anonymous,
        ),
    )


def _driver_message(driver: VolumeDriver) -> pb.VolumeDriver:
    return pb.VolumeDriver(
        name=driver.name,
        capabilities=[
            pb.VolumeCapability.Value(f"VOLUME_CAPABILITY_{each.name}") for each in sorted(driver.capabilities)
        ],
        options=[
            pb.VolumeOption(key=each.key, default_value=shown(each.default), description=each.doc)
            for each in driver.options
        ],
        unavailable=driver.available,
        no_size=driver.cannot_hold_size(),
        available_bytes=driver.available_bytes(),
    )
