"""This node in a cluster: the session with etcd, and what it keeps up to date.

A session is a lease, a registration, a picture of everything shared, and a watch from its revision. When etcd is away
the picture stays, local work goes on, and the session begins anew until it succeeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeVar

import msgspec
import structlog

from netstore import __version__
from netstore.config import ClusterConfig
from netstore.errors import FailedPrecondition, NetstoreError, Unavailable
from netstore.model import Network, Node, NodeLink
from netstore.networks.cluster.cache import Effect, Picture, Seen, differences
from netstore.networks.cluster.claims import RECOVERY_SECONDS
from netstore.networks.cluster.members import Members, Refused
from netstore.networks.cluster.records import RECOVERING, STATE, CheckRequest, EndpointRecord
from netstore.store import Store, Transaction
from netstore.store.etcd import Changes, Etcd, History, Snapshot, put

T = TypeVar("T")

__all__ = ["LEASE_SECONDS", "Cluster", "State", "Work"]

LEASE_SECONDS = 9
_KEEP_SECONDS = 3.0
_PAUSES = (0.2, 0.5, 1.0, 2.0)
_REFUSED_PAUSE = 5.0
_RELIST_SECONDS = 5.0
_AT_ONCE = 1000  # changes in one commit: others wait for its end
_AHEAD = 1000  # answers of the watch that wait for the one before
_HISTORY = "etcd"
_NO_ANSWER = "CLUSTER_UNAVAILABLE"

log = structlog.get_logger(__name__)


class State(StrEnum):
    """How this node stands with its cluster."""

    JOINING = "joining"
    JOINED = "joined"
    AWAY = "away"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Work:
    """What a session asks of others: `follow` makes the kernel follow, `resync` all of it, `publish` never ends,
    `rotate` neither,
    `stray` is told of a record of this node's whose endpoint it does not have, `check` answers another node."""

    follow: Callable[[Effect], Awaitable[None]]
    resync: Callable[[], Awaitable[object]]
    publish: Callable[[], Coroutine[Any, Any, None]]
    rotate: Callable[[], Coroutine[Any, Any, None]]
    stray: Callable[[EndpointRecord], Awaitable[None]]
    check: Callable[[CheckRequest], Awaitable[None]]


class _Anew(Exception):
    """The session has to begin anew, and nothing is wrong."""


class Cluster:
    """The cluster as this node sees it."""

    def __init__(
        self, config: ClusterConfig, store: Store, node_id: str, localise: Callable[[Network], Network]
    ) -> None:
        first = zlib.crc32(node_id.encode())
        self.etcd = Etcd(config.endpoints, ca=config.ca, cert=config.cert, key=config.key, first=first)
        self.node = Node(
            id=node_id, name=config.name or socket.gethostname(), address=config.advertise, version=__version__
        )
        self.endpoints = tuple(config.endpoints)
        self.state = State.JOINING
        self.reason = "joining"
        self.refused: dict[str, str] = {}
        """What of the cluster cannot be on this node, by id, and why."""
        self.members = Members(self.etcd, store.path)
        self._store = store
        self._picture = Picture(node_id, localise)
        self._first_try = asyncio.Event()
        self._revision = 0
        self._history: History | None = None  # of all sessions, and of the runs before
        self._loaded = False
        self._moved = asyncio.Condition()
        self._relist = asyncio.Event()
        self._taking_up = asyncio.Lock()
        self._asked: asyncio.Queue[CheckRequest] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    def start(self, work: Work) -> None:
        """Begin to join, and go on trying."""
        self._work = work
        self._task = asyncio.create_task(self._run(), name="cluster")

    async def close(self) -> None:
        """End the session; the lease ends by itself, so that a restart is not seen as a loss."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self.etcd.close()

    async def ready(self) -> None:
        """Return when the cluster can be asked.

        Raises:
            Unavailable: it cannot; at once, with the reason.
        """
        await self._first_try.wait()
        if self.state is not State.JOINED:
            raise Unavailable(
                f"the cluster is not available: {self.reason}", reason=_NO_ANSWER,
                hint="networks of this node alone go on; `netstore system info` shows when it is back",
            )  # fmt: skip

    async def ask(self, question: Awaitable[T]) -> T:
        """Await a call of etcd's; when it does not answer, others are told so at once from then on."""
        try:
            return await question
        except Unavailable as error:  # of another reason: it answered
            if error.reason == _NO_ANSWER and self.state is State.JOINED:
                await self._leave(State.AWAY, error)
            raise

    def relist(self) -> None:
        """List everything anew soon: the picture may miss something."""
        self._relist.set()

    async def caught_up(self, revision: int) -> None:
        """Wait until the picture is as new as a revision of etcd's.

        Raises:
            Unavailable: the session ended meanwhile.
        """
        async with self._moved:
            await self._moved.wait_for(lambda: self._revision >= revision or self.state is not State.JOINED)
        await self.ready()

    async def warnings(self) -> list[str]:
        """Return what an administrator should know."""
        found = [] if self.state is State.JOINED else [f"cluster: {self.reason}"]
        six = ":" in self.node.address
        strange = sorted(f"{each.name} ({each.address})" for each in await self.nodes() if (":" in each.address) != six)
        if strange:
            shown = ", ".join(strange[:5]) + (f" and {len(strange) - 5} more" if strange[5:] else "")
            found.append(
                f"cluster: this node's address is IPv{6 if six else 4} ({self.node.address}), and nothing passes to"
                f" and from those whose address is not: {shown}; correct `advertise`"
            )
        return [*found, *(f"something of the cluster is not on this node: {why}" for why in self.refused.values())]

    async def nodes(self) -> list[Node]:
        """Return every node, as it was last seen."""
        return await self._store.read(lambda tx: tx.nodes.all())

    async def find(self, reference: str) -> Node:
        """Return a node by name, id or id prefix; "self" is this one."""
        reference = self.node.id if reference == "self" else reference
        return await self._store.read(lambda tx: tx.nodes.find(reference))

    async def count_endpoints(self, node_id: str) -> int:
        """Return how many endpoints a node has on networks that span nodes."""
        if node_id == self.node.id:
            condition = "network_id IN (SELECT network_id FROM global_networks)"
            return await self._store.read(lambda tx: tx.endpoints.count(condition))
        query = "SELECT count(*) FROM remote_endpoints WHERE node_id = ? AND json_extract(body, '$.name') != ''"
        rows = await self._store.read(lambda tx: tx.rows(query, node_id))
        return int(rows[0][0])

    async def drain(self, reference: str, etag: str, *, drained: bool) -> Node:
        """See `Members.drain`."""
        await self.ready()
        node = await self.members.drain(await self.find(reference), etag, drained=drained)
        await self.caught_up(node.revision)
        return node

    def set_key(self, public_key: str) -> None:
        """Register with this public key of WireGuard's."""
        self.node = replace(self.node, public_key=public_key)

    async def set_link(self, link: NodeLink) -> None:
        """Tell the others, now or when etcd is back, where this node is on the underlay."""
        if link == self.node.link:
            return
        self.node = replace(self.node, link=link)
        if self.state is State.JOINED:
            try:
                await self.members.change(self.node, "", lambda node: replace(node, link=link))
            except Unavailable as error:
                log.info("the cluster hears of the node's link later", reason=str(error))

    async def publish_key(self, public_key: str) -> None:
        """Tell all others of another one.

        Raises:
            Unavailable: etcd does not answer.
        """
        await self.ready()
        await self.members.change(self.node, "", lambda node: replace(node, public_key=public_key))
        self.set_key(public_key)

    async def remove(self, reference: str, *, force: bool) -> None:
        """See `Members.remove`.

        Raises:
            FailedPrecondition: it is this node.
        """
        await self.ready()
        node = await self.find(reference)
        if node.id == self.node.id:
            raise FailedPrecondition(
                f"node {node.name} is this one", hint="stop its netstored, then ask another node to remove it"
            )
        await self.members.remove(node, force=force)

    async def _run(self) -> None:
        tries = 0
        while True:
            try:
                await self._session()
            except _Anew:
                log.info("cluster: begins anew")
            except Refused as error:
                await self._leave(State.REFUSED, error)
                await asyncio.sleep(_REFUSED_PAUSE)
            except NetstoreError as error:
                tries = 0 if self.state is State.JOINED else tries
                await self._leave(State.AWAY, error)
                await asyncio.sleep(_PAUSES[min(tries, len(_PAUSES) - 1)])
                tries += 1
            except Exception:
                log.exception("cluster: a defect ended the session")
                await self._leave(State.AWAY, NetstoreError("a defect ended the session: see netstored's log"))
                await asyncio.sleep(_REFUSED_PAUSE)

    async def _leave(self, state: State, error: NetstoreError) -> None:
        if self.state is not state:
            log.warning("the cluster is not available; what is local goes on", state=state, reason=str(error))
        await self._set(state, str(error) if state is State.REFUSED else error.what)

    async def _set(self, state: State, reason: str) -> None:
        async with self._moved:
            self.state, self.reason = state, reason
            self._first_try.set()
            self._moved.notify_all()

    async def _session(self) -> None:
        known = self._history or await self._store.read(_known)
        now = await self.etcd.history()  # before this node writes anything: it may be little that was lost
        lease = await self.etcd.grant(LEASE_SECONDS)
        self.node = await self.members.register(self.node, lease)
        if known and not now.goes_on(known):
            await self._recover(known, now)
        changes = self.etcd.follow(STATE)
        first = await anext(changes)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep(lease), name="cluster lease")  # a large picture takes longer than it lives
                await self._load(first, now)
                waiting: asyncio.Queue[Snapshot | Changes] = asyncio.Queue(_AHEAD)
                group.create_task(self._watch(changes, waiting), name="cluster watch")
                group.create_task(self._follow(waiting), name="cluster following")
                group.create_task(self._list_anew(), name="cluster listing")
                group.create_task(self._work.publish(), name="cluster publication")
                group.create_task(self._work.rotate(), name="cluster keys")
                group.create_task(self._answer(), name="cluster checks")
        except BaseExceptionGroup as group:
            raise _first_of(group) from group

    async def _load(self, first: Snapshot | Changes, now: History) -> None:
        """Let the picture, and the kernel, be as a snapshot; the node has joined then."""
        self.refused = {}
        self._revision = 0
        self._loaded = False
        self._history = replace(now, revision=first.revision)
        await self._take_up(first)
        await self._work.resync()
        self._loaded = True
        log.info("joined the cluster", node=self.node.name, revision=self._revision)
        await self._set(State.JOINED, "")

    async def _recover(self, known: History, now: History) -> None:
        """Let nobody claim anything new until every node has put back what it holds."""
        log.warning("etcd has lost what it knew: what is held is put back", known=str(known), now=str(now))
        lease = await self.etcd.grant(RECOVERY_SECONDS)
        await self.etcd.transact([], [put(RECOVERING, b"", lease)])

    async def _keep(self, lease: int) -> None:
        while True:
            await asyncio.sleep(_KEEP_SECONDS)
            if not await self.etcd.keep_alive(lease):
                raise Unavailable("the node's lease ended: etcd was out of reach for too long")
            if self.state is State.AWAY and self._loaded:  # a call failed meanwhile, but etcd is back
                await self._set(State.JOINED, "")

    async def _answer(self) -> None:
        while True:
            await self._work.check(await self._asked.get())

    async def _list_anew(self) -> None:
        """Look now and then whether a network that could not be here can be, and whenever somebody asks."""
        while True:
            try:
                await asyncio.wait_for(self._relist.wait(), _RELIST_SECONDS)
            except TimeoutError:
                if not self.refused:
                    continue
            self._relist.clear()
            async with self._taking_up:
                found = await self.etcd.snapshot(STATE)
                self.refused = {}
                await self._take_up(found)
                await self._work.resync()

    async def _watch(
        self, changes: AsyncIterator[Snapshot | Changes], waiting: asyncio.Queue[Snapshot | Changes]
    ) -> None:
        async for each in changes:
            await waiting.put(each)

    async def _follow(self, waiting: asyncio.Queue[Snapshot | Changes]) -> None:
        """Take up what comes; what came meanwhile in one go: who is behind catches up in larger steps."""
        while True:
            found = [await waiting.get()]
            found += [waiting.get_nowait() for _ in range(waiting.qsize())]
            changes = [each for each in found if isinstance(each, Changes)]
            if len(changes) < len(found):  # a snapshot: history is gone, or was replaced: so may what it knows of us
                raise _Anew
            events = [event for each in changes for event in each.events]
            async with self._taking_up:
                await self._take_up(Changes(changes[-1].revision, events))

    async def _take_up(self, found: Snapshot | Changes) -> None:
        if isinstance(found, Snapshot):
            seen: Sequence[Seen] = await self._store.read(lambda tx: differences(tx, found.items))
        else:
            seen = found.events
        assert self._history
        self._history = replace(self._history, revision=max(self._history.revision, found.revision))
        for start in range(0, max(len(seen), 1), _AT_ONCE):
            part = seen[start : start + _AT_ONCE]
            effect = await self._store.write(lambda tx, part=part: self._picture_of(tx, part))  # type: ignore[misc]
            self.refused = {**self.refused, **effect.refused}
            await self._work.follow(effect)
            for request in effect.checks:
                self._asked.put_nowait(request)
            for stray in effect.strays:
                await self._work.stray(stray)
            if effect.removed_here:
                raise self.members.removed(self.node)
            if effect.lapsed_here:
                raise _Anew
        async with self._moved:
            self._revision = found.revision if isinstance(found, Snapshot) else max(self._revision, found.revision)
            self._moved.notify_all()

    def _picture_of(self, tx: Transaction, seen: Sequence[Seen]) -> Effect:
        assert self._history
        tx.set_meta(_HISTORY, msgspec.json.encode(self._history).decode())
        return self._picture.apply(tx, seen)


def _known(tx: Transaction) -> History | None:
    """Return how far etcd had come when this node last heard of it; a backup may be restored while it is down."""
    text = tx.meta(_HISTORY)
    return msgspec.json.decode(text, type=History) if text else None


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first
