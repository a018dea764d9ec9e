"""The README's first command does what it claims."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(180)
def test_demo() -> None:
    done = subprocess.run([ROOT / "scripts/demo"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "FAILED" not in done.stdout
