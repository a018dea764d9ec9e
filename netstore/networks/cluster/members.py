"""The nodes of a cluster: registration, and what is done to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import structlog

from netstore.clock import boot_id
from netstore.errors import Conflict, FailedPrecondition, InUse, Unavailable
from netstore.model import Node
from netstore.networks.cluster.records import (
    ALIVE,
    CLAIMS,
    ENDPOINTS,
    HOSTS,
    NODES,
    PORTS,
    decode_endpoint,
    decode_node,
    encode,
)
from netstore.store.etcd import Etcd, KeyValue, absent, delete, exists, get, holds, put, unchanged

__all__ = ["Members", "Refused", "member_key", "no_cluster"]

_TRIES = 10
_AT_ONCE = 16

log = structlog.get_logger(__name__)


def no_cluster() -> FailedPrecondition:
    """Return what a node says that is in no cluster."""
    return FailedPrecondition(
        "this node is in no cluster", reason="NO_CLUSTER",
        hint="write [cluster] into its configuration: see docs/howto/run-a-cluster.md",
    )  # fmt: skip


class Refused(Unavailable):
    """The cluster does not take this node; what is local goes on."""


def member_key(node_id: str) -> str:
    """Return the key that a node's right to claim anything depends on."""
    return f"{CLAIMS}members/{node_id}"


def _grave(node_id: str) -> str:
    """Return the key that tells a running node that it was removed, from one that etcd has lost (an old backup)."""
    return f"{CLAIMS}removed/{node_id}"


def _identity(state: Path) -> str:
    """Return what tells a file from copies of it, on this machine as long as it runs, and on others."""
    found = state.stat()
    return f"{boot_id()} {found.st_dev} {found.st_ino}"


def _claims(node: Node) -> dict[str, str]:
    """Return the keys that a node holds, and what they are for a message."""
    return {
        f"{CLAIMS}names/nodes/{node.name}": f"the node name {node.name}",
        f"{CLAIMS}underlay/{node.address}": f"the address {node.address} (advertise)",
    }


class Members:
    """The nodes, as etcd has them. `state` is a file of this one: a copy of it has the same id, and is another."""

    def __init__(self, etcd: Etcd, state: Path) -> None:
        self._etcd = etcd
        self._whose = _identity(state).encode()
        self._joined = False

    async def register(self, node: Node, lease: int) -> Node:
        """Make a node known, and up as long as its lease lives; returns it as it is known.

        Raises:
            Refused: another node has its name, its address or its id; or it was removed while it was away.
        """
        for _ in range(_TRIES):
            present = await self._etcd.read(f"{NODES}{node.id}")
            old = decode_node(present.value) if present else None
            if self._joined and await self._etcd.read(_grave(node.id)):
                raise self.removed(node)
            await self._refuse_twin(node, old)
            created = old.create_time if old else time.time()
            wanted = replace(node, create_time=created, drained=bool(old and old.drained), up=False, revision=0)
            mine = encode(node.id)
            found = {key: await self._etcd.read(key) for key in _claims(wanted)}
            for key, holder in found.items():
                if holder and holder.value != mine:
                    raise Refused(
                        f"{_claims(wanted)[key]} is taken by node {holder.value.decode()[1:13]}",
                        hint="give [cluster] another name or advertise; if that node is no more, `netstore node rm` it",
                        reason="NODE_NAME_TAKEN" if "/names/" in key else "NODE_ADDRESS_TAKEN",
                    )  # fmt: skip
            conditions = [unchanged(f"{NODES}{node.id}", present.revision if present else 0)]
            conditions += [holds(key, mine) if holder else absent(key) for key, holder in found.items()]
            then = [put(key, mine) for key, holder in found.items() if not holder]
            then += [delete(key) for key in (_claims(old) if old else ()) if key not in found]
            if old != wanted:  # before it is up: others see it in this order
                then.append(put(f"{NODES}{node.id}", encode(wanted)))
            then += [put(f"{ALIVE}{node.id}", self._whose, lease), put(member_key(node.id), b"")]
            then.append(delete(_grave(node.id)))
            if (await self._etcd.transact(conditions, then)).succeeded:
                self._joined = True
                return wanted
        raise Unavailable(f"node {node.name} could not register: others change the cluster at the same time")

    def removed(self, node: Node) -> Refused:
        """Return what is said to a node that somebody removed."""
        return Refused(
            f"node {node.name} was removed from the cluster", reason="NODE_REMOVED",
            hint="restart its netstored to let it join again",
        )  # fmt: skip

    async def _refuse_twin(self, node: Node, old: Node | None) -> None:
        alive = await self._etcd.read(f"{ALIVE}{node.id}")
        if old and alive and alive.value != self._whose:
            raise Refused(
                f"node id {node.id[:12]} is in use by node {old.name} ({old.address})", reason="NODE_ID_TAKEN",
                hint="was the state directory copied from there? begin with an empty one (after a quick reboot: wait)",
            )  # fmt: skip

    async def drain(self, node: Node, etag: str, *, drained: bool) -> Node:
        """Let a node take no new endpoints of networks that span nodes, or take them again. Raises as `change`."""
        return await self.change(node, etag, lambda present: replace(present, drained=drained))

    async def change(self, node: Node, etag: str, change: Callable[[Node], Node]) -> Node:
        """Change what all know of a node.

        Raises:
            Conflict: the etag is not the current one.
            Unavailable: etcd does not answer.
        """
        for _ in range(_TRIES):
            present = await self._etcd.read(f"{NODES}{node.id}")
            if present is None:
                raise FailedPrecondition(f"node {node.name} was removed", hint="`netstore node ls` shows what there is")
            if etag and etag != str(present.revision):
                raise Conflict(f"node {node.name} has changed", hint="read it again, then change it again")
            changed = change(decode_node(present.value))
            result = await self._etcd.transact(
                [unchanged(f"{NODES}{node.id}", present.revision)], [put(f"{NODES}{node.id}", encode(changed))],
                [get(f"{NODES}{node.id}")],
            )  # fmt: skip
            if result.succeeded:
                return replace(changed, up=node.up, revision=result.revision)
            if result.shows(encode(changed)):
                return replace(changed, up=node.up, revision=result.found[0][0].revision)
        raise Unavailable(f"node {node.name} could not be changed: others change it at the same time")

    async def remove(self, node: Node, *, force: bool) -> None:
        """Remove a node with all that it holds; what was begun and broke off is finished by asking again.

        Raises:
            InUse: it is up, and `force` is not set.
            Conflict: it was started again meanwhile.
        """
        if not force and await self._etcd.read(f"{ALIVE}{node.id}"):
            raise InUse(
                f"node {node.name} is up", hint="stop its netstored and wait for 10 s, or give --force", node=node.name
            )
        # From here on it can claim nothing more, unless it is started again.
        grave = _grave(node.id)
        await self._etcd.transact([], [delete(member_key(node.id)), delete(f"{ALIVE}{node.id}"), put(grave, b"")])
        items = [each for prefix in (ENDPOINTS, HOSTS) for each in (await self._etcd.snapshot(prefix)).items]
        held = [each for each in items if decode_endpoint(each.value).node_id == node.id]
        for start in range(0, len(held), _AT_ONCE):
            await asyncio.gather(*(self._take_away(node, each) for each in held[start : start + _AT_ONCE]))
        mine = encode(node.id)
        for key in _claims(node):
            await self._etcd.transact([holds(key, mine), exists(grave)], [delete(key)])
        if not (await self._etcd.transact([exists(grave)], [delete(f"{NODES}{node.id}")])).succeeded:
            raise _joined_again(node)
        log.info("node removed", node=node.name, endpoints=len(held))

    async def _take_away(self, node: Node, item: KeyValue | None) -> None:
        """Remove a record with what it claims. As long as it is unchanged, all that is its own: a node that still runs
        may give back an address, which another has at once.
        """
        while item:
            record = decode_endpoint(item.value)
            ports = [key for key in record.claims if key.startswith(PORTS)]
            for key in ports:  # another endpoint may have it since the node was lost
                await self._etcd.transact([holds(key, record.id.encode())], [delete(key)])
            conditions = [unchanged(item.key, item.revision), exists(_grave(node.id))]
            gone = [delete(key) for key in (*record.claims, item.key) if key not in ports]
            if (await self._etcd.transact(conditions, gone)).succeeded:
                return
            if await self._etcd.read(_grave(node.id)) is None:
                raise _joined_again(node)
            item = await self._etcd.read(item.key)


def _joined_again(node: Node) -> Conflict:
    return Conflict(f"node {node.name} joined again meanwhile", hint="stop its netstored, then remove it again")
