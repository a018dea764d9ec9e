"""Keeps a netstore-resolver running where no service manager does (`[resolver] manage` in the configuration).

It is started in a session of its own, so that it outlives us; one that runs already, whoever started it, is used as it
is. The resolver's own lock on RUN_DIR lets only one serve: a second that is started in a race ends by itself.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Sequence

import structlog

from netstore import __version__

__all__ = ["ResolverProcess"]

log = structlog.get_logger(__name__)

_MOMENT_SECONDS = 0.5
"""How long another's resolver, or one that its service manager restarts, may take to answer."""
_LONGEST_PAUSE_SECONDS = 10.0


class ResolverProcess:
    """The resolver's process. `command` starts it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._process: subprocess.Popen[bytes] | None = None
        self._missed = time.monotonic()
        self._pause = 0.0
        self._replacing = self._replaced = False
        self._next = self._missed + _MOMENT_SECONDS

    def found(self, version: str) -> bool:
        """Be told that a resolver of a version answers; says whether it is to end, and be followed by one of ours.

        That is asked once, so that an installation of mixed versions does not go on for ever.
        """
        self._pause = 0.0
        self._missed = 0.0
        self._replacing = version != __version__ and not self._replaced
        if self._replacing:
            self._replaced = True
            log.info("netstore-resolver is of another version: a new one takes over", version=version)
        return self._replacing

    async def ensure(self) -> None:
        """Start a resolver, if nobody answered for a moment and none of ours is about to."""
        now = time.monotonic()
        if not self._missed:  # it answered until now
            self._missed = now
            ours = self._process is not None and self._process.poll() is not None
            self._next = now if ours or self._replacing else now + _MOMENT_SECONDS
        if self._process and self._process.poll() is None:
            return
        if self._process:
            log.warning("netstore-resolver ended", status=self._process.returncode)
            self._process = None
        if now < self._next:
            return
        self._pause = min(max(2 * self._pause, 0.2), _LONGEST_PAUSE_SECONDS)
        self._next = now + self._pause
        try:
            self._process = await asyncio.to_thread(_start, self._command)
            log.info("netstore-resolver is started", pid=self._process.pid)
        except OSError as error:
            log.error("netstore-resolver cannot be started", command=self._command[0], reason=str(error))


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command that outlives us, by vfork: gRPC does not survive a fork."""
    environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True, cwd="/")
