"""MountService: messages in, manager calls, messages out."""

from __future__ import annotations

from typing import Any

from netstore.api.v1 import mount_pb2 as pb
from netstore.api.v1 import mount_pb2_grpc
from netstore.errors import InvalidArgument
from netstore.launcher.places import Places
from netstore.model import ForeignMount, MountRef, MountSpec
from netstore.rpc.fields import missing_allowed, page, timestamp
from netstore.rpc.mounts import check_target, to_mount, to_mount_message, to_status_message

__all__ = ["MountServicer", "to_foreign_spec"]

_OF_NEW_VOLUMES = ("no_copy", "volume_driver", "volume_options", "volume_labels", "create_source")


class MountServicer(mount_pb2_grpc.MountServiceServicer):
    """Implements `netstore.v1.MountService`."""

    def __init__(self, places: Places) -> None:
        self._places = places

    async def Mount(self, request: pb.MountRequest, context: Any) -> pb.MountResponse:
        ref = _to_ref(request.namespace)
        if ref is None:
            raise InvalidArgument("namespace", "", "a container, a pid or a path")
        made = await self._places.mount(
            ref, to_foreign_spec(request.spec, ours=bool(ref.container)), exchange=request.replace
        )
        return pb.MountResponse(mount=_to_message(made))

    async def Unmount(self, request: pb.UnmountRequest, context: Any) -> pb.UnmountResponse:
        ref = _to_ref(request.namespace)
        if ref is None:
            raise InvalidArgument("namespace", "", "a container, a pid or a path")
        check_target(request.target, "target")
        with missing_allowed(allow=request.allow_missing):
            await self._places.unmount(ref, request.target, force=request.force)
        return pb.UnmountResponse()

    async def ListMounts(self, request: pb.ListMountsRequest, context: Any) -> pb.ListMountsResponse:
        found = await self._places.all(_to_ref(request.namespace))
        shown, token = page(found, request.page_size, request.page_token, lambda mount: mount)
        return pb.ListMountsResponse(mounts=[_to_message(each) for each in shown], next_page_token=token)


def to_foreign_spec(spec: pb.MountSpec, *, ours: bool) -> MountSpec:
    """Translate a mount of what exists, into a container of `ours` or another namespace.

    Raises:
        InvalidArgument: naming the field.
    """
    for name in _OF_NEW_VOLUMES:
        if getattr(spec, name):
            raise InvalidArgument(f"spec.{name}", getattr(spec, name), "nothing: what is mounted must exist already")
    if spec.chown and not ours:
        raise InvalidArgument("spec.chown", True, "false: only a container has a user to give it to")
    return to_mount(spec, "spec")


def _to_ref(ref: pb.MountNamespaceRef) -> MountRef | None:
    """Translate a reference, None where nothing is named."""
    given = [name for name in ("container", "pid", "path") if getattr(ref, name)]
    if len(given) > 1:
        raise InvalidArgument("namespace", ", ".join(given), "one of container, pid and path")
    if ref.pid < 0:
        raise InvalidArgument("namespace.pid", ref.pid, "the id of a process")
    if ref.path and (not ref.path.startswith("/") or "\0" in ref.path):
        raise InvalidArgument("namespace.path", ref.path, "the absolute path of a mount namespace")
    return MountRef(container=ref.container, pid=ref.pid, path=ref.path) if given else None


def _to_message(mount: ForeignMount) -> pb.Mount:
    ref = mount.ref
    return pb.Mount(
        id="" if ref.container else mount.id,
        namespace=pb.MountNamespaceRef(container=ref.container, pid=ref.pid, path=ref.path),
        spec=to_mount_message(mount.mount.spec),
        status=to_status_message(mount.mount),
        create_time=timestamp(mount.create_time),
    )
