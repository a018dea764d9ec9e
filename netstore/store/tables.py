"""Typed access to the rows, inside one transaction.

A `Transaction` lives only while `Store.write` or `Store.read` runs the function it is given, in the store's thread.
Every resource is one row: keys and constraints as columns, the whole of it as JSON in `body`.
"""

from __future__ import annotations

import functools
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

import msgspec

from netstore.errors import AlreadyExists, InvalidArgument, NotFound
from netstore.model import (
    Container,
    Endpoint,
    Event,
    ForeignMount,
    Image,
    Kind,
    Network,
    Node,
    Policy,
    Sandbox,
    Service,
    Snapshot,
    TrashedVolume,
    Volume,
)

__all__ = ["Table", "Transaction"]


class _Resource(Protocol):
    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=_Resource)


@functools.cache
def _decoder(type_: type[Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(type_)


_ID_LENGTH = 64
_HEX = set("0123456789abcdef")


class Table(Generic[R]):
    """The rows of one kind of resource. `columns` gives the values of the key columns besides id and body."""

    def __init__(
        self, tx: Transaction, name: str, kind: Kind, type_: type[R], columns: Callable[[R], Mapping[str, object]]
    ) -> None:
        self._tx = tx
        self._name = name
        self._kind = kind
        self._decode: Callable[[str], R] = _decoder(type_).decode
        self._columns = columns

    def get(self, resource_id: str) -> R | None:
        """Return the resource of that id, or None."""
        row = self._tx.row(f"SELECT body FROM {self._name} WHERE id = ?", resource_id)
        return self._decode(row[0]) if row else None

    def require(self, resource_id: str) -> R:
        """Return the resource of that id.

        Raises:
            NotFound: there is none.
        """
        found = self.get(resource_id)
        if found is None:
            raise NotFound(self._kind, resource_id)
        return found

    def find(self, reference: str, *, by_name: bool = True) -> R:
        """Return the resource that a name, an id or a prefix of only one id means.

        Raises:
            NotFound: nothing goes by it.
            InvalidArgument: it is empty, or a prefix of several ids.
        """
        if not reference:
            raise InvalidArgument(self._kind, reference, f"the name or id of a {self._kind}")
        if by_name:
            row = self._tx.row(f"SELECT body FROM {self._name} WHERE name = ?", reference)
            if row:
                return self._decode(row[0])
        if len(reference) == _ID_LENGTH and (found := self.get(reference)):
            return found
        if len(reference) <= _ID_LENGTH and _HEX.issuperset(reference):
            rows = self._tx.rows(
                f"SELECT body FROM {self._name} WHERE id >= ? AND id < ? LIMIT 2", reference, reference + "g"
            )
            if len(rows) == 1:
                return self._decode(rows[0][0])
            if rows:
                raise InvalidArgument(
                    self._kind, reference, "more digits of the id: several begin so", reason="AMBIGUOUS_ID"
                )
        raise NotFound(self._kind, reference, hint=f"`netstore {self._kind} ls` shows what there is")

    def insert(self, resource: R) -> None:
        """Add a row. Constraint violations surface as sqlite3.IntegrityError for the caller to name."""
        values = {"id": resource.id, **self._columns(resource), "body": msgspec.json.encode(resource).decode()}
        marks = ", ".join("?" * len(values))
        self._tx.execute(f"INSERT INTO {self._name} ({', '.join(values)}) VALUES ({marks})", *values.values())

    def update(self, resource: R) -> None:
        """Replace the row of the same id."""
        values = {**self._columns(resource), "body": msgspec.json.encode(resource).decode()}
        values.pop("created", None)
        assignments = ", ".join(f"{column} = ?" for column in values)
        self._tx.execute(f"UPDATE {self._name} SET {assignments} WHERE id = ?", *values.values(), resource.id)

    def delete(self, resource_id: str) -> None:
        """Remove the row; what refers to it goes or refuses as the schema says."""
        self._tx.execute(f"DELETE FROM {self._name} WHERE id = ?", resource_id)

    def all(self, where: str = "1", *values: object) -> list[R]:
        """Return the resources that the SQL condition selects, oldest first where they have an age."""
        order = "id" if self._name == "sandboxes" else "created"
        rows = self._tx.rows(f"SELECT body FROM {self._name} WHERE {where} ORDER BY {order}", *values)
        return [self._decode(row[0]) for row in rows]

    def by_age(self, after: tuple[float, str]) -> Iterator[R]:
        """Yield the resources after a time of creation and id, oldest first, each read when it is asked for."""
        age = "json_extract(body, '$.create_time')"
        sql = f"SELECT body FROM {self._name} WHERE {age} >= ? ORDER BY {age}, id"
        for (body,) in self._tx.execute(sql, after[0]):
            resource = self._decode(body)
            if (resource.create_time, resource.id) > after:  # type: ignore[attr-defined]
                yield resource

    def count(self, where: str = "1", *values: object) -> int:
        """Return how many resources the SQL condition selects."""
        row = self._tx.row(f"SELECT count(*) FROM {self._name} WHERE {where}", *values)
        return cast(int, row[0]) if row else 0


class Transaction:
    """What a function run by the store may do: rows, events and answers to repeated requests."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.networks = Table(
            self, "networks", Kind.NETWORK, Network, lambda n: {"name": n.name, "created": n.revision}
        )
        self.nodes = Table(
            self, "nodes", Kind.NODE, Node,
            lambda n: {"name": n.name, "created": int(n.create_time * 1e6), "up": n.up},
        )  # fmt: skip
        self.sandboxes = Table(
            self,
            "sandboxes",
            Kind.SANDBOX,
            Sandbox,
            lambda s: {"path": s.path or None, "inode": s.inode, "container_id": s.container_id},
        )
        self.endpoints = Table(self, "endpoints", Kind.ENDPOINT, Endpoint, _endpoint_columns)
        self.volumes = Table(self, "volumes", Kind.VOLUME, Volume, lambda v: {"name": v.name, "created": v.revision})
        self.policies = Table(
            self,
            "policies",
            Kind.POLICY,
            Policy,
            lambda p: {"name": p.name, "created": p.revision, "network_id": p.spec.network_id},
        )
        self.services = Table(
            self, "services", Kind.SERVICE, Service,
            lambda s: {"name": s.name, "created": int(s.create_time * 1e6), "network_id": s.spec.network_id},
        )  # fmt: skip
        self.snapshots = Table(
            self, "snapshots", Kind.SNAPSHOT, Snapshot,
            lambda s: {"volume_id": s.volume_id, "name": s.name, "created": s.revision},
        )  # fmt: skip
        self.trash = Table(
            self, "trash", Kind.VOLUME, TrashedVolume, lambda t: {"name": t.volume.name, "created": t.revision}
        )
        self.images = Table(
            self, "images", Kind.IMAGE, Image, lambda i: {"name": i.name or None, "created": i.revision}
        )
        self.containers = Table(
            self,
            "containers",
            Kind.CONTAINER,
            Container,
            lambda c: {"name": c.name, "created": c.revision, "image_id": c.image_id, "sandbox_id": c.sandbox_id},
        )

        self.mounts = Table(
            self,
            "mounts",
            Kind.MOUNT,
            ForeignMount,
            lambda m: {
                "created": m.revision,
                "inode": m.inode,
                "target": os.path.normpath(m.mount.spec.target),
                "place": m.ref.path or f"process {m.ref.pid}",
                "volume_id": m.mount.volume_id or None,
            },
        )

    def execute(self, sql: str, *values: object) -> sqlite3.Cursor:
        """Run one statement."""
        return self._connection.execute(sql, values)

    def row(self, sql: str, *values: object) -> tuple[Any, ...] | None:
        """Return the first row, or None."""
        return cast("tuple[Any, ...] | None", self._connection.execute(sql, values).fetchone())

    def rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Return every row."""
        return self._connection.execute(sql, values).fetchall()

    def event(self, kind: Kind, action: str, resource_id: str, name: str, **attributes: object) -> int:
        """Record a change; returns its revision, which becomes the resource's etag."""
        text = msgspec.json.encode({key: str(value) for key, value in attributes.items() if value != ""}).decode()
        cursor = self.execute(
            "INSERT INTO events (time, kind, action, resource_id, resource_name, attributes) VALUES (?, ?, ?, ?, ?, ?)",
            time.time(), kind.value, action, resource_id, name, text,
        )  # fmt: skip
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def events(self, after: int, limit: int) -> list[Event]:
        """Return events with a revision above `after`, oldest first."""
        rows = self.rows("SELECT * FROM events WHERE revision > ? ORDER BY revision LIMIT ?", after, limit)
        return [_event(row) for row in rows]

    def data_version(self) -> int:
        """Return a number that changes with every commit of another connection (SQLite: PRAGMA data_version)."""
        row = self.row("PRAGMA data_version")
        return row[0] if row else 0

    def revision(self) -> int:
        """Return the newest event's revision, 0 when there was none."""
        row = self.row("SELECT max(revision) FROM events")
        return row[0] or 0 if row else 0

    def oldest_revision(self) -> int:
        """Return the oldest event's revision that is kept, 1 when none was trimmed."""
        row = self.row("SELECT min(revision) FROM events")
        return row[0] or 1 if row else 1

    def answered(self, request_id: str, method: str) -> list[str]:
        """Return ids of what a request with that id made before; [] when it is new.

        Raises:
            AlreadyExists: the id was used for another method.
        """
        if not request_id:
            return []
        row = self.row("SELECT method, resource_ids FROM requests WHERE request_id = ?", request_id)
        if row is None:
            return []
        if row[0] != method:
            raise AlreadyExists(
                f"request_id {request_id} was used for {row[0]}", hint="use a new UUID for each request",
                reason="REQUEST_ID_REUSED",
            )  # fmt: skip
        return str(row[1]).split()

    def answer(self, request_id: str, method: str, resource_ids: Sequence[str]) -> None:
        """Remember what a request made."""
        if request_id:
            self.execute(
                "INSERT INTO requests VALUES (?, ?, ?, ?)", request_id, method, " ".join(resource_ids), time.time()
            )

    def unanswer(self, request_id: str) -> None:
        """Forget what a request made, when that is undone."""
        if request_id:
            self.execute("DELETE FROM requests WHERE request_id = ?", request_id)

    def meta(self, key: str) -> str:
        """Return a value of the node's own, "" when it has none."""
        row = self.row("SELECT value FROM meta WHERE key = ?", key)
        return row[0] if row else ""

    def set_meta(self, key: str, value: str) -> None:
        """Set a value of the node's own."""
        self.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", key, value)


def _endpoint_columns(endpoint: Endpoint) -> Mapping[str, object]:
    return {
        "name": endpoint.name,
        "created": endpoint.revision,
        "network_id": endpoint.network_id,
        "sandbox_id": endpoint.sandbox_id,
        "mac": endpoint.mac_address or None,
        "interface_name": endpoint.interface_name or None,
    }


def _event(row: tuple[Any, ...]) -> Event:
    revision, moment, kind, action, resource_id, name, attributes = row
    return Event(
        revision=revision, time=moment, kind=Kind(kind), action=action, resource_id=resource_id, resource_name=name,
        attributes=msgspec.json.decode(attributes, type=dict[str, str]),
    )  # fmt: skip
