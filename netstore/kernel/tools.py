"""Programs of the distribution that do what has no system call: mkfs, fsck, mount helpers. Each can be killed."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from netstore.errors import NetstoreError, Unavailable, Unsupported

__all__ = ["run_tool"]


def run_tool(
    command: Sequence[str], doing: str, *, timeout: float = 120.0, environment: Mapping[str, str] | None = None,
    package: str = "", accepted: Sequence[int] = (0,),
) -> str:  # fmt: skip
    """Run a program and return what it printed. `package` is named when it is not installed.

    Raises:
        Unsupported: it is not installed.
        Unavailable: it did not end in `timeout` seconds, and was killed.
        NetstoreError: it failed; with what it said.
    """
    settings = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", **(environment or {})}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout, env=settings, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise Unsupported(
            f"{doing}: {command[0]} is not installed", hint=f"install {package or command[0]}", reason="TOOL_MISSING"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(
            f"{doing}: {command[0]} did not end in {timeout:g} s, and was killed",
            hint="is the server or device reachable?", reason="TIMEOUT",
        ) from error  # fmt: skip
    if done.returncode not in accepted:
        said = " ".join((done.stderr or done.stdout).split())[-400:]
        raise NetstoreError(f"{doing}: {said or f'status {done.returncode}'}", reason="TOOL_FAILED", tool=command[0])
    return done.stdout
