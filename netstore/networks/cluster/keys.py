"""This node's key of WireGuard: made here, in a file that root alone reads; others get its public half by etcd.

A new key is used first and told then: what is sent meanwhile waits for the handshake, and what comes in goes on in the
sessions that there are. When it cannot be told the old one is used again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import structlog

from netstore.errors import NetstoreError
from netstore.kernel import wireguard
from netstore.model import Scope
from netstore.networks.cluster.cluster import Cluster
from netstore.networks.context import Context

__all__ = ["Keys"]

log = structlog.get_logger(__name__)


class Keys:
    """The key of a node."""

    def __init__(self, path: Path, context: Context, cluster: Cluster, seconds: float) -> None:
        self._path = path
        self._context = context
        self._cluster = cluster
        self._seconds = seconds

    async def start(self) -> None:
        """Use the key that there is, or a first one; before the node registers."""
        try:
            self._cluster.set_key(await self._apply(await asyncio.to_thread(_read, self._path)))
        except NetstoreError as error:
            log.error("nothing is encrypted", error=str(error))

    async def rotate(self) -> None:
        """Use another key now and then; never ends.

        Raises:
            Unavailable: etcd does not answer, and the old key is used on.
        """
        while True:
            await asyncio.sleep(self._seconds)
            if self._cluster.node.public_key:
                await self._replace()

    async def _replace(self) -> None:
        old, new = await asyncio.to_thread(_read, self._path), wireguard.new_key()
        await asyncio.to_thread(_write, self._path, new)
        try:
            await self._cluster.publish_key(await self._apply(new))
        except BaseException:
            await asyncio.to_thread(_write, self._path, old)
            await self._apply(old)
            raise
        log.info("WireGuard has a new key")

    async def _apply(self, key: str) -> str:
        """Give a key to the kernel; returns its public half, "" where nothing encrypts."""
        drivers = [each for each in self._context.drivers.values() if each.scope is Scope.GLOBAL]
        return "".join([await self._context.apply(each.apply_key, key) for each in drivers])


def _read(path: Path) -> str:
    """Return the key of a file, and make one where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text().strip()
    key = wireguard.new_key()
    _write(path, key)
    return key


def _write(path: Path, key: str) -> None:
    """Replace a key, durably."""
    beside = path.with_suffix(".new")
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
