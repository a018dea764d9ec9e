"""Clients that attach before a container runs, and are gone or cannot be connected when it starts."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from netstore.errors import FailedPrecondition
from netstore.launcher.terminals import Attached, Attaching


async def test_a_client_that_left_keeps_no_container_from_starting(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as conmon:
        conmon.bind(str(tmp_path / "attach"))
        conmon.listen()
        attaching = Attaching()
        gone, leaving, stays = (attaching.expect("c") for _ in range(3))
        gone.cancel()
        connecting = asyncio.ensure_future(attaching.connect("c", tmp_path))
        leaving.cancel()
        await connecting
        attached = await stays
        assert isinstance(attached, Attached)
        attached.close()


async def test_who_cannot_be_connected_is_told_and_the_container_starts(tmp_path: Path) -> None:
    attaching = Attaching()
    waiting = [attaching.expect("c") for _ in range(2)]
    await attaching.connect("c", tmp_path)
    for each in waiting:
        with pytest.raises(FailedPrecondition):
            await each
