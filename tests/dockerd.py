"""Debian's dockerd, for tests beside it and with it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Host, wait_until

PEERS = Path(__file__).parents[1] / ".peers"
PATH = f"{PEERS}/usr/sbin:{PEERS}/usr/bin:{os.environ['PATH']}"
PYTHON = ":".join(f"{PEERS}/usr/lib/{each}" for each in ("python3/dist-packages", "python3.11"))
NEEDS_COMPOSE = pytest.mark.skipif(
    not (PEERS / "usr/bin/docker-compose").exists(),
    reason="no docker-compose: scripts/peers docker-compose fetches it, as scripts/test does",
)
NEEDS_DOCKERD = pytest.mark.skipif(
    not shutil.which("dockerd", path=PATH),
    reason="no dockerd: scripts/peers docker.io fetches it, as scripts/test does",
)


class Docker:
    """Debian's dockerd in a host, and its command."""

    def __init__(self, host: Host, place: Path) -> None:
        self.host, self.place = host, place
        place.mkdir()
        self.spawn()
        self.wait()

    def spawn(self) -> None:
        place = self.place
        command = ["env", f"PATH={PATH}", "dockerd", "-H", f"unix://{place}/s", "--data-root", f"{place}/data", "--exec-root", f"{place}/exec",
                   "--pidfile", f"{place}/pid", "--storage-driver", "vfs"]  # fmt: skip
        with (place / "log").open("a") as log:
            self.daemon = subprocess.Popen(self.host.command(*command), stderr=log)

    def wait(self) -> None:
        wait_until(lambda: self(("version",), check=False).returncode == 0, seconds=20, what="dockerd")

    def __call__(self, args: tuple[str, ...], *, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.host.run("env", f"PATH={PATH}", "docker", "-H", f"unix://{self.place}/s", *args, check=check)

    def out(self, *args: str) -> str:
        return self(args).stdout.strip()

    def compose(self, directory: Path, *args: str) -> str:
        """Run Debian's docker-compose in a directory with its file; its project is called after the directory."""
        settings = [f"DOCKER_HOST=unix://{self.place}/s", f"PYTHONPATH={PYTHON}", "COMPOSE_INTERACTIVE_NO_CLI=1",
                    f"LD_LIBRARY_PATH={PEERS}/usr/lib/x86_64-linux-gnu"]  # fmt: skip
        program = ["/usr/bin/python3", "-W", "ignore", str(PEERS / "usr/bin/docker-compose")]
        done = self.host.run("env", *settings, *program, "--project-directory", str(directory), "-f",
                             f"{directory}/docker-compose.yml", *args, timeout=90)  # fmt: skip
        return done.stdout.strip()

    def stop(self) -> None:
        containers = self(("ps", "-aq"), check=False).stdout.split()
        self(("rm", "-f", *containers), check=False)
        self.end()

    def end(self) -> None:
        self.daemon.terminate()
        self.daemon.wait(timeout=30)
