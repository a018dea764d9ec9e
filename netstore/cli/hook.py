#!/usr/bin/python3 -IS
"""netstore hook STAGE: an OCI runtime's hook. Hands the container's state to netstored (netstore/adapters/oci).

It runs at the start and the end of every container that an engine gives it: it is a program of its own, too, takes only
modules that are built in, and asks nobody about containers that ask for nothing.
"""

import sys
from _socket import AF_UNIX, SHUT_WR, SOCK_STREAM, socket
from posix import O_APPEND, O_NOCTTY, O_WRONLY, fstat, getppid, open, read, write

__all__ = ["SOCKET", "USAGE", "main", "run"]

SOCKET = "/run/netstore/hook.sock"
USAGE = (
    "usage: netstore hook [--socket PATH] createRuntime|prestart|poststop, with a container's state on standard input"
)
_SECONDS = 120
_MARK = b"io.netstore."
_NULL_DEVICE = 0x103


def run(stage: str, path: str) -> int:
    """Carry a stage out for the container whose state is on standard input; returns the exit status."""
    body = b""
    while chunk := read(0, 1 << 20):
        body += chunk
    if _MARK not in body:
        return 0
    try:
        answer = _call(path, b"HOOK_COMMAND=%s\0\0" % stage.encode("utf-8", "surrogateescape") + body)
    except (OSError, ValueError) as error:
        answer = f"1netstored does not answer on {path}: {error}: is it running?".encode()
    if answer[:1] == b"0":
        return 0
    _tell(b"netstore: " + answer[1:] + b"\n")
    return 1


def _call(path: str, message: bytes) -> bytes:
    """Return netstored's answer: the exit status, one digit, and what is printed."""
    peer = socket(AF_UNIX, SOCK_STREAM)
    peer.settimeout(_SECONDS)
    peer.connect(path)
    peer.sendall(message)
    peer.shutdown(SHUT_WR)
    answer = b""
    while chunk := peer.recv(1 << 16):
        answer += chunk
    if not answer:
        raise OSError("it ended before it answered")
    return answer


def _tell(text: bytes) -> None:
    """Say it where the engine reads: crun gives its hooks no standard error, so that it is said on crun's own."""
    try:
        own = fstat(2).st_rdev != _NULL_DEVICE
        write(2 if own else open(f"/proc/{getppid()}/fd/2", O_WRONLY | O_APPEND | O_NOCTTY), text)
    except OSError:
        pass  # netstored's log has it


def main(words: list[str]) -> int:
    """Run the command line: [--socket PATH] STAGE."""
    path = SOCKET
    if words[:1] == ["--socket"]:
        path, words = words[1] if len(words) > 1 else "", words[2:]
    if len(words) != 1 or not path or words[0].startswith("-"):
        sys.stderr.write(f"{USAGE}\n")
        return 2
    return run(words[0], path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
