"""Blocking work beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import ParamSpec, TypeVar

__all__ = ["in_thread", "prepare"]

_MOST = 256
"""Enough for every call that waits for a server or a disk that does not answer: others must not wait behind it."""

P = ParamSpec("P")
T = TypeVar("T")


def prepare() -> None:
    """Let the running loop have as many threads as may wait at once: it has six by itself, on two processors."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_MOST, "work"))


async def in_thread(work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work in a thread, as `asyncio.to_thread` does. Who is cancelled meanwhile waits for it all the same:
    a thread cannot be stopped, and has the locks and descriptors that its caller holds.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # nobody asks any more
        raise
