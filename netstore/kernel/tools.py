"""Programs of the distribution that do what has no system call: mkfs, fsck, mount helpers. Each can be killed, and is
when we are: nobody would know then what it still writes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress

from netstore.errors import NetstoreError, Unavailable, Unsupported

__all__ = ["leashed", "run_tool"]

_KILLED_SECONDS = 2
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# The signal comes when the thread ends that started it, which waits. Who finds us dead already does not begin.
_LEASH = ("setpriv", "--pdeathsig", "KILL", "sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"')


def leashed(command: Sequence[str]) -> list[str]:
    """Return a command that ends with us, however we end, run by the thread that starts it."""
    return [*_LEASH, str(os.getpid()), *command]


def run_tool(
    command: Sequence[str], doing: str, *, timeout: float = 120.0, environment: Mapping[str, str] | None = None,
    package: str = "", accepted: Sequence[int] = (0,), keep: Sequence[int] = (),
) -> str:  # fmt: skip
    """Run a program and return what it printed. `package` is named when it is not installed. With descriptors in
    `keep`, such as of a lock, it goes on when we are killed, and keeps them open until it ends.

    Raises:
        Unsupported: it is not installed.
        Unavailable: it did not end in `timeout` seconds, and was killed.
        NetstoreError: it failed; with what it said.
    """
    if shutil.which(command[0], path=_PATH) is None:
        raise Unsupported(
            f"{doing}: {command[0]} is not installed", hint=f"install {package or command[0]}", reason="TOOL_MISSING"
        )
    settings = {"PATH": _PATH, "LC_ALL": "C", **(environment or {})}
    process = subprocess.Popen(
        command if keep else leashed(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, errors="replace", env=settings, process_group=0, pass_fds=keep,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)  # its helpers too: mount.nfs would go on, and mount later
        with suppress(subprocess.TimeoutExpired):  # a kernel that waits for a device or server cannot be killed
            process.communicate(timeout=_KILLED_SECONDS)
        raise Unavailable(
            f"{doing}: {command[0]} did not end in {timeout:g} s, and was killed",
            hint="is the server or device reachable?", reason="TIMEOUT",
        ) from error  # fmt: skip
    if process.returncode not in accepted:
        said = " ".join((errors or output).split())[-400:]
        raise NetstoreError(f"{doing}: {said or f'status {process.returncode}'}", reason="TOOL_FAILED", tool=command[0])
    return output
