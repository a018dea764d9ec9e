"""The node's durable state: one SQLite database, one writer at a time, one reading thread.

Writes that wait while a commit runs share the next one (group commit): the first of them to get the lock commits for
all, each inside its own savepoint, so that one refusal undoes only its own work. A thread that goes on to the kernel
writes by itself (`write_here`) and saves two handovers. WAL and synchronous=FULL: what was answered survives a power
cut.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import structlog

from netstore.errors import Exhausted, NetstoreError, Unavailable
from netstore.store.schema import MIGRATIONS
from netstore.store.tables import Transaction

__all__ = ["Store", "connect"]

T = TypeVar("T")

_KEEP_EVENTS = 100_000
_KEEP_REQUESTS_SECONDS = 24 * 3600
_TRIM_EVERY = 1000  # commits
_BATCH = 64  # writes in one commit

log = structlog.get_logger(__name__)


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Open the database for one thread.

    Raises:
        NetstoreError: it cannot be opened, or is no database.
    """
    try:
        connection = sqlite3.connect(
            f"file:{path}?mode={'ro' if read_only else 'rwc'}", uri=True, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA busy_timeout = 5000")
        if not read_only:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error as error:
        raise _mapped(error, f"opening {path}") from error
    return connection


@dataclass(slots=True, eq=False)
class _Write:
    work: Callable[[Transaction], Any]
    done: bool = False
    result: Any = None
    error: BaseException | None = None


class Store:
    """Durable state. `write` and `read` run a function of a `Transaction` in threads of the store's."""

    def __init__(self, path: Path, *, group: int = 0) -> None:
        self.path = path
        if os.getuid() == 0:  # before SQLite makes -wal and -shm, which take owner and mode of the database
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640))
            os.chown(path, 0, group)
        self._writer = connect(path)
        _migrate(self._writer)
        self._transaction = Transaction(self._writer)
        self._reader = connect(path, read_only=True)
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="store-read")
        self._writing = ThreadPoolExecutor(_BATCH, thread_name_prefix="store-write")
        self._waiting: deque[_Write] = deque()
        self._committing = threading.Lock()
        self._commits = 0
        self._loop = asyncio.get_running_loop()
        self._changed: asyncio.Future[None] | None = None
        self._closed = False

    async def write(self, work: Callable[[Transaction], T]) -> T:
        """Run `work` in a transaction and commit it durably; raise what it raises, with nothing changed.

        Raises:
            Exhausted: the disk is full.
            Unavailable: the store is closed.
        """
        self._refuse_if_closed()
        return await self._loop.run_in_executor(self._writing, self.write_here, work)

    def write_here(self, work: Callable[[Transaction], T]) -> T:
        """Do what `write` does, in the calling thread, which must not be the event loop's."""
        request = _Write(work)
        self._waiting.append(request)
        with self._committing:
            while not request.done:
                self._commit([self._waiting.popleft() for _ in range(min(len(self._waiting), _BATCH))])
        if request.error:
            raise request.error
        return cast(T, request.result)

    async def read(self, work: Callable[[Transaction], T]) -> T:
        """Run `work` on one consistent view of what is committed."""
        self._refuse_if_closed()
        return await self._loop.run_in_executor(self._reading, self._read, work)

    def changed(self) -> asyncio.Future[None]:
        """Return a future that is done after the next commit; shield it when waiting with a timeout."""
        if self._changed is None:
            self._changed = self._loop.create_future()
        return self._changed

    async def backup(self, target: Path) -> None:
        """Write a consistent copy of the database to `target` while it is in use (SQLite's VACUUM INTO)."""
        self._refuse_if_closed()
        await self._loop.run_in_executor(self._reading, self._copy, target)

    async def close(self) -> None:
        """Finish the writes that wait, and close."""
        self._closed = True
        await asyncio.to_thread(self._writing.shutdown)
        self._reading.shutdown()
        self._reader.close()
        self._writer.close()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise Unavailable("netstored is stopping", hint="try again when it is up")

    def _read(self, work: Callable[[Transaction], T]) -> T:
        try:
            self._reader.execute("BEGIN")  # else each statement would see what was committed since the one before
            try:
                return work(Transaction(self._reader))
            finally:
                self._reader.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise _mapped(error, f"reading {self.path}") from error

    def _copy(self, target: Path) -> None:
        try:
            self._reader.execute("VACUUM INTO ?", (str(target),))
        except sqlite3.Error as error:
            raise _mapped(error, f"copying {self.path}") from error

    def _commit(self, batch: list[_Write]) -> None:
        self._commits += 1
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for request in batch:
                self._run(request)
            if self._commits % _TRIM_EVERY == 0:
                _trim(self._transaction)
            self._writer.execute("COMMIT")
        except sqlite3.Error as error:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            for request in batch:
                request.error = request.error or _mapped(error, f"committing to {self.path}")
        for request in batch:
            request.done = True
        if self._changed is not None:  # who asks for it later reads what is committed now
            self._loop.call_soon_threadsafe(self._tell)

    def _run(self, request: _Write) -> None:
        self._writer.execute("SAVEPOINT request")
        try:
            request.result = request.work(self._transaction)
        except sqlite3.Error as error:
            request.error = _mapped(error, f"writing to {self.path}")
        except Exception as error:
            request.error = error
        if request.error:
            self._writer.execute("ROLLBACK TO request")
        self._writer.execute("RELEASE request")

    def _tell(self) -> None:
        changed, self._changed = self._changed, None
        if changed and not changed.done():
            changed.set_result(None)


def _migrate(connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise NetstoreError(
            f"the database has schema {version}, this netstored knows {len(MIGRATIONS)}",
            hint="run the newer netstored, or restore a backup made by this one",
        )
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;")
        log.info("database migrated", schema=number)


def _trim(transaction: Transaction) -> None:
    transaction.execute("DELETE FROM events WHERE revision <= ?", transaction.revision() - _KEEP_EVENTS)
    transaction.execute("DELETE FROM requests WHERE time < ?", time.time() - _KEEP_REQUESTS_SECONDS)


def _mapped(error: sqlite3.Error, doing: str) -> NetstoreError:
    """The one place where SQLite's errors become ours."""
    name = getattr(error, "sqlite_errorname", "")
    if name == "SQLITE_FULL":
        return Exhausted(f"{doing}: the disk is full", hint="free space on the file system of the state directory")
    hint = "restore the last `netstore system backup`" if name in ("SQLITE_CORRUPT", "SQLITE_NOTADB") else ""
    return NetstoreError(f"{doing}: {error} ({name})", hint=hint, reason=f"STORE_{name}")
