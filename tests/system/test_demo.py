"""The demos do what they claim."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("demo", ["scripts/demo", "examples/cluster-demo"])
def test_demo(demo: str) -> None:
    done = subprocess.run([ROOT / demo], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "FAILED" not in done.stdout
