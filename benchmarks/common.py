"""What the benchmarks share: timing, tables, and a netstored of their own."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc

from netstore.client import BlockingClient as Client

__all__ = ["BIN", "dockerd", "figure", "measure", "percentile", "resident", "sh", "show", "start_netstore"]

BIN = Path(sys.executable).parent


def measure(work: Callable[[int], object], count: int) -> list[float]:
    """Return how long each of `count` calls took, in milliseconds."""
    times = []
    for index in range(count):
        started = time.perf_counter()
        work(index)
        times.append((time.perf_counter() - started) * 1e3)
    return times


def show(name: str, times: list[float], note: str = "") -> float:
    """Print p50, least and p95 of a series; returns p50."""
    p50 = statistics.median(times)
    p95 = sorted(times)[int(len(times) * 0.95)]
    print(f"{name:<52}{p50:>9.2f}{min(times):>9.2f}{p95:>9.2f}  {note}", flush=True)
    return p50


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of all are below."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def figure(
    name: str, value: float, unit: str, *, most: float | None = None, least: float | None = None, note: str = ""
) -> None:
    """Print one figure, and whether it is within what is to hold."""
    target = "" if most is None else f"to hold: at most {most:g}"
    target += "" if least is None else f"to hold: at least {least:g}"
    within = (most is None or value <= most) and (least is None or value >= least)
    verdict = "" if not target else f"{target}: {'held' if within else 'NOT HELD'}"
    print(f"{name:<60}{value:>10.2f} {unit:<6}{'  '.join(each for each in (verdict, note) if each)}", flush=True)


def resident(pid: int) -> float:
    """Return the memory of a process, in MB (VmRSS)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def sh(command: str) -> None:
    """Run a shell command that must succeed."""
    subprocess.run(command, shell=True, check=True, capture_output=True)


def start_netstore(place: Path, config: str = "") -> Client:
    """Start netstore-resolver and netstored below a directory, with more configuration, and return a client."""
    paths = ["--state-dir", str(place / "state"), "--run-dir", str(place / "run")]
    (place / "netstored.toml").write_text(
        f"[resolver]\nmanage = false\n{config}"
    )  # it has to be there before we measure
    for name, flags in (("netstore-resolver", []), ("netstored", ["--config", place / "netstored.toml"])):
        subprocess.Popen([BIN / name, *flags, *paths], stderr=(place / f"{name}.log").open("w"))
    client = Client(f"unix://{place}/run/netstore.sock")
    for _ in range(100):
        if (place / "run/netstore.sock").exists():
            break
        time.sleep(0.05)
    grpc.channel_ready_future(client.channel).result(timeout=20)
    return client


@contextmanager
def dockerd(place: Path) -> Iterator[str]:
    """Run Debian's dockerd below a directory, and yield the command that talks to it."""
    address = f"unix://{place}/docker.sock"
    daemon = subprocess.Popen(
        ["dockerd", "-H", address, "--data-root", place / "docker", "--exec-root", place / "docker-run", "--pidfile",
         place / "docker.pid", "--storage-driver", "vfs"], stderr=(place / "dockerd.log").open("w"),
    )  # fmt: skip
    tool = f"docker -H {address}"
    try:
        for _ in range(100):
            if subprocess.run(f"{tool} version", shell=True, capture_output=True).returncode == 0:
                break
            time.sleep(0.2)
        yield tool
    finally:
        daemon.terminate()
        daemon.wait(timeout=30)
