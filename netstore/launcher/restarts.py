"""Restart policies (docker run --restart): containers that run again once they ended, or once the node started."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from netstore.errors import NetstoreError
from netstore.model import Container, ContainerState, Restart

__all__ = ["Restarts", "runs_again"]

log = structlog.get_logger(__name__)

_FIRST_DELAY, _LONGEST_DELAY = 0.1, 60.0  # seconds, doubled from one to the next
_LONG_RUN = 10.0  # seconds, after which a container is not one that fails at once
_AT_A_TIME = 4


def runs_again(container: Container, *, booted: bool) -> bool:
    """Say whether a container that does not run is to be started; `booted`: the daemon has just started. Pure."""
    policy, limit = container.spec.restart, container.spec.restart_limit
    if container.state is not ContainerState.EXITED or policy is Restart.NO:
        return False
    if container.stopped:
        return booted and policy is Restart.ALWAYS
    if policy is Restart.ON_FAILURE:
        return container.exit_code != 0 and (not limit or container.restart_count < limit)
    return True


class Restarts:
    """Those that wait to be started again. `start` starts the container of an id."""

    def __init__(self, start: Callable[[str], Awaitable[None]]) -> None:
        self._start = start
        self._waiting: dict[str, asyncio.Task[None]] = {}
        self._delays: dict[str, float] = {}  # the last, by container
        self._free = asyncio.Semaphore(_AT_A_TIME)
        self._closed = False

    def consider(self, container: Container, *, booted: bool = False) -> None:
        """Start a container that ended again, in a while, if its policy says so."""
        if self._closed or container.id in self._waiting or not runs_again(container, booted=booted):
            return
        last = 0.0 if container.finish_time - container.start_time > _LONG_RUN else self._delays.get(container.id, 0.0)
        delay = min(2 * last, _LONGEST_DELAY) or _FIRST_DELAY
        self._delays[container.id] = delay
        task = asyncio.create_task(self._again(container, delay), name=f"restart of {container.name}")
        self._waiting[container.id] = task

    def forget(self, container_id: str) -> None:
        """Let a container be: somebody stops, removes or starts it."""
        self._delays.pop(container_id, None)
        if task := self._waiting.pop(container_id, None):
            task.cancel()

    async def close(self) -> None:
        """Start nothing any more."""
        self._closed = True
        tasks = list(self._waiting.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _again(self, container: Container, delay: float) -> None:
        while True:
            await asyncio.sleep(delay)
            try:
                async with self._free:
                    await self._start(container.id)
            except NetstoreError as error:  # such as a server that is not up yet
                delay = min(2 * delay, _LONGEST_DELAY)
                log.warning("starting a container again failed", container=container.name, error=str(error), next=delay)
            else:
                break
        self._waiting.pop(container.id, None)
