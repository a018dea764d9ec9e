"""ArchiveService: streams of bytes in and out of the archives."""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from netstore.api.v1 import archive_pb2 as pb
from netstore.api.v1 import archive_pb2_grpc
from netstore.errors import InvalidArgument
from netstore.rpc import volumes
from netstore.rpc.fields import check_labels, check_name, check_request_id, duration, timestamp
from netstore.rpc.snapshots import CONSISTENCY
from netstore.volumes.archives import Archives, Begun, Ended, Wanted
from netstore.volumes.manager import VolumeManager
from netstore.volumes.paths import PathInfo, Paths
from netstore.volumes.verify import verify

__all__ = ["ArchiveServicer"]

_MAX_CHUNK = 1 << 20
_DEFAULT_LEVEL, _MAX_LEVEL = 3, 19
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ArchiveServicer(archive_pb2_grpc.ArchiveServiceServicer):
    """Implements `netstore.v1.ArchiveService`."""

    def __init__(self, volumes: VolumeManager, archives: Archives) -> None:
        self._volumes = volumes
        self._archives = archives
        self._paths = Paths(volumes)

    async def ExportVolume(
        self, request: pb.ExportVolumeRequest, context: Any
    ) -> AsyncGenerator[pb.ExportVolumeResponse, None]:
        if request.offset < 0:
            raise InvalidArgument("offset", request.offset, "0, or a number of bytes")
        parts = self._archives.export(
            request.volume, request.snapshot, level=_level(request.compression, request.level), offset=request.offset
        )
        async with aclosing(parts):
            async for part in parts:
                if isinstance(part, bytes):
                    yield pb.ExportVolumeResponse(chunk=part)
                elif isinstance(part, Begun):
                    start = pb.ExportStart(
                        volume=volumes.to_message(part.volume, []), snapshot=part.snapshot,
                        resumable=bool(part.snapshot), used_bytes=part.used_bytes,
                        consistency=CONSISTENCY[part.consistency], frozen_time=duration(part.frozen_seconds),
                    )  # fmt: skip
                    yield pb.ExportVolumeResponse(start=start)
                else:
                    yield pb.ExportVolumeResponse(end=_to_end(part))

    async def ImportVolume(
        self, request: AsyncIterator[pb.ImportVolumeRequest], context: Any
    ) -> pb.ImportVolumeResponse:
        requests = aiter(request)
        first = await anext(requests, None)
        if first is None or first.WhichOneof("request") != "start":
            raise InvalidArgument("start", "", "a first request that says what comes")
        start = first.start
        wanted = Wanted(
            name=check_name("volume.name", start.volume.name),
            spec=volumes.to_spec(start.volume.spec),
            labels=check_labels(start.volume.labels, field="volume.labels"),
            upload_id=check_request_id(start.upload_id, field="upload_id") or str(uuid.uuid4()),
            privileges=start.keep_privileges,
        )
        volume, size = await self._archives.import_volume(wanted, start.offset, _chunks(requests))
        return pb.ImportVolumeResponse(volume=volumes.to_message(volume, []), size_bytes=size)

    async def GetUpload(self, request: pb.GetUploadRequest, context: Any) -> pb.GetUploadResponse:
        if not check_request_id(request.upload_id, field="upload_id"):
            raise InvalidArgument("upload_id", "", "the upload's UUID")
        return pb.GetUploadResponse(received_bytes=await self._archives.received(request.upload_id))

    async def GetPath(self, request: pb.GetPathRequest, context: Any) -> pb.GetPathResponse:
        return pb.GetPathResponse(info=_to_info(await self._paths.look(request.volume, _path(request.path))))

    async def ReadPath(self, request: pb.ReadPathRequest, context: Any) -> AsyncGenerator[pb.ReadPathResponse, None]:
        async with aclosing(self._paths.read(request.volume, _path(request.path))) as parts:
            async for part in parts:
                if isinstance(part, bytes):
                    yield pb.ReadPathResponse(chunk=part)
                elif isinstance(part, PathInfo):
                    yield pb.ReadPathResponse(start=_to_info(part))
                else:
                    yield pb.ReadPathResponse(end=_to_end(part))

    async def WritePath(self, request: AsyncIterator[pb.WritePathRequest], context: Any) -> pb.WritePathResponse:
        requests = aiter(request)
        first = await anext(requests, None)
        if first is None or first.WhichOneof("request") != "start":
            raise InvalidArgument("start", "", "a first request that says what comes")
        start = first.start
        written = await self._paths.write(
            start.volume, _path(start.path), _pieces(requests), make=start.make_directory,
            privileges=start.keep_privileges,
        )  # fmt: skip
        return pb.WritePathResponse(count=written.count, size_bytes=written.size_bytes)

    async def VerifyVolume(self, request: pb.VerifyVolumeRequest, context: Any) -> pb.VerifyVolumeResponse:
        found = await verify(self._volumes, request.volume, request.snapshot)
        return pb.VerifyVolumeResponse(checks=found.checks, problems=found.problems, read_bytes=found.read_bytes)


def _path(path: str) -> str:
    if not path:
        raise InvalidArgument("path", "", "a path in the volume; / is its root")
    return path


def _to_info(info: PathInfo) -> pb.PathInfo:
    return pb.PathInfo(
        name=info.name, mode=info.mode, size_bytes=info.size_bytes, modify_time=timestamp(info.mtime), link=info.link
    )


def _level(compression: int, level: int) -> int:
    if compression not in pb.Compression.values():
        raise InvalidArgument("compression", compression, "a value of Compression")
    if not 0 <= level <= _MAX_LEVEL:
        raise InvalidArgument("level", level, f"0 (means {_DEFAULT_LEVEL}) to {_MAX_LEVEL}")
    return 0 if compression == pb.COMPRESSION_NONE else level or _DEFAULT_LEVEL


def _to_end(ended: Ended) -> pb.ExportEnd:
    return pb.ExportEnd(sha256=ended.sha256, size_bytes=ended.size_bytes, plain_bytes=ended.plain_bytes)


async def _chunks(requests: AsyncIterator[pb.ImportVolumeRequest]) -> AsyncIterator[bytes | str]:
    async for request in requests:
        which = request.WhichOneof("request")
        if which == "end":
            digest = request.end.sha256
            if digest and not _SHA256.fullmatch(digest):
                raise InvalidArgument("end.sha256", digest, "64 hexadecimal digits, or nothing")
            yield digest
            return
        if which != "chunk" or len(request.chunk) > _MAX_CHUNK:
            raise InvalidArgument("chunk", f"{len(request.chunk)} bytes", f"1 to {_MAX_CHUNK} bytes of the archive")
        yield request.chunk


async def _pieces(requests: AsyncIterator[pb.WritePathRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        which = request.WhichOneof("request")
        if which == "end":
            return
        if which != "chunk" or len(request.chunk) > _MAX_CHUNK:
            raise InvalidArgument("chunk", f"{len(request.chunk)} bytes", f"1 to {_MAX_CHUNK} bytes of the archive")
        yield request.chunk
    raise InvalidArgument("end", "", "a last request that says that the archive is whole")
