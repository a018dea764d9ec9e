"""SystemService: what the node is, whether kernel and store agree, what happens on it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netstore.api.v1 import common_pb2, system_pb2_grpc
from netstore.api.v1 import system_pb2 as pb
from netstore.errors import InvalidArgument, OutOfRange
from netstore.model import Event, Finding, Kind
from netstore.rpc.fields import Filters, timestamp
from netstore.store import Store

__all__ = ["Node", "SystemServicer", "Usage"]

_CHUNK = 1 << 20
_EVENTS_AT_ONCE = 500
_KINDS = {kind: getattr(common_pb2, f"RESOURCE_KIND_{kind.name}") for kind in Kind}


@dataclass(frozen=True, slots=True)
class Usage:
    """How much one kind of resource holds, bytes."""

    kind: Kind
    total: int
    active: int
    size_bytes: int
    reclaimable_bytes: int


@dataclass(frozen=True, slots=True)
class Node:
    """What the daemon knows of itself and asks of its managers."""

    info: Callable[[], Awaitable[pb.GetInfoResponse]]
    check: Callable[[bool], Awaitable[list[Finding]]]
    usage: Callable[[], Awaitable[Sequence[Usage]]]
    stopping: asyncio.Event


class SystemServicer(system_pb2_grpc.SystemServiceServicer):
    """Implements `netstore.v1.SystemService`."""

    def __init__(self, store: Store, node: Node) -> None:
        self._store = store
        self._node = node

    async def GetInfo(self, request: pb.GetInfoRequest, context: Any) -> pb.GetInfoResponse:
        return await self._node.info()

    async def CheckSystem(self, request: pb.CheckSystemRequest, context: Any) -> pb.CheckSystemResponse:
        findings = await self._node.check(request.repair)
        return pb.CheckSystemResponse(findings=[_to_finding(finding) for finding in findings])

    async def GetDiskUsage(self, request: pb.GetDiskUsageRequest, context: Any) -> pb.GetDiskUsageResponse:
        entries = [
            pb.UsageEntry(
                kind=_KINDS[usage.kind],
                total=usage.total,
                active=usage.active,
                size_bytes=usage.size_bytes,
                reclaimable_bytes=usage.reclaimable_bytes,
            )
            for usage in await self._node.usage()
        ]
        return pb.GetDiskUsageResponse(entries=entries)

    async def WatchEvents(self, request: pb.WatchEventsRequest, context: Any) -> AsyncIterator[pb.WatchEventsResponse]:
        filters = Filters(request.filter, ("kind", "action", "id", "name"))
        after = await self._start(request)
        while not self._node.stopping.is_set() and (not request.HasField("until") or after < request.until):
            changed = self._store.changed()
            events = await self._store.read(lambda tx, after=after: tx.events(after, _EVENTS_AT_ONCE))  # type: ignore[misc]
            for event in events:
                after = event.revision
                if request.HasField("until") and after > request.until:
                    return
                if _matches(filters, event):
                    yield pb.WatchEventsResponse(event=_to_event(event))
            if not events:
                await self._wait(changed)

    async def _start(self, request: pb.WatchEventsRequest) -> int:
        if not request.HasField("revision"):
            return await self._store.read(lambda tx: tx.revision())
        if request.revision < 0:
            raise InvalidArgument("revision", request.revision, "0 (the oldest kept) or a revision seen before")
        oldest = await self._store.read(lambda tx: tx.oldest_revision())
        if 0 < request.revision < oldest - 1:
            raise OutOfRange(
                f"revision {request.revision} is older than the history kept, which begins at {oldest}",
                hint="list everything, then watch from the revision that `system info` gives", oldest=oldest,
            )  # fmt: skip
        return request.revision

    async def _wait(self, changed: asyncio.Future[None]) -> None:
        stopping: asyncio.Future[Any] = asyncio.ensure_future(self._node.stopping.wait())
        waiting: list[asyncio.Future[Any]] = [changed, stopping]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()

    async def BackupStore(self, request: pb.BackupStoreRequest, context: Any) -> AsyncIterator[pb.BackupStoreResponse]:
        with tempfile.TemporaryDirectory(prefix="backup-", dir=self._store.path.parent) as directory:
            copy = Path(directory, "netstore.db")
            await self._store.backup(copy)
            size = copy.stat().st_size  # noqa: ASYNC240 (in the cache, just written)
            for offset in range(0, size, _CHUNK):
                yield pb.BackupStoreResponse(chunk=await asyncio.to_thread(_read_part, copy, offset))


def _read_part(path: Path, offset: int) -> bytes:
    with path.open("rb") as source:
        source.seek(offset)
        return source.read(_CHUNK)


def _matches(filters: Filters, event: Event) -> bool:
    return (
        filters.any("kind", lambda value: value == event.kind)
        and filters.any("action", lambda value: value == event.action)
        and filters.any("id", event.resource_id.startswith)
        and filters.any("name", lambda value: value == event.resource_name)
    )


def _to_event(event: Event) -> common_pb2.Event:
    return common_pb2.Event(
        revision=event.revision,
        time=timestamp(event.time),
        kind=_KINDS[event.kind],
        action=event.action,
        resource_id=event.resource_id,
        resource_name=event.resource_name,
        attributes=event.attributes,
    )


def _to_finding(finding: Finding) -> pb.Finding:
    state = pb.FINDING_STATE_REPAIRED if finding.repaired else pb.FINDING_STATE_FOUND
    return pb.Finding(
        kind=_KINDS[finding.kind] if finding.kind else common_pb2.RESOURCE_KIND_UNSPECIFIED,
        resource_id=finding.resource_id,
        name=finding.name,
        detail=f"{finding.detail} ({finding.error})" if finding.error else finding.detail,
        state=pb.FINDING_STATE_FAILED if finding.error else state,
    )
