"""systemd, where it is who started us: what it is told (sd_notify(3)), and whether the machine goes down."""

from __future__ import annotations

import asyncio
import os
import socket
from subprocess import DEVNULL, PIPE

__all__ = ["goes_down", "keep_alive", "notify"]

_ANSWER_SECONDS = 5.0

# Taken out before anything is started: crun that inherits it waits until the container says that it is ready.
_MANAGER = os.environ.pop("NOTIFY_SOCKET", "")
_WATCHDOG_SECONDS = int(os.environ.pop("WATCHDOG_USEC", "0")) / 1e6


def notify(message: str) -> None:
    """Tell the service manager (sd_notify(3)), where there is one."""
    address = _MANAGER
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(message.encode(), "\0" + address[1:] if address[0] == "@" else address)


def keep_alive() -> None:
    """Tell the service manager, from now on, that the event loop turns: three times in its WatchdogSec=."""
    if _WATCHDOG_SECONDS:
        notify("WATCHDOG=1")
        asyncio.get_running_loop().call_later(_WATCHDOG_SECONDS / 3, keep_alive)


async def goes_down() -> bool:
    """Say whether the machine is being switched off or rebooted, of which systemd stops its services."""
    if not _MANAGER:
        return False
    try:
        process = await asyncio.create_subprocess_exec("systemctl", "is-system-running", stdout=PIPE, stderr=DEVNULL)
    except OSError:
        return False
    try:
        state, _ = await asyncio.wait_for(process.communicate(), _ANSWER_SECONDS)
    except TimeoutError:
        process.kill()
        return False
    return state.strip() == b"stopping"
