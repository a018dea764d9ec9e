"""CSI's Node: volumes staged by netstored, and bound to where the orchestrator wants them, in this process's mount
namespace. Every path holds the volume in netstored under a name of its own: that is all there is to know after a crash.
"""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

from netstore.adapters.csi import translation as to
from netstore.adapters.csi.pb import csi_pb2 as csi
from netstore.adapters.csi.pb import csi_pb2_grpc
from netstore.api.v1 import volume_pb2
from netstore.client import Client
from netstore.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from netstore.kernel import mounts
from netstore.kernel.paths import closing
from netstore.networks.context import KeyedLocks

__all__ = ["Node"]

Mode = csi.VolumeCapability.AccessMode
_RPCS = ("STAGE_UNSTAGE_VOLUME", "GET_VOLUME_STATS", "VOLUME_CONDITION", "SINGLE_NODE_MULTI_WRITER")
_KINDS = ("publish", "single")


class Node(csi_pb2_grpc.NodeServicer):
    """Implements `csi.v1.Node`."""

    def __init__(self, client: Client, node_id: str, locks: KeyedLocks) -> None:
        self._client = client
        self._node_id = node_id
        self._locks = locks

    async def NodeGetCapabilities(self, request: Any, context: Any) -> csi.NodeGetCapabilitiesResponse:
        kinds = csi.NodeServiceCapability.RPC
        return csi.NodeGetCapabilitiesResponse(
            capabilities=[csi.NodeServiceCapability(rpc=kinds(type=kinds.Type.Value(name))) for name in _RPCS]
        )

    async def NodeGetInfo(self, request: Any, context: Any) -> csi.NodeGetInfoResponse:
        topology = csi.Topology(segments={to.TOPOLOGY: self._node_id})
        return csi.NodeGetInfoResponse(node_id=self._node_id, accessible_topology=topology)

    async def NodeStageVolume(self, request: csi.NodeStageVolumeRequest, context: Any) -> csi.NodeStageVolumeResponse:
        path = _path("staging_target_path", request.staging_target_path)
        to.check_capabilities("volume_capability", [request.volume_capability])
        async with self._locks.hold(request.volume_id):
            volume = await to.find_volume(self._client, request.volume_id)
            if why := to.mismatch(volume, request.volume_capability):
                raise FailedPrecondition(f"volume_capability: {why}")
            holder = to.holder("stage", request.staging_target_path)
            staged = await self._hold(volume.id, holder)
            if not to.is_block(request.volume_capability):
                await self._bind(staged, holder, path, 0, known=holder in volume.status.holders)
        return csi.NodeStageVolumeResponse()

    async def NodeUnstageVolume(
        self, request: csi.NodeUnstageVolumeRequest, context: Any
    ) -> csi.NodeUnstageVolumeResponse:
        path = _path("staging_target_path", request.staging_target_path)
        await self._let_go(request.volume_id, path, [to.holder("stage", request.staging_target_path)])
        return csi.NodeUnstageVolumeResponse()

    async def NodePublishVolume(
        self, request: csi.NodePublishVolumeRequest, context: Any
    ) -> csi.NodePublishVolumeResponse:
        path, capability = _path("target_path", request.target_path), request.volume_capability
        to.check_capabilities("volume_capability", [capability])
        if not request.staging_target_path:
            raise FailedPrecondition("staging_target_path: the volume is staged first", hint="call NodeStageVolume")
        if request.readonly and to.is_block(capability):
            raise FailedPrecondition(
                "readonly: a device cannot be published read-only, as a mount does not stop writes to it",
                hint="publish it writable, or use a volume that is a filesystem",
            )
        mode = capability.access_mode.mode
        kind = "single" if mode in (Mode.SINGLE_NODE_WRITER, Mode.SINGLE_NODE_SINGLE_WRITER) else "publish"
        attributes = to.FLAGS["ro"] if request.readonly or mode == Mode.SINGLE_NODE_READER_ONLY else 0
        for flag in capability.mount.mount_flags:
            attributes |= to.FLAGS[flag]
        async with self._locks.hold(request.volume_id):
            volume = await to.find_volume(self._client, request.volume_id)
            if why := to.mismatch(volume, capability):
                raise FailedPrecondition(f"volume_capability: {why}")
            holder = to.holder(kind, request.target_path)
            self._check_holders(volume, holder, request)
            known = holder in volume.status.holders
            await self._bind(await self._hold(volume.id, holder), holder, path, attributes, known=known)
        return csi.NodePublishVolumeResponse()

    def _check_holders(self, volume: volume_pb2.Volume, holder: str, request: csi.NodePublishVolumeRequest) -> None:
        holders = volume.status.holders
        if to.holder("stage", request.staging_target_path) not in holders:
            raise FailedPrecondition(
                f"volume {volume.name} is not staged at {request.staging_target_path}", hint="call NodeStageVolume"
            )
        for kind in _KINDS:
            other = to.holder(kind, request.target_path)
            if other != holder and other in holders:
                raise AlreadyExists(
                    f"volume {volume.name} is published at {request.target_path} in another access mode"
                )
        others = [each for each in holders if to.is_published(each) and each != holder]
        if others and (holder.startswith("csi.single.") or any(each.startswith("csi.single.") for each in others)):
            raise FailedPrecondition(
                f"volume {volume.name} is published at another path, and one of them is to be the only writer",
                hint="unpublish it there, or use SINGLE_NODE_MULTI_WRITER for both",
            )

    async def NodeUnpublishVolume(
        self, request: csi.NodeUnpublishVolumeRequest, context: Any
    ) -> csi.NodeUnpublishVolumeResponse:
        path = _path("target_path", request.target_path)
        await self._let_go(request.volume_id, path, [to.holder(kind, request.target_path) for kind in _KINDS])
        return csi.NodeUnpublishVolumeResponse()

    async def NodeGetVolumeStats(
        self, request: csi.NodeGetVolumeStatsRequest, context: Any
    ) -> csi.NodeGetVolumeStatsResponse:
        path = _path("volume_path", request.volume_path)
        volume = await to.find_volume(self._client, request.volume_id)
        held = {to.holder(kind, request.volume_path) for kind in ("stage", *_KINDS)}
        if held.isdisjoint(volume.status.holders):
            raise NotFound("path of the volume", request.volume_path, hint="it is neither staged nor published there")
        if volume.spec.mode == volume_pb2.VOLUME_MODE_BLOCK:
            usage = [csi.VolumeUsage(total=volume.spec.size_bytes, unit=csi.VolumeUsage.BYTES)]
        else:
            if not await asyncio.to_thread(mounts.is_mount_point, path):  # what is there is not the volume's
                raise NotFound(
                    "path of the volume",
                    request.volume_path,
                    hint="it is not mounted there any more: stage and publish it again",
                )  # fmt: skip
            usage = await asyncio.to_thread(_usage, path)
        return csi.NodeGetVolumeStatsResponse(usage=usage, volume_condition=to.condition(volume))

    async def _hold(self, volume_id: str, holder: str) -> volume_pb2.Volume:
        call = volume_pb2.StageVolumeRequest(volume=volume_id, holder=holder)
        return (await self._client.volumes.StageVolume(call)).volume

    async def _bind(self, volume: volume_pb2.Volume, holder: str, path: Path, attributes: int, *, known: bool) -> None:
        """Bind a staged volume to a path; when that fails, the path holds it no longer, unless it did before."""
        try:
            await asyncio.to_thread(_bind, volume, path, attributes)
        except BaseException:
            if not known:
                call = volume_pb2.UnstageVolumeRequest(volume=volume.id, holder=holder)
                await self._client.volumes.UnstageVolume(call)
            raise

    async def _let_go(self, volume_id: str, path: Path, holders: list[str]) -> None:
        """Unmount what holds a volume at a path. A volume or a mount that is gone is a success."""
        async with self._locks.hold(volume_id):
            try:
                volume = await to.find_volume(self._client, volume_id)
            except NotFound:
                return
            held = [each for each in holders if each in volume.status.holders]
            if not held:
                return
            await asyncio.to_thread(_unbind, path)
            for holder in held:
                call = volume_pb2.UnstageVolumeRequest(volume=volume.id, holder=holder)
                await self._client.volumes.UnstageVolume(call)


def _path(field: str, path: str) -> Path:
    if not path.startswith("/") or ".." in path.split("/"):
        raise InvalidArgument(field, path, "an absolute path without '..'")
    return Path(path)


def _bind(volume: volume_pb2.Volume, path: Path, attributes: int) -> None:
    """Make the path show the volume, or check that it does. Blocking."""
    source = volume.status.mountpoint
    block = volume.spec.mode == volume_pb2.VOLUME_MODE_BLOCK
    if mounts.is_mount_point(path):
        _check_bound(volume, source, path, attributes)
        return
    made = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600) if block else path.mkdir(exist_ok=True, mode=0o750)
    try:
        with closing(mounts.open_tree(source)) as tree:
            mounts.set_attributes(tree, volume.name, on=attributes, recursive=False)
            mounts.attach(tree, path)
    except BaseException:
        if made:
            _remove(path)
        raise


def _check_bound(volume: volume_pb2.Volume, source: str, path: Path, attributes: int) -> None:
    there, wanted = path.stat(), os.stat(source)
    if (there.st_dev, there.st_ino) != (wanted.st_dev, wanted.st_ino):
        raise AlreadyExists(f"something else is mounted at {path}", hint="unmount it, or choose another path")
    read_only = bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    if read_only != bool(attributes & to.FLAGS["ro"]) and not os.statvfs(source).f_flag & os.ST_RDONLY:
        raise AlreadyExists(f"volume {volume.name} is at {path} already, {'read-only' if read_only else 'writable'}")


def _unbind(path: Path) -> None:
    if mounts.is_mount_point(path):
        mounts.unmount(path)
    try:
        _remove(path)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:  # what is in it is somebody else's, and the volume has left it
            raise


def _remove(path: Path) -> None:
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _usage(path: Path) -> list[csi.VolumeUsage]:
    found = os.statvfs(path)
    block, files = found.f_frsize, found.f_files
    return [
        csi.VolumeUsage(
            unit=csi.VolumeUsage.BYTES, total=found.f_blocks * block, available=found.f_bavail * block,
            used=(found.f_blocks - found.f_bfree) * block,
        ),
        csi.VolumeUsage(
            unit=csi.VolumeUsage.INODES, total=files, available=found.f_favail, used=files - found.f_ffree
        ),
    ]  # fmt: skip
