"""Runs in a machine of tests/machines: commands come as lines of JSON on a virtio port, one at a time; so go answers."""

import json
import os
import subprocess
import time


def answer(command: str, seconds: float) -> dict[str, object]:
    """Run a command of bash and say how it ended."""
    try:
        done = subprocess.run(
            ["bash", "-ec", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return {"code": 124, "output": f"{error.stdout!r}: no end after {seconds} s"}
    return {"code": done.returncode, "output": done.stdout}


PORT = "/dev/virtio-ports/lab.agent"
while not os.path.exists(PORT):  # udevd is still at it
    time.sleep(0.1)
port = os.open(PORT, os.O_RDWR)
received = b""
while True:
    line, newline, rest = received.partition(b"\n")
    if not newline:
        if not (read := os.read(port, 1 << 16)):  # nobody is connected
            time.sleep(0.02)
        received += read
        continue
    received = rest
    try:
        asked = json.loads(line)
    except ValueError:  # half of one, from a caller that gave up
        continue
    said = memoryview(
        json.dumps({"number": asked["number"], **answer(asked["command"], asked["seconds"])}).encode() + b"\n"
    )
    while said:
        said = said[os.write(port, said) :]
