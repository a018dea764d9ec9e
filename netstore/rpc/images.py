"""ImageService: messages in, calls of the catalogue, messages out."""

from __future__ import annotations

import fnmatch
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from netstore.api.v1 import image_pb2 as pb
from netstore.api.v1 import image_pb2_grpc
from netstore.errors import InvalidArgument
from netstore.launcher.images import Format, Images
from netstore.model import Image, ImageConfig
from netstore.rpc.fields import Filters, check_labels, missing_allowed, page, timestamp

__all__ = ["ImageServicer"]

_MAX_CHUNK = 1 << 20
_FORMATS = {
    pb.IMAGE_FORMAT_UNSPECIFIED: None,
    pb.IMAGE_FORMAT_ROOTFS: Format.ROOTFS,
    pb.IMAGE_FORMAT_DOCKER_ARCHIVE: Format.DOCKER,
    pb.IMAGE_FORMAT_OCI_ARCHIVE: Format.OCI,
}


class ImageServicer(image_pb2_grpc.ImageServiceServicer):
    """Implements `netstore.v1.ImageService`."""

    def __init__(self, images: Images) -> None:
        self._images = images

    async def GetImage(self, request: pb.GetImageRequest, context: Any) -> pb.GetImageResponse:
        return pb.GetImageResponse(image=_to_message(*await self._images.get(request.image)))

    async def ListImages(self, request: pb.ListImagesRequest, context: Any) -> pb.ListImagesResponse:
        filters = Filters(request.filter, ("reference", "label", "dangling"))
        dangling = filters.flag("dangling")
        found = [
            image
            for image in await self._images.all()
            if filters.any("reference", lambda value, i=image: fnmatch.fnmatch(i.name, value))  # type: ignore[misc]
            and filters.labels(image.config.labels)
            and dangling in (None, not image.name)
        ]
        shown, token = page(found, request.page_size, request.page_token, lambda image: image)
        messages = [_to_message(image, await self._images.users(image)) for image in shown]
        return pb.ListImagesResponse(images=messages, next_page_token=token)

    async def ImportImage(self, request: AsyncIterator[pb.ImportImageRequest], context: Any) -> pb.ImportImageResponse:
        first = await anext(aiter(request), None)
        if first is None or first.WhichOneof("request") != "start":
            raise InvalidArgument("start", "", "a first request that says what comes")
        start = first.start
        if start.format not in _FORMATS:
            raise InvalidArgument("format", start.format, "a value of ImageFormat")
        config = _to_config(start.config) if start.HasField("config") else None
        images = await self._images.import_archive(
            _chunks(request), name=start.name, format=_FORMATS[start.format], config=config
        )
        return pb.ImportImageResponse(images=[_to_message(image, []) for image in images])

    async def PullImage(self, request: pb.PullImageRequest, context: Any) -> AsyncIterator[pb.PullImageResponse]:
        if not request.image:
            raise InvalidArgument("image", "", "[registry/]repository[:tag], such as nginx:latest")
        if request.password and not request.username:
            raise InvalidArgument("username", "", "a user, with the password")
        login = (request.username, request.password) if request.username else None
        async with aclosing(self._images.pull(request.image, login=login)) as brought:
            async for each in brought:
                if isinstance(each, str):
                    yield pb.PullImageResponse(progress=each)
                else:
                    yield pb.PullImageResponse(image=_to_message(each, []))

    async def DeleteImage(self, request: pb.DeleteImageRequest, context: Any) -> pb.DeleteImageResponse:
        with missing_allowed(allow=request.allow_missing):
            await self._images.delete(request.image)
        return pb.DeleteImageResponse()


async def _chunks(requests: AsyncIterator[pb.ImportImageRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.WhichOneof("request") != "chunk" or len(request.chunk) > _MAX_CHUNK:
            raise InvalidArgument("chunk", f"{len(request.chunk)} bytes", f"1 to {_MAX_CHUNK} bytes of the archive")
        yield request.chunk


def _to_config(config: pb.ImageConfig) -> ImageConfig:
    for field in ("volumes", "working_dir"):
        value = getattr(config, field)
        for path in [value] if isinstance(value, str) else value:
            if path and not path.startswith("/"):
                raise InvalidArgument(f"config.{field}", path, "an absolute path")
    return ImageConfig(
        entrypoint=tuple(config.entrypoint),
        cmd=tuple(config.cmd),
        env=tuple(config.env),
        working_dir=config.working_dir,
        user=config.user,
        volumes=tuple(config.volumes),
        exposed_ports=tuple(config.exposed_ports),
        stop_signal=config.stop_signal,
        labels=check_labels(config.labels, field="config.labels"),
    )


def _to_message(image: Image, containers: list[str]) -> pb.Image:
    config = image.config
    return pb.Image(
        id=image.id,
        name=image.name,
        labels=config.labels,
        etag=str(image.revision),
        create_time=timestamp(image.create_time),
        spec=pb.ImageSpec(
            architecture=image.architecture,
            os=image.os,
            config=pb.ImageConfig(
                entrypoint=config.entrypoint,
                cmd=config.cmd,
                env=config.env,
                working_dir=config.working_dir,
                user=config.user,
                volumes=config.volumes,
                exposed_ports=config.exposed_ports,
                stop_signal=config.stop_signal,
                labels=config.labels,
            ),
        ),
        status=pb.ImageStatus(layers=image.layers, size_bytes=image.size_bytes, containers=containers),
    )
