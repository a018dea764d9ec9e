"""Unix sockets of adapters."""

from __future__ import annotations

import os
import socket
from pathlib import Path

__all__ = ["bind_private", "unbind"]


def bind_private(path: Path) -> socket.socket:
    """Bind a socket that is root's alone, in place of what a daemon that was killed left there."""
    unbind(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    return listener


def unbind(path: Path) -> None:
    """Let nobody find a socket any more."""
    path.unlink(missing_ok=True)
