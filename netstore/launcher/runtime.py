"""The OCI runtime (crun, or runc) under conmon, which holds the log and the exit status and outlives us.

This is the one place where the runtime's words become our errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from netstore.errors import FailedPrecondition, NetstoreError, Unavailable

__all__ = ["Process", "Runtime", "is_alive", "open_reader", "start_time", "wait_for_exit"]

log = structlog.get_logger(__name__)

_CREATE_SECONDS = 30.0
_NOT_FOUND = re.compile(r"executable file|exec: \".*no such file|open executable: No such file", re.I)
_NOT_EXECUTABLE = re.compile(
    r"exec.*(permission denied|format error|is a directory)|open executable: Operation not permitted", re.I
)  # the last is what crun says of a directory


# Where cgroup v1 and v2 are both mounted crun refuses to make a container: this hides the second from it, in a mount
# namespace of its own (not conmon's, which would keep every mount of the host busy).
_HIDING = [
    "unshare", "--mount", "--propagation", "private",
    "sh", "-c", 'umount /sys/fs/cgroup/unified && exec "$0" "$@"',
]  # fmt: skip
# The same for a container whose mounts propagate: only what is above the hidden one is made private.
_HIDING_OPENLY = [
    "unshare", "--mount", "--propagation", "unchanged",
    "sh", "-c", 'mount --make-private /sys/fs/cgroup && umount /sys/fs/cgroup/unified && exec "$0" "$@"',
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Process:
    """A container's main process and its supervisor; the start time (clock ticks) tells it from a pid's next owner."""

    pid: int
    supervisor_pid: int
    supervisor_start: int


class Runtime:
    """Starts containers. `run_dir` is where its own state, exit codes and pid files are."""

    def __init__(self, path: str, version: str, run_dir: Path, *, hidden: bool) -> None:
        self._path = path
        unshare = shutil.which("unshare") or "unshare"
        self._creator = [unshare, *_HIDING[1:], path] if hidden else [path]
        self._open_creator = [unshare, *_HIDING_OPENLY[1:], path] if hidden else [path]
        self._conmon = shutil.which("conmon") or "conmon"
        self._root = run_dir / "runtime"
        self._exits = run_dir / "exits"
        self.version = version

    @staticmethod
    async def detect(run_dir: Path) -> Runtime | None:
        """Return crun, or runc where there is no crun; None when either that or conmon is missing."""
        if not shutil.which("conmon"):
            return None
        for name in ("crun", "runc"):
            path = shutil.which(name)
            if path is None:
                continue
            version = (await _output([path, "--version"])).splitlines()[0]
            hidden = name == "crun" and _hybrid()
            runtime = Runtime(path, version.replace(" version", ""), run_dir, hidden=hidden)
            runtime._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            runtime._exits.mkdir(parents=True, exist_ok=True, mode=0o700)
            return runtime
        return None

    async def create(
        self, container_id: str, bundle: Path, log_path: Path, *, streams: Sequence[str] = (), propagates: bool = False
    ) -> Process:
        """Create a container from a bundle, its process waiting to be started. `streams` is what conmon is told of its
        terminal and input. With `propagates` mounts of the host reach it, as its bundle says.

        Raises:
            FailedPrecondition: with metadata exit_code 126 or 127 when the command cannot be run.
            NetstoreError: the runtime refused.
        """
        self.exit_path(container_id).unlink(missing_ok=True)
        pid_file, conmon_pid_file = bundle / "pid", bundle / "conmon.pid"
        read_end, write_end = os.pipe()
        creator = self._open_creator if propagates else self._creator
        command = [
            self._conmon, "--api-version", "1", "--cid", container_id, "--cuuid", container_id, "--name", container_id,
            "--runtime", creator[0], *(f"--runtime-arg={each}" for each in creator[1:]),
            "--bundle", str(bundle), "--container-pidfile", str(pid_file),
            "--conmon-pidfile", str(conmon_pid_file), "--exit-dir", str(self._exits),
            "--log-path", f"k8s-file:{log_path}", "--log-level", "error",
            "--runtime-arg", f"--root={self._root}", "--full-attach", "--socket-dir-path", str(bundle),
            *streams,
        ]  # fmt: skip
        try:
            os.set_inheritable(write_end, True)
            environment = {**os.environ, "_OCI_SYNCPIPE": str(write_end)}
            process = await asyncio.create_subprocess_exec(
                *command, pass_fds=(write_end,), env=environment, start_new_session=True,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
        finally:
            os.close(write_end)
        answer = await _sync(read_end)
        await process.wait()
        pid = int(answer.get("data", -1))
        if pid <= 0:
            raise _mapped(str(answer.get("message") or "conmon gave no reason"), "creating", container_id)
        supervisor = int(conmon_pid_file.read_text())
        return Process(pid, supervisor, start_time(supervisor))

    async def start(self, container_id: str) -> None:
        """Start a created container's process."""
        await self._call("start", container_id)

    async def delete(self, container_id: str) -> None:
        """Remove what the runtime keeps of a container, killing what is left; one that is gone is a success."""
        if (self._root / container_id).exists():
            await self._call("delete", "--force", container_id)
        self.exit_path(container_id).unlink(missing_ok=True)
        await asyncio.to_thread(_remove_empty_cgroups)

    def exec(self, container_id: str, process_file: Path, pid_file: Path, *, log: Path | None = None) -> list[str]:
        """Return the command line that runs a further process in a container; with a `log` of what goes wrong it ends
        once that runs.
        """
        return [
            *self._creator, f"--root={self._root}", *([f"--log={log}"] if log else []), "exec",
            *(["--detach"] if log else []), "--process", str(process_file), "--pid-file", str(pid_file), container_id,
        ]  # fmt: skip

    def exit_path(self, container_id: str) -> Path:
        """Return where conmon writes the exit code."""
        return self._exits / container_id

    def exit_code(self, container_id: str) -> int | None:
        """Return how a container's process ended, None when conmon did not say."""
        try:
            return int(self.exit_path(container_id).read_text())
        except (FileNotFoundError, ValueError):
            return None

    async def _call(self, *args: str) -> None:
        process = await asyncio.create_subprocess_exec(
            self._path, f"--root={self._root}", *args,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, errors = await process.communicate()
        if process.returncode:
            raise _mapped(errors.decode(errors="replace"), f"{args[0]}ing", args[-1])


def _remove_empty_cgroups() -> None:
    """Remove the groups above containers, in each hierarchy, when no container is left in them."""
    for parent in (*Path("/sys/fs/cgroup").glob("*/netstore"), Path("/sys/fs/cgroup/netstore")):
        with contextlib.suppress(OSError):  # there is none, or another container is in it
            parent.rmdir()


def failure(text: str) -> int:
    """Return the exit status that docker run gives a command that cannot be run, 0 for another failure."""
    if _NOT_EXECUTABLE.search(text):
        return 126
    return 127 if _NOT_FOUND.search(text) else 0


def _mapped(text: str, doing: str, container_id: str) -> NetstoreError:
    message = text.strip().splitlines()[-1] if text.strip() else "no reason given"
    with contextlib.suppress(ValueError, TypeError):
        message = json.loads(message)["msg"]
    code = failure(message)
    if code:
        return FailedPrecondition(
            f"the command cannot be run: {message}", hint="check the command, the entrypoint and the image",
            reason="COMMAND_NOT_FOUND" if code == 127 else "COMMAND_NOT_EXECUTABLE", exit_code=code,
        )  # fmt: skip
    return NetstoreError(f"{doing} container {container_id[:12]}: {message}", reason="RUNTIME")


def _hybrid() -> bool:
    """Say whether cgroup v1 and v2 are both mounted."""
    return Path("/sys/fs/cgroup/unified/cgroup.controllers").exists()


async def _output(command: list[str]) -> str:
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    return output.decode() or "?"


async def open_reader(descriptor: int) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
    """Return a reader of a pipe or terminal, and what closes it; the descriptor is theirs from now on."""
    reader = asyncio.StreamReader()
    file = os.fdopen(descriptor, "rb", buffering=0)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), file
    )
    return reader, transport


async def _sync(read_end: int) -> dict[str, Any]:
    """Read conmon's one line about the container's process, without blocking the loop."""
    reader, transport = await open_reader(read_end)
    try:
        async with asyncio.timeout(_CREATE_SECONDS):
            line = await reader.readline()
        return json.loads(line) if line else {}
    except TimeoutError as error:
        raise Unavailable(f"conmon gave no answer in {_CREATE_SECONDS:.0f} s", hint="try again") from error
    except ValueError:
        return {}
    finally:
        transport.close()


def start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 when there is none (proc_pid_stat(5), field 22)."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0


def is_alive(pid: int, started: int) -> bool:
    """Say whether the process of that pid and start time still runs."""
    return pid > 0 and start_time(pid) == started != 0


async def wait_for_exit(pid: int, started: int) -> None:
    """Return when a process has ended, told by its pidfd (pidfd_open(2))."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    try:
        if not is_alive(pid, started):
            return
        loop.add_reader(descriptor, ended.set)
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def send_signal(pid: int, number: signal.Signals) -> bool:
    """Signal a process; False when it has ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
