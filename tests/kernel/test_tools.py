"""Programs that netstored runs end with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import wait_until

from netstore.errors import NetstoreError, Unavailable, Unsupported
from netstore.kernel.tools import run_tool

WRITER = "import sys; from netstore.kernel.tools import run_tool; run_tool(['sh', '-c', sys.argv[1], 'x'], 'writing')"


def test_who_is_killed_leaves_nobody_writing(tmp_path: Path) -> None:
    """As mkfs would, on a device that the next start formats again."""
    pid = tmp_path / "pid"
    script = f"echo $$ > {pid}; while :; do echo more >> {tmp_path}/device; done"
    with subprocess.Popen([sys.executable, "-c", WRITER, script]) as worker:
        wait_until(lambda: (tmp_path / "device").exists(), what="the first write")
        worker.kill()
    tool = Path("/proc") / pid.read_text().strip() / "cmdline"

    def ended() -> bool:
        try:
            return not tool.read_bytes()  # a zombie's is empty
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_until(ended, what="its end")


def test_what_a_tool_says_is_told() -> None:
    assert run_tool(["echo", "a", "b"], "echoing") == "a b\n"
    with pytest.raises(NetstoreError, match="looking: cat: /nosuch: No such file") as caught:
        run_tool(["cat", "/nosuch"], "looking")
    assert (caught.value.reason, caught.value.metadata["tool"]) == ("TOOL_FAILED", "cat")
    with pytest.raises(Unsupported, match=r"making: mkfs\.nosuch is not installed: install nosuch-progs"):
        run_tool(["mkfs.nosuch"], "making", package="nosuch-progs")
    with pytest.raises(Unavailable, match="did not end in"):
        run_tool(["sleep", "30"], "waiting", timeout=0.1)
