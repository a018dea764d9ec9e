"""What a cluster shares: a small asynchronous client of etcd's v3 API (3.4 and newer), with mutual TLS.

Every call tries the endpoints in turn until its time is up. A write may have been made although its answer was lost,
so callers' transactions have to be repeatable: they say who they are in the values that they claim. Keys are text,
values bytes. etcd's errors, and gRPC's, become ours in `_mapped` alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import structlog

from netstore.errors import NetstoreError, Unavailable
from netstore.store.etcdpb import rpc_pb2 as pb
from netstore.store.etcdpb import rpc_pb2_grpc as services

__all__ = [
    "OPERATIONS",
    "Changes",
    "Compacted",
    "Compare",
    "Etcd",
    "History",
    "KeyValue",
    "Op",
    "Snapshot",
    "TxnResult",
    "absent",
    "delete",
    "delete_below",
    "empty_below",
    "exists",
    "get",
    "holds",
    "put",
    "unchanged",
]  # fmt: skip

T = TypeVar("T")
Compare = pb.Compare
Op = pb.RequestOp

_TRY_SECONDS = 1.5
_CALL_SECONDS = 4.0
"""How long a call goes on: an election among etcd's members takes one or two seconds."""
_PAUSE_SECONDS = 0.05
OPERATIONS = 128
"""As many conditions, and writes, etcd takes in one transaction (its --max-txn-ops)."""
_PAGE = 2000
_LISTINGS = 5
_OUT_OF_RANGE = "ETCD_OUT_OF_RANGE"
"""The revision asked for is compacted, or of a history that was replaced."""
_PROBE_SECONDS = 3.0
"""How often a watch asks whether anybody is there: nothing is heard of a path that swallows packets."""
_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED,
          grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)  # fmt: skip
_NOT_CONNECTED = ("failed to connect", "connections to all backends", "Endpoint closing")
# What gRPC calls the least backoff is how long a connection, with TLS, may take to come about: 200 nodes ask at once.
_OPTIONS = (
    ("grpc.enable_http_proxy", 0), ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.min_reconnect_backoff_ms", 1500),
    ("grpc.max_reconnect_backoff_ms", 1000), ("grpc.max_receive_message_length", 64 << 20),
)  # fmt: skip
_WITH_LEADER = (("hasleader", "true"),)
"""Metadata: a member that lost its leader ends the stream, instead of keeping it open in silence."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class History:
    """How far an etcd has come. None of it goes back, but for an etcd made from a backup or anew."""

    cluster: int
    term: int
    revision: int

    def goes_on(self, before: History) -> bool:
        """Say whether this may be what became of an earlier one."""
        return self.cluster == before.cluster and self.term >= before.term and self.revision >= before.revision


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key as it is, or was when it went; `revision` is that of its last change."""

    key: str
    value: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class TxnResult:
    """How a transaction went, and what its `get`s found, in their order."""

    succeeded: bool
    revision: int
    found: list[list[KeyValue]]

    def shows(self, value: bytes) -> bool:
        """Say whether the first `get` found this: what was asked for is so already, where an answer was lost."""
        return bool(self.found and self.found[0] and self.found[0][0].value == value)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything below a prefix at one revision."""

    revision: int
    items: list[KeyValue]


@dataclass(frozen=True, slots=True)
class Changes:
    """What was put and what was deleted below a prefix up to a revision, in order."""

    revision: int
    events: list[tuple[bool, KeyValue]]
    """(put, what): with `put` false the key is gone."""


class Compacted(Exception):
    """The history that a watch would need is gone, or was another (a backup was restored): list everything anew."""


def absent(key: str) -> Compare:
    """Condition: the key does not exist."""
    return Compare(result=Compare.EQUAL, target=Compare.CREATE, key=key.encode(), create_revision=0)


def unchanged(key: str, revision: int) -> Compare:
    """Condition: the key was last changed at that revision; 0 means that it does not exist."""
    return Compare(result=Compare.EQUAL, target=Compare.MOD, key=key.encode(), mod_revision=revision)


def exists(key: str) -> Compare:
    """Condition: the key exists."""
    return Compare(result=Compare.GREATER, target=Compare.VERSION, key=key.encode(), version=0)


def empty_below(prefix: str) -> Compare:
    """Condition: no key begins so."""
    return Compare(
        result=Compare.EQUAL, target=Compare.CREATE, key=prefix.encode(), range_end=_end(prefix), create_revision=0
    )


def holds(key: str, value: bytes) -> Compare:
    """Condition: the key exists with that value."""
    return Compare(result=Compare.EQUAL, target=Compare.VALUE, key=key.encode(), value=value)


def put(key: str, value: bytes, lease: int = 0) -> Op:
    """Set a key; with a lease it goes when the lease does."""
    return Op(request_put=pb.PutRequest(key=key.encode(), value=value, lease=lease))


def delete(key: str) -> Op:
    """Remove a key; one that is gone is a success."""
    return Op(request_delete_range=pb.DeleteRangeRequest(key=key.encode()))


def delete_below(prefix: str) -> Op:
    """Remove every key that begins so."""
    return Op(request_delete_range=pb.DeleteRangeRequest(key=prefix.encode(), range_end=_end(prefix)))


def get(key: str) -> Op:
    """Read a key."""
    return Op(request_range=pb.RangeRequest(key=key.encode()))


def _end(prefix: str) -> bytes:
    """Return the first key after all that begin with an ASCII prefix."""
    return prefix[:-1].encode() + bytes([ord(prefix[-1]) + 1])


class Etcd:
    """A client of one etcd cluster. `endpoints` are https://HOST:PORT; the files are PEM. `first` is where to begin.

    What a member sends out for each watch costs it more than anything else, so nodes begin at different ones.

    Raises:
        NetstoreError: a file cannot be read.
    """

    def __init__(self, endpoints: Sequence[str], *, ca: str, cert: str, key: str, first: int = 0) -> None:
        self._targets = [each.removeprefix("https://").rstrip("/") for each in endpoints]
        try:
            authority, chain, secret = (Path(name).read_bytes() for name in (ca, cert, key))
        except OSError as error:
            raise NetstoreError(
                f"cluster: reading {error.filename}: {error.strerror}", hint="correct ca, cert and key of [cluster]"
            ) from error
        self._credentials = grpc.ssl_channel_credentials(authority, secret, chain)
        self._channels: dict[int, grpc.aio.Channel] = {}
        self._at = first % len(self._targets)
        self._history: History | None = None

    async def close(self) -> None:
        """Close the connections."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    def _channel(self) -> grpc.aio.Channel:
        if self._at not in self._channels:
            target = self._targets[self._at]
            self._channels[self._at] = grpc.aio.secure_channel(target, self._credentials, options=_OPTIONS)
        return self._channels[self._at]

    def _rotate(self, failed: int) -> None:
        """Go on to the next endpoint, unless another call did so already."""
        if self._at == failed:
            self._at = (failed + 1) % len(self._targets)

    async def _call(self, work: Callable[[grpc.aio.Channel, float], Awaitable[T]], doing: str) -> T:
        """Do one thing at whichever endpoint answers.

        Raises:
            Unavailable: none did, in time; at once when nothing listens at any.
        """
        end = time.monotonic() + _CALL_SECONDS
        refusals = 0
        while True:
            at, left = self._at, end - time.monotonic()
            try:
                return await work(self._channel(), max(min(_TRY_SECONDS, left), 0.05))
            except grpc.aio.AioRpcError as error:
                self._rotate(at)
                refused = any(text in (error.details() or "") for text in _NOT_CONNECTED)
                refusals = refusals + 1 if refused else 0
                alone = refusals >= len(self._targets)
                if error.code() not in _AGAIN or alone or time.monotonic() + _PAUSE_SECONDS > end:
                    raise self._mapped(error, doing) from error
            if refusals == 0:
                await asyncio.sleep(_PAUSE_SECONDS)

    def _mapped(self, error: grpc.aio.AioRpcError, doing: str) -> NetstoreError:
        """The one place where etcd's errors become ours."""
        detail = (error.details() or error.code().name).split("; RPC Error", 1)[0][:300]
        endpoints = ", ".join(self._targets)
        if error.code() in _AGAIN:
            late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            return Unavailable(
                f"{doing}: etcd does not answer" + (f" within {_CALL_SECONDS:.0f} s" if late else f": {detail}"),
                hint=f"is a majority of {endpoints} up, and reachable from this node? What is local goes on without it",
                reason="CLUSTER_UNAVAILABLE", endpoints=endpoints,
            )  # fmt: skip
        return NetstoreError(
            f"{doing}: etcd refused: {detail}", hint="see etcd's log", reason=f"ETCD_{error.code().name}"
        )

    async def history(self) -> History:
        """Return how far the majority has come; a watch of what was before ends then."""
        header = (await self._range(pb.RangeRequest(key=b"/"), "reading etcd's state")).header
        self._history = History(header.cluster_id, header.raft_term, header.revision)
        return self._history

    async def read(self, key: str) -> KeyValue | None:
        """Return a key as the majority has it, None when it does not exist."""
        request = pb.RangeRequest(key=key.encode())
        answer = await self._range(request, f"reading {key}")
        return _value(answer.kvs[0]) if answer.kvs else None

    async def _range(self, request: pb.RangeRequest, doing: str) -> pb.RangeResponse:
        return await self._call(lambda c, s: services.KVStub(c).Range(request, timeout=s), doing)

    async def snapshot(self, prefix: str) -> Snapshot:
        """Return all that begins with a prefix, of one revision, read in pages.

        Raises:
            Unavailable: no endpoint answers, or history is compacted faster than it can be listed.
        """
        for _ in range(_LISTINGS):
            try:
                return await self._pages(prefix)
            except NetstoreError as error:
                if error.reason != _OUT_OF_RANGE:
                    raise
                log.info("etcd's history was compacted between two pages: listing anew", prefix=prefix)
        raise Unavailable(
            f"listing {prefix}: etcd's history is compacted faster than it can be listed",
            hint="let etcd keep more of it (--auto-compaction-retention)", reason="CLUSTER_UNAVAILABLE",
        )  # fmt: skip

    async def _pages(self, prefix: str) -> Snapshot:
        items: list[KeyValue] = []
        revision, key, more = 0, prefix.encode(), True
        while more:
            request = pb.RangeRequest(key=key, range_end=_end(prefix), limit=_PAGE, revision=revision)
            answer = await self._range(request, f"listing {prefix}")
            revision, more = revision or answer.header.revision, answer.more
            items += map(_value, answer.kvs)
            if more:
                key = answer.kvs[-1].key + b"\0"
        return Snapshot(revision, items)

    async def transact(
        self, conditions: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()
    ) -> TxnResult:
        """Do `then` if every condition holds, else `otherwise`, as one; at most OPERATIONS of each.

        It may be made twice when an answer is lost.
        """
        request = pb.TxnRequest(compare=conditions, success=then, failure=otherwise)
        answer = await self._call(lambda c, s: services.KVStub(c).Txn(request, timeout=s), "writing to the cluster")
        found = [
            each.response_range.kvs for each in answer.responses if each.WhichOneof("response") == "response_range"
        ]
        return TxnResult(answer.succeeded, answer.header.revision, [[_value(kv) for kv in kvs] for kvs in found])

    async def grant(self, seconds: int) -> int:
        """Make a lease that ends unless it is kept alive; returns its id."""
        request = pb.LeaseGrantRequest(TTL=seconds)
        answer = await self._call(
            lambda c, s: services.LeaseStub(c).LeaseGrant(request, timeout=s), "asking for a lease"
        )
        return answer.ID

    async def keep_alive(self, lease: int) -> bool:
        """Begin the time of a lease anew; False when it ended."""

        async def once(channel: grpc.aio.Channel, seconds: float) -> int:
            call = services.LeaseStub(channel).LeaseKeepAlive(timeout=seconds, metadata=_WITH_LEADER)
            try:
                await call.write(pb.LeaseKeepAliveRequest(ID=lease))
                return int((await _read(call)).TTL)
            finally:
                call.cancel()

        return await self._call(once, "keeping the node's lease") > 0

    async def revoke(self, lease: int) -> None:
        """End a lease, with its keys; one that ended is a success."""
        request = pb.LeaseRevokeRequest(ID=lease)

        async def once(channel: grpc.aio.Channel, seconds: float) -> None:
            try:
                await services.LeaseStub(channel).LeaseRevoke(request, timeout=seconds)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise

        await self._call(once, "ending the node's lease")

    async def follow(self, prefix: str) -> AsyncIterator[Snapshot | Changes]:
        """Yield all that begins with a prefix, then its changes without a gap, until the caller ends.

        A connection that breaks is taken up at another endpoint. A snapshot comes again when the history that would
        be needed is compacted.

        Raises:
            Unavailable: no endpoint answers; begin again later.
        """
        while True:
            found = await self.snapshot(prefix)
            yield found
            try:
                async for changes in self.watch(prefix, found.revision + 1):
                    yield changes
            except Compacted:
                log.info("etcd's history is compacted: listing anew", prefix=prefix)

    async def watch(self, prefix: str, revision: int) -> AsyncIterator[Changes]:
        """Yield the changes below a prefix from a revision on.

        Raises:
            Compacted: the revision is older than the history.
            Unavailable: no endpoint answers.
        """
        failed_since = 0.0
        while True:
            at = self._at
            try:
                async for changes in self._watch_once(prefix, revision):
                    failed_since = 0.0
                    if changes.events:
                        revision = changes.revision + 1
                        yield changes
            except grpc.aio.AioRpcError as error:
                self._rotate(at)
                failed_since = failed_since or time.monotonic()
                if error.code() not in _AGAIN or time.monotonic() - failed_since > _CALL_SECONDS:
                    raise self._mapped(error, f"watching {prefix}") from error
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _watch_once(self, prefix: str, revision: int) -> AsyncIterator[Changes]:
        """Watch over one connection; what carries no event says that the connection lives."""
        create = pb.WatchCreateRequest(key=prefix.encode(), range_end=_end(prefix), start_revision=revision)
        call = services.WatchStub(self._channel()).Watch(metadata=_WITH_LEADER)
        try:
            await call.write(pb.WatchRequest(create_request=create))
            while True:
                answer = await self._next(call)
                if answer.compact_revision or not self._is_expected(answer.header, revision):
                    raise Compacted
                if answer.canceled:
                    raise _failure(answer.cancel_reason)
                yield Changes(
                    answer.events[-1].kv.mod_revision if answer.events else 0,
                    [(event.type == pb.Event.PUT, _value(event.kv)) for event in answer.events],
                )
        finally:
            call.cancel()

    def _is_expected(self, header: Any, revision: int) -> bool:
        """Say whether a watch from a revision is of the history that is known."""
        known = self._history or History(header.cluster_id, 0, 0)
        now = History(header.cluster_id, header.raft_term, header.revision + 1)
        return now.goes_on(History(known.cluster, known.term, revision))

    async def _next(self, call: Any) -> Any:
        """Return the next answer, asking for one when there is none for a while."""
        reading = asyncio.ensure_future(_read(call))
        try:
            for probe in (True, False):
                done, _ = await asyncio.wait([reading], timeout=_PROBE_SECONDS)
                if done:
                    break
                if not probe:
                    raise _failure("nothing is heard of it any more")
                await call.write(pb.WatchRequest(progress_request=pb.WatchProgressRequest()))
        finally:
            if not reading.done():
                reading.cancel()
        return await reading


def _value(kv: pb.KeyValue) -> KeyValue:
    return KeyValue(kv.key.decode(), kv.value, kv.mod_revision)


async def _read(call: Any) -> Any:
    """Return a stream's next message; raise why it ended."""
    answer = await call.read()
    if answer is grpc.aio.EOF:
        raise _failure(await call.details() or "the stream ended", await call.code())
    return answer


def _failure(detail: str, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> grpc.aio.AioRpcError:
    if code is grpc.StatusCode.OK:
        code = grpc.StatusCode.UNAVAILABLE
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=detail)
