"""Mounts: the overlay of a kernel before 6.8 makes the same filesystem as the newer one's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import Host

CODE = """
import os, sys
from pathlib import Path
from netstore.kernel import mounts
make = getattr(mounts, sys.argv[2])
place = Path(sys.argv[1])
for name in ("top", "bottom", "diff", "work", "root"):
    (place / name).mkdir()
(place / "bottom/file").write_text("bottom")
(place / "top/file").write_text("top")
(place / "bottom/other").write_text("other")
mount = make([place / "top", place / "bottom"], place / "diff", place / "work")
assert not mounts.is_mount_point(place / "root")
mounts.attach(mount, place / "root")
assert mounts.is_mount_point(place / "root")
(place / "root/new").write_text("new")
print((place / "root/file").read_text(), (place / "root/other").read_text(), (place / "diff/new").read_text())
os.close(mount)
mounts.unmount(place / "root")
print(sorted(os.listdir(place)), mounts.is_mount_point(place / "root"))
"""


def test_both_ways_to_stack_layers(host: Host, place: Path) -> None:
    printed = {}
    for way in ("overlay", "_overlay_by_page"):
        (place / way).mkdir()
        command = host.command(sys.executable, "-c", CODE, str(place / way), way)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        printed[way] = done.stdout + done.stderr
    assert set(printed.values()) == {"top other new\n['bottom', 'diff', 'root', 'top', 'work'] False\n"}, printed
