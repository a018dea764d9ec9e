"""The command `netstore` at the cost of a fork: a process that has imported it carries out thousands of them.

Each is still a process of its own, in the namespaces of its host, with its arguments, environment, streams and exit status.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from typing import Any, NoReturn

__all__ = ["run"]

_LONGEST = 100_000  # bytes of a request; an environment and arguments that are longer start a Python of their own


def run(
    holder: int, command: list[str], *, stdin: str | None, timeout: float
) -> subprocess.CompletedProcess[str] | None:
    """Carry out a command of netstore's in the network and mount namespace of a process; None when it is too long.

    Raises:
        subprocess.TimeoutExpired: it did not end in so many seconds, and was killed.
    """
    request = json.dumps({"holder": holder, "command": command, "environment": dict(os.environ)}).encode()
    if len(request) > _LONGEST:
        return None
    ours, theirs = socket.socketpair()
    files = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]
    try:
        os.pwrite(files[0], (stdin or "").encode(), 0)
        with theirs:
            socket.send_fds(_started(), [request], [theirs.fileno(), *files])
        with ours, ours.makefile("rb") as answers:
            ours.settimeout(timeout)
            pid = int(answers.readline())
            try:
                code = int(answers.readline() or -signal.SIGKILL)
            except TimeoutError as error:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(command, timeout) from error
        texts = [os.pread(file, os.fstat(file).st_size, 0).decode() for file in files[1:]]
    finally:
        for file in files:
            os.close(file)
    return subprocess.CompletedProcess(command, code, *texts)


@functools.cache
def _started() -> socket.socket:
    """Return the way to the process, which ends with this one."""
    port, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()])

    def end() -> None:
        port.close()
        process.wait()

    atexit.register(end)
    return port


def _serve(port: socket.socket) -> None:
    from netstore.cli import container, endpoint, image, main, network, volume  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that ended need nobody
    while True:
        request, files, _, _ = socket.recv_fds(port, _LONGEST, 4)
        if not request:
            return
        if os.fork() == 0:
            port.close()
            _carry_out(json.loads(request), files)
        for file in files:
            os.close(file)


def _carry_out(request: dict[str, Any], files: list[int]) -> NoReturn:
    code: object = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.write(files[0], b"%d\n" % os.getpid())
        for number, file in enumerate(files[1:]):
            os.dup2(file, number)
        _enter(request["holder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = request["command"]
        from netstore.cli.entry import main

        main()
        code = 0
    except SystemExit as ended:
        code = 0 if ended.code is None else ended.code
        if not isinstance(code, int):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(files[0], b"%d\n" % (code if isinstance(code, int) else 1))
        os._exit(0)


def _enter(holder: int) -> None:
    namespaces = [os.open(f"/proc/{holder}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in ("net", "mnt")]
    libc = ctypes.CDLL(None, use_errno=True)
    for namespace in namespaces:
        if libc.setns(namespace, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(namespace)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
