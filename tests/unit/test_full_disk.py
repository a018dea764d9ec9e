"""What goes on for ever does so when the store refuses a write, as it does while the disk is full."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from netstore import clock
from netstore.errors import Exhausted
from netstore.model import (
    Endpoint,
    EndpointSpec,
    HealthCheck,
    Lease,
    Network,
    NetworkSpec,
    Sandbox,
    Service,
    ServiceSpec,
)
from netstore.networks import health, leases
from netstore.networks.context import Context
from netstore.networks.leases import Leases
from netstore.store import Store, Transaction

NETWORK = Network(id="a" * 64, name="n", spec=NetworkSpec(ipam_driver="dhcp"))
LEASE = Lease(
    address="192.0.2.9", prefix=24, obtained=0, seconds=1000, renew_seconds=0, rebind_seconds=900, boot=clock.boot_id(),
    uptime=clock.uptime(),
)  # fmt: skip
ENDPOINT = Endpoint(
    id="e" * 64, network_id=NETWORK.id, sandbox_id="s" * 64, spec=EndpointSpec(), interface_name="eth0", lease=LEASE
)
SERVICE = Service(
    id="c" * 64, name="web",
    spec=ServiceSpec(network_id=NETWORK.id, selector=(), health=HealthCheck(port=80, path="", interval_seconds=0.01, timeout_seconds=1.0, retries=1)),
)  # fmt: skip


class Full(Store):
    """A store that refuses a number of writes."""

    refusals = 0

    async def write(self, work: Callable[[Transaction], Any]) -> Any:
        if self.refusals:
            self.refusals -= 1
            raise Exhausted("writing: the disk is full", hint="make room")
        return await super().write(work)


@pytest.fixture
async def store(tmp_path: Path):
    store = Full(tmp_path / "netstore.db")

    def fill(tx: Transaction) -> None:
        tx.networks.insert(NETWORK)
        tx.sandboxes.insert(Sandbox(id=ENDPOINT.sandbox_id, path=""))
        tx.endpoints.insert(ENDPOINT)
        tx.services.insert(SERVICE)

    await store.write(fill)
    yield store
    await store.close()


async def test_a_lease_is_renewed_when_an_event_could_not_be_noted(
    store: Full, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Context(store, {}, None, Path(), (), ())  # type: ignore[arg-type]
    monkeypatch.setattr(leases, "_pause", lambda lease, failures: 0.01)
    tries, again = 0, asyncio.Event()

    async def unanswered(*_: object) -> bool:
        nonlocal tries
        tries += 1
        if tries > 2:
            again.set()
        return False

    kept = Leases(context, None)  # type: ignore[arg-type]
    monkeypatch.setattr(kept, "_follow", unanswered)
    store.refusals = 1
    await kept.start()
    async with asyncio.timeout(30):
        await again.wait()
    assert store.refusals == 0
    await kept.close()
    context.close()


async def test_health_is_noted_when_there_is_room_again(store: Full, monkeypatch: pytest.MonkeyPatch) -> None:
    async def works(_: object) -> bool:
        return True

    monkeypatch.setattr(health, "_works", works)
    changed = asyncio.Event()
    checks = health.Checks(store, lambda *_: changed.set())
    store.refusals = 2
    assert SERVICE.spec.health
    target = health.Target(SERVICE.id, ENDPOINT.id, 0, "192.0.2.9", SERVICE.spec.health)
    checks.follow(NETWORK.id, frozenset({target}))
    async with asyncio.timeout(30):
        await changed.wait()
    assert await store.read(lambda tx: tx.rows("SELECT 1 FROM service_health"))
    checks.close()
