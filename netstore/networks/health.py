"""Health checks of services: this node asks its own endpoints, as Docker's health checks do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from netstore.errors import NetstoreError
from netstore.model import HealthCheck, Kind
from netstore.store import Store, Transaction

__all__ = ["Checks", "Target"]

_STARTING_SECONDS = 1.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to ask, and how, for which service; `revision` tells an endpoint that was attached anew."""

    service_id: str
    endpoint_id: str
    revision: int
    address: str
    check: HealthCheck


class Checks:
    """The checks that run. `changed` is told of the network and the endpoint whose health changed."""

    def __init__(self, store: Store, changed: Callable[[str, str], None]) -> None:
        self._store = store
        self._changed = changed
        self._running: dict[str, dict[Target, asyncio.Task[None]]] = {}  # by network

    def follow(self, network_id: str, targets: frozenset[Target]) -> None:
        """Run the checks of a network's services, the whole set, and no others."""
        running = self._running.pop(network_id, {})
        for target in running.keys() - targets:
            running.pop(target).cancel()
        for target in targets - running.keys():
            running[target] = asyncio.create_task(self._watch(network_id, target), name="health check")
        if running:
            self._running[network_id] = running

    def close(self) -> None:
        """Stop all checks; who was healthy stays so."""
        for network_id in list(self._running):
            self.follow(network_id, frozenset())

    async def _watch(self, network_id: str, target: Target) -> None:
        failures, started = 0, False
        while True:
            works = await _works(target)
            failures = 0 if works else failures + 1
            healthy = await self._store.read(lambda tx: _is_healthy(tx, target))
            started |= healthy
            if works != healthy and (works or failures >= target.check.retries):
                try:
                    await self._store.write(lambda tx, works=works: _mark(tx, target, healthy=works))  # type: ignore[misc]
                    self._changed(network_id, target.endpoint_id)
                except NetstoreError as error:  # a full disk, say: noted by the next check
                    log.warning("an endpoint's health is not noted", endpoint=target.endpoint_id, error=str(error))
            interval = target.check.interval_seconds
            await asyncio.sleep(interval if started or works else min(interval, _STARTING_SECONDS))


async def _works(target: Target) -> bool:
    check = target.check
    try:
        async with asyncio.timeout(check.timeout_seconds):
            reader, writer = await asyncio.open_connection(target.address, check.port)
            try:
                if not check.path:
                    return True
                host = f"[{target.address}]" if ":" in target.address else target.address
                writer.write(
                    f"GET {check.path} HTTP/1.1\r\nHost: {host}:{check.port}\r\nUser-Agent: netstore\r\n"
                    "Connection: close\r\n\r\n".encode()
                )
                version, code, *_ = (await reader.readline()).split()
                return version.startswith(b"HTTP/1.") and 200 <= int(code) < 400
            finally:
                writer.close()
    except (OSError, ValueError):  # TimeoutError is an OSError; a line that is no status, or too long, a ValueError
        return False


def _is_healthy(tx: Transaction, target: Target) -> bool:
    query = "SELECT 1 FROM service_health WHERE service_id = ? AND endpoint_id = ?"
    return tx.row(query, target.service_id, target.endpoint_id) is not None


def _mark(tx: Transaction, target: Target, *, healthy: bool) -> None:
    service, endpoint = tx.services.get(target.service_id), tx.endpoints.get(target.endpoint_id)
    if service is None or endpoint is None or not endpoint.attached:
        return
    query = "INSERT OR IGNORE INTO service_health VALUES (?, ?)"
    if not healthy:
        query = "DELETE FROM service_health WHERE service_id = ? AND endpoint_id = ?"
    tx.execute(query, service.id, endpoint.id)
    status = "healthy" if healthy else "unhealthy"
    tx.event(Kind.ENDPOINT, "health_status", endpoint.id, endpoint.name, service=service.name, status=status)
