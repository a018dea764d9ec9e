"""What the parts of the network manager share: store, drivers, executors, locks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

from netstore.drivers.base import Driver
from netstore.errors import InvalidArgument
from netstore.networks.handover import ResolverLink
from netstore.networks.ipam import AddressPool
from netstore.store import Store

__all__ = ["Context", "KeyedLocks"]

P = ParamSpec("P")
T = TypeVar("T")


class KeyedLocks:
    """One lock a key, made at first use and forgotten with its last user."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    def held(self, key: str) -> bool:
        """Say whether somebody has the key's lock; any thread may ask."""
        return key in self._locks

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        """Hold the key's lock."""
        lock, users = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks.pop(key)
            if users > 1:
                self._locks[key] = (lock, users - 1)


@dataclass(slots=True)
class Context:
    """Shared by networks, endpoints, sandboxes and the reconciler of one daemon."""

    store: Store
    drivers: dict[str, Driver]
    resolver: ResolverLink
    netns_dir: Path
    pools: Sequence[AddressPool]
    global_pools: Sequence[AddressPool]
    """Where networks that span nodes get their subnets."""
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Options, by driver, of networks that do not give them."""
    locks: KeyedLocks = field(default_factory=KeyedLocks)
    # Commits that wait share one, and deletions a grace period of the kernel's; the rest its RTNL lock serialises.
    _applying: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8, "kernel-apply"))
    _removing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(16, "kernel-remove"))

    async def apply(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run blocking kernel work that makes things."""
        return await asyncio.get_running_loop().run_in_executor(self._applying, lambda: work(*args, **kwargs))

    async def remove(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run blocking kernel work that removes things, and may wait for a grace period."""
        return await asyncio.get_running_loop().run_in_executor(self._removing, lambda: work(*args, **kwargs))

    def driver(self, name: str) -> Driver:
        """Return a driver by name.

        Raises:
            InvalidArgument: there is none.
        """
        found = self.drivers.get(name)
        if found is None:
            accepted = ", ".join(sorted(self.drivers))
            raise InvalidArgument("spec.driver", name, f"one of {accepted}", reason="UNKNOWN_DRIVER")
        return found

    def close(self) -> None:
        """End the executors' threads once their work is done."""
        self._applying.shutdown()
        self._removing.shutdown()
