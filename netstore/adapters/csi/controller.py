"""CSI's Controller: volumes and snapshots of this node. It runs on every node, as volumes are where they were made."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.wrappers_pb2 import Int64Value

from netstore.adapters.csi import translation as to
from netstore.adapters.csi.pb import csi_pb2 as csi
from netstore.adapters.csi.pb import csi_pb2_grpc
from netstore.api.v1 import snapshot_pb2, volume_pb2
from netstore.client import Client, Problem
from netstore.errors import (
    AlreadyExists,
    Conflict,
    Exhausted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
)
from netstore.networks.context import KeyedLocks

__all__ = ["Controller"]

_DEFAULT_SIZE, _MOST = 1 << 30, 1000
_RPCS = (
    "CREATE_DELETE_VOLUME", "LIST_VOLUMES", "GET_CAPACITY", "CREATE_DELETE_SNAPSHOT", "LIST_SNAPSHOTS", "CLONE_VOLUME",
    "EXPAND_VOLUME", "GET_VOLUME", "VOLUME_CONDITION", "SINGLE_NODE_MULTI_WRITER",
)  # fmt: skip


class Controller(csi_pb2_grpc.ControllerServicer):
    """Implements `csi.v1.Controller` for the volumes of one node."""

    def __init__(self, client: Client, node_id: str, locks: KeyedLocks) -> None:
        self._client = client
        self._node_id = node_id
        self._locks = locks

    async def ControllerGetCapabilities(self, request: Any, context: Any) -> csi.ControllerGetCapabilitiesResponse:
        kinds = csi.ControllerServiceCapability.RPC
        return csi.ControllerGetCapabilitiesResponse(
            capabilities=[csi.ControllerServiceCapability(rpc=kinds(type=kinds.Type.Value(name))) for name in _RPCS]
        )

    async def CreateVolume(self, request: csi.CreateVolumeRequest, context: Any) -> csi.CreateVolumeResponse:
        name = to.resource_name("name", request.name)
        to.check_capabilities("volume_capabilities", request.volume_capabilities)
        low, high = _range(request.capacity_range)
        self._check_place(request.accessibility_requirements)
        async with self._locks.hold(f"name {name}"):
            present = await self._by_name(name)
            wanted = _wanted(request, low or (min(high, _DEFAULT_SIZE) if high else 0))
            if present:
                _check_same(present, wanted, request.name, low, high)
                wanted.spec.size_bytes = present.spec.size_bytes
            source = wanted.labels.get(to.SOURCE, "")
            if source and present:
                made = present
            elif source:
                made = await self._copy(source, wanted, request)
            else:
                call = volume_pb2.CreateVolumeRequest(volume=wanted)
                with _in_range():
                    made = (await self._client.volumes.CreateVolume(call)).volume
        return csi.CreateVolumeResponse(volume=to.volume_message(made))

    def _check_place(self, wanted: csi.TopologyRequirement) -> None:
        if wanted.requisite and not any(self._is_here(each) for each in wanted.requisite):
            raise Exhausted(
                f"accessibility_requirements: none is this node, {self._node_id}",
                hint="ask the netstore-csi of a node that is among them",
            )

    def _is_here(self, topology: csi.Topology) -> bool:
        return all(topology.segments[key] == self._node_id for key in topology.segments if key == to.TOPOLOGY)

    async def _by_name(self, name: str) -> volume_pb2.Volume | None:
        try:
            found = (await self._client.volumes.GetVolume(volume_pb2.GetVolumeRequest(volume=name))).volume
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND or Problem.of(error).reason == "AMBIGUOUS_ID":
                return None
            raise
        return found if found.name == name else None  # else the name begins the id of another

    async def _copy(
        self, source: str, wanted: volume_pb2.Volume, request: csi.CreateVolumeRequest
    ) -> volume_pb2.Volume:
        low, high = _range(request.capacity_range)
        volume_id, snapshot = to.split_snapshot_id(source) if "/" in source else (source, "")
        original = await to.find_volume(self._client, volume_id, "volume_content_source")
        if high and original.spec.size_bytes > high:
            raise OutOfRange(f"capacity_range.limit_bytes: {high} is less than the source's {original.spec.size_bytes}")
        if not wanted.spec.driver:
            options = {**original.spec.options, **wanted.spec.options}
            wanted.spec.MergeFrom(volume_pb2.VolumeSpec(driver=original.spec.driver, options=options))
        _check_match(original, request.volume_capabilities)
        wanted.spec.size_bytes = max(low, original.spec.size_bytes)
        call = snapshot_pb2.CloneVolumeRequest(source_volume=volume_id, source_snapshot=snapshot, volume=wanted)
        with _in_range():
            made = (await self._client.snapshots.CloneVolume(call)).volume
        return await to.find_volume(self._client, made.id)

    async def DeleteVolume(self, request: csi.DeleteVolumeRequest, context: Any) -> csi.DeleteVolumeResponse:
        try:
            volume = await to.find_volume(self._client, request.volume_id)
        except NotFound:
            return csi.DeleteVolumeResponse()
        listed = snapshot_pb2.ListSnapshotsRequest(volume=volume.id, page_size=1)
        if (await self._client.snapshots.ListSnapshots(listed)).snapshots:
            raise FailedPrecondition(
                f"volume {volume.name} has snapshots, and they would go with it", hint="delete its snapshots first"
            )
        call = volume_pb2.DeleteVolumeRequest(volume=volume.id, allow_missing=True)
        await self._client.volumes.DeleteVolume(call)
        return csi.DeleteVolumeResponse()

    async def ValidateVolumeCapabilities(
        self, request: csi.ValidateVolumeCapabilitiesRequest, context: Any
    ) -> csi.ValidateVolumeCapabilitiesResponse:
        volume = await to.find_volume(self._client, request.volume_id)
        if not request.volume_capabilities:
            raise InvalidArgument("volume_capabilities", "", "at least one capability")
        for each in request.volume_capabilities:
            if why := to.unsupported(each) or to.mismatch(volume, each):
                return csi.ValidateVolumeCapabilitiesResponse(message=why)
        return csi.ValidateVolumeCapabilitiesResponse(
            confirmed=csi.ValidateVolumeCapabilitiesResponse.Confirmed(
                volume_context=request.volume_context, volume_capabilities=request.volume_capabilities,
                parameters=request.parameters,
            )
        )  # fmt: skip

    async def ControllerGetVolume(
        self, request: csi.ControllerGetVolumeRequest, context: Any
    ) -> csi.ControllerGetVolumeResponse:
        volume = await to.find_volume(self._client, request.volume_id)
        return csi.ControllerGetVolumeResponse(
            volume=to.volume_message(volume),
            status=csi.ControllerGetVolumeResponse.VolumeStatus(volume_condition=to.condition(volume)),
        )

    async def ListVolumes(self, request: csi.ListVolumesRequest, context: Any) -> csi.ListVolumesResponse:
        call, entry = self._client.volumes.ListVolumes, csi.ListVolumesResponse.Entry
        listed = _page(volume_pb2.ListVolumesRequest(), request)
        found, token = await _pages(call, listed, request, "volumes")
        return csi.ListVolumesResponse(entries=[entry(volume=to.volume_message(v)) for v in found], next_token=token)

    async def GetCapacity(self, request: csi.GetCapacityRequest, context: Any) -> csi.GetCapacityResponse:
        here = self._is_here(request.accessible_topology)
        if not here or any(to.unsupported(each) for each in request.volume_capabilities):
            return csi.GetCapacityResponse()
        wanted = request.parameters.get("driver", "image")
        drivers = (await self._client.volumes.ListVolumeDrivers(volume_pb2.ListVolumeDriversRequest())).drivers
        found = next((each.available_bytes for each in drivers if each.name == wanted), None)
        if found is None:
            names = ", ".join(each.name for each in drivers)
            raise InvalidArgument("parameters[driver]", wanted, f"one of {names}")
        return csi.GetCapacityResponse(available_capacity=found, maximum_volume_size=Int64Value(value=found))

    async def ControllerExpandVolume(
        self, request: csi.ControllerExpandVolumeRequest, context: Any
    ) -> csi.ControllerExpandVolumeResponse:
        volume = await to.find_volume(self._client, request.volume_id)
        low, high = _range(request.capacity_range)
        if not low and not high:
            raise InvalidArgument("capacity_range", "", "required_bytes, limit_bytes, or both")
        if high and volume.spec.size_bytes > high:
            raise OutOfRange(f"capacity_range.limit_bytes: {high} is less than the volume's {volume.spec.size_bytes}")
        if low > volume.spec.size_bytes:
            changed = volume_pb2.Volume(id=volume.id, spec=volume_pb2.VolumeSpec(size_bytes=low))
            mask = FieldMask(paths=["spec.size_bytes"])
            call = volume_pb2.UpdateVolumeRequest(volume=changed, update_mask=mask)
            with _in_range():
                volume = (await self._client.volumes.UpdateVolume(call)).volume
        return csi.ControllerExpandVolumeResponse(capacity_bytes=volume.spec.size_bytes)

    async def CreateSnapshot(self, request: csi.CreateSnapshotRequest, context: Any) -> csi.CreateSnapshotResponse:
        name = to.resource_name("name", request.name)
        volume = await to.find_volume(self._client, request.source_volume_id, "source_volume_id")
        async with self._locks.hold(f"snapshot {name}"):
            listed = snapshot_pb2.ListSnapshotsRequest(filter=[f"label={to.NAME}={request.name}"])
            for present in (await self._client.snapshots.ListSnapshots(listed)).snapshots:
                if present.status.volume_id != volume.id:
                    raise AlreadyExists(f"snapshot {request.name} is one of volume {present.status.volume_id}")
                return csi.CreateSnapshotResponse(snapshot=_snapshot(present, volume.spec.size_bytes))
            labels = {to.NAME: request.name, **to.labels_of(request.parameters)}
            wanted = snapshot_pb2.Snapshot(
                name=name, labels=labels, spec=snapshot_pb2.SnapshotSpec(volume=volume.id)
            )  # fmt: skip
            call = snapshot_pb2.CreateSnapshotRequest(snapshot=wanted)
            made = (await self._client.snapshots.CreateSnapshot(call)).snapshot
        return csi.CreateSnapshotResponse(snapshot=_snapshot(made, volume.spec.size_bytes))

    async def DeleteSnapshot(self, request: csi.DeleteSnapshotRequest, context: Any) -> csi.DeleteSnapshotResponse:
        if not request.snapshot_id:
            raise InvalidArgument("snapshot_id", "", "the id of a snapshot")
        try:
            volume, snapshot = to.split_snapshot_id(request.snapshot_id)
        except NotFound:
            return csi.DeleteSnapshotResponse()
        call = snapshot_pb2.DeleteSnapshotRequest(volume=volume, snapshot=snapshot, allow_missing=True)
        await self._client.snapshots.DeleteSnapshot(call)
        return csi.DeleteSnapshotResponse()

    async def ListSnapshots(self, request: csi.ListSnapshotsRequest, context: Any) -> csi.ListSnapshotsResponse:
        try:
            found, token = await self._list_snapshots(request)
        except NotFound:
            return csi.ListSnapshotsResponse()
        entries = [csi.ListSnapshotsResponse.Entry(snapshot=each) async for each in self._sized(found)]
        return csi.ListSnapshotsResponse(entries=entries, next_token=token)

    async def _list_snapshots(self, request: csi.ListSnapshotsRequest) -> tuple[list[snapshot_pb2.Snapshot], str]:
        snapshots = self._client.snapshots
        if request.snapshot_id:
            volume, snapshot = to.split_snapshot_id(request.snapshot_id)
            if request.source_volume_id not in ("", volume):
                return [], ""
            try:
                call = snapshot_pb2.GetSnapshotRequest(volume=volume, snapshot=snapshot)
                return [(await snapshots.GetSnapshot(call)).snapshot], ""
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    raise NotFound("snapshot", request.snapshot_id) from error
                raise
        listed = snapshot_pb2.ListSnapshotsRequest()
        if request.source_volume_id:
            listed.volume = (await to.find_volume(self._client, request.source_volume_id)).id
        return await _pages(snapshots.ListSnapshots, _page(listed, request), request, "snapshots")

    async def _sized(self, found: list[snapshot_pb2.Snapshot]) -> AsyncIterator[csi.Snapshot]:
        sizes: dict[str, int] = {}
        for each in found:
            volume_id = each.status.volume_id
            if volume_id not in sizes:
                sizes[volume_id] = (await to.find_volume(self._client, volume_id)).spec.size_bytes
            yield _snapshot(each, sizes[volume_id])


def _range(wanted: csi.CapacityRange) -> tuple[int, int]:
    """Return the least and the most bytes, 0 for what is not limited."""
    low, high = wanted.required_bytes, wanted.limit_bytes
    for field, value in (("required_bytes", low), ("limit_bytes", high)):
        if value < 0:
            raise InvalidArgument(f"capacity_range.{field}", value, "0 (no limit), or a size in bytes")
    if high and low > high:
        raise OutOfRange(f"capacity_range: required_bytes {low} is more than limit_bytes {high}")
    return low, high


@contextmanager
def _in_range() -> Iterator[None]:
    """Say of a size that a driver does not take what CSI has for it."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        problem = Problem.of(error)
        if problem.code is grpc.StatusCode.INVALID_ARGUMENT and problem.metadata.get("field") == "spec.size_bytes":
            raise OutOfRange(f"capacity_range: {problem.message}", hint=problem.hint) from error
        raise


def _wanted(request: csi.CreateVolumeRequest, size_bytes: int) -> volume_pb2.Volume:
    """Return the volume that a request asks for. The parameter `driver` names a driver, others are its options."""
    labels, capabilities = to.labels_of(request.parameters), request.volume_capabilities
    options = {key: value for key, value in request.parameters.items() if key not in labels}
    driver, block = options.pop("driver", ""), to.is_block(capabilities[0])
    kinds = {each.mount.fs_type for each in capabilities} - {""}
    if len(kinds) > 1:
        raise InvalidArgument("volume_capabilities.mount.fs_type", ", ".join(sorted(kinds)), "one of them")
    source = request.volume_content_source
    source_id = source.snapshot.snapshot_id or source.volume.volume_id
    if source.WhichOneof("type") and not source_id:
        raise InvalidArgument("volume_content_source", "", "the id of a snapshot or a volume")
    if not driver and not source_id and (block or kinds):
        driver = "image"
    spec = volume_pb2.VolumeSpec(
        driver=driver, options=options, size_bytes=size_bytes,
        mode=volume_pb2.VOLUME_MODE_BLOCK if block else volume_pb2.VOLUME_MODE_FILESYSTEM,
    )  # fmt: skip
    if driver == "image":
        spec.size_bytes = size_bytes or _DEFAULT_SIZE
        for kind in kinds:
            spec.options["fs"] = kind
    wanted = volume_pb2.Volume(name=to.resource_name("name", request.name), spec=spec)
    wanted.labels.update({**labels, to.NAME: request.name, **({to.SOURCE: source_id} if source_id else {})})
    if not source_id:
        _check_match(wanted, capabilities)
    return wanted


def _check_match(volume: volume_pb2.Volume, capabilities: Iterable[csi.VolumeCapability]) -> None:
    for each in capabilities:
        if why := to.mismatch(volume, each):
            raise InvalidArgument("volume_capabilities", each.mount.fs_type or each.WhichOneof("access_type"), why)


def _check_same(present: volume_pb2.Volume, wanted: volume_pb2.Volume, name: str, low: int, high: int) -> None:
    """Check that a volume of the name is what is asked for; netstored compares the rest.

    Raises:
        AlreadyExists: it is another one.
        Conflict: it is still being made.
    """
    if present.status.state == volume_pb2.VOLUME_STATE_CREATING:
        raise Conflict(f"volume {name} is being made: {present.status.message}", hint="try again")
    size, difference = present.spec.size_bytes, ""
    if size < low or (high and size > high):
        difference = f"it has {size} bytes"
    for label in (to.NAME, to.SOURCE):
        if present.labels.get(label, "") != wanted.labels.get(label, ""):
            difference = f"its label {label} is {present.labels.get(label, '')!r}"
    if present.spec.mode != wanted.spec.mode:
        difference = "one is a device, the other a filesystem"
    if difference:
        raise AlreadyExists(f"volume {name} exists and differs: {difference}", hint="ask for it under another name")


def _page(listed: Any, request: Any) -> Any:
    """Ask netstored for a page as CSI does for one; it gives at most 1,000 entries."""
    if request.max_entries < 0:
        raise InvalidArgument("max_entries", request.max_entries, "0 (all), or a number of entries")
    listed.page_size, listed.page_token = min(request.max_entries or _MOST, _MOST), request.starting_token
    return listed


async def _pages(call: Any, listed: Any, request: Any, field: str) -> tuple[list[Any], str]:
    """Return a page, or all that are left where none is asked for, and the next one's token."""
    found: list[Any] = []
    while True:
        try:
            response = await call(listed)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT and request.starting_token:
                raise Conflict(
                    f"starting_token: {request.starting_token!r} is none of ours", hint="begin anew"
                ) from error
            raise
        found += getattr(response, field)
        if request.max_entries or not response.next_page_token:
            return found, response.next_page_token
        listed.page_token = response.next_page_token


def _snapshot(snapshot: snapshot_pb2.Snapshot, size_bytes: int) -> csi.Snapshot:
    """Translate a snapshot. `size_bytes` is its volume's: what a copy of it needs at least; 0 is not known."""
    return csi.Snapshot(
        snapshot_id=to.snapshot_id(snapshot), source_volume_id=snapshot.status.volume_id, size_bytes=size_bytes,
        creation_time=snapshot.create_time, ready_to_use=snapshot.status.ready,
    )  # fmt: skip
