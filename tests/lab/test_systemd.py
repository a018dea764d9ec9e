"""The services as systemd runs them: from scripts/install to scripts/uninstall, on a machine of their own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def sh(command: str, *, timeout: float = 120) -> str:
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        journal = subprocess.run(["journalctl", "-b", "-n40", "--no-pager"], capture_output=True, text=True).stdout
        pytest.fail(f"{command}: {done.stdout}{done.stderr}\n{journal}")
    return done.stdout.strip()


def shows(unit: str, *properties: str) -> dict[str, str]:
    shown = sh(f"systemctl show {unit} -p {','.join(properties)}")
    return dict(line.split("=", 1) for line in shown.splitlines())


@pytest.fixture
def leaks() -> None:
    """The whole module is looked at, from before the installation to after it is taken away."""


@pytest.fixture(scope="module")
def services() -> Iterator[None]:
    sh(f"{ROOT}/scripts/install", timeout=280)
    yield
    sh(f"{ROOT}/scripts/uninstall --purge")


def test_started_in_order(services: object) -> None:
    resolver = shows(
        "netstore-resolver", "Type", "ActiveState", "ActiveEnterTimestampMonotonic", "NRestarts", "StatusText"
    )
    daemon = shows("netstored", "Type", "ActiveState", "ExecMainStartTimestampMonotonic", "NRestarts")
    assert resolver["ActiveState"] == daemon["ActiveState"] == "active"
    assert resolver["Type"] == daemon["Type"] == "notify"
    assert int(resolver["ActiveEnterTimestampMonotonic"]) <= int(daemon["ExecMainStartTimestampMonotonic"])
    assert resolver["NRestarts"] == daemon["NRestarts"] == "0"
    assert len(sh("pgrep netstore-resolv").split()) == 1
    sh("systemctl restart netstored && netstore system info")  # started is when it answers
    assert json.loads(sh("netstore system check --format json")) == []
    assert sh("stat -c '%U:%G %a' /run/netstore/netstore.sock") == "root:netstore 660"
