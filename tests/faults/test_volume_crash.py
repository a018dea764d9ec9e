"""kill -9 at every step of what makes or changes a volume's data; and a disk that fills: whole or absent."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BIN, Host, Node

STEPS = Path(__file__).with_name("volume_steps.py")
# At how many steps each operation is killed, at least.
LEAST = {
    "create": 7, "create-local": 6, "grow": 4, "snapshot": 10, "restore-image": 6, "restore-local": 20, "clone": 8,
    "import": 20, "rm": 2,
}  # fmt: skip


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace(1): scripts/setup installs it")
@pytest.mark.timeout(300)
def test_killed_at_each_step_a_volume_is_whole_or_absent(host: Host, place: Path) -> None:
    (place / "steps").mkdir()
    done = host.run(sys.executable, str(STEPS), str(place / "steps"), timeout=290, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: int(count) for name, count in (line.split() for line in done.stdout.splitlines())}
    print(found)
    assert found.keys() == LEAST.keys()
    assert all(found[name] >= least for name, least in LEAST.items())


def check_reserve(node: Node, state: Path) -> None:
    """It is told when a sparse image may lose what is written to it, and when that is over."""
    node.cli("volume", "create", "-d", "image", "--size", "64M", "-o", "sparse=true", "thin")
    fill = f"fallocate -l $(($(stat -f -c '%a*%S' {state}) - 1000000)) {state}/fat"
    for action, change in (("space-low", fill), ("space-enough", f"rm {state}/fat")):
        node.host.sh(change)
        node.cli("volume", "update", "thin", "--keep", "1" if action == "space-low" else "2")  # wakes who looks
        events = ["system", "events", "--since", "0", "--filter", f"action={action}"]
        watch = node.host.command(str(BIN / "netstore"), "-H", node.address, *events)
        with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as told:
            assert told.stdout
            assert "thin" in told.stdout.readline()
            told.terminate()
        health = node.out("volume", "inspect", "-f", "{{.Status.Message}}", "thin")
        assert ("nearly full" in health) == (action == "space-low")
    assert node.out("volume", "trim", "thin").startswith("thin: ")
    node.cli("volume", "rm", "thin")


def test_a_full_disk_leaves_what_there_was(node: Node) -> None:
    """The state directory is on a filesystem of its own, that fills."""
    node.stop()
    disk, state = node.place / "disk", node.place / "state"
    with disk.open("wb") as file:
        file.truncate(96 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", disk], check=True)
    shutil.rmtree(state)
    state.mkdir(mode=0o711)
    script = f"d=$(losetup -f --show {disk}) && mount $d {state} && losetup -d $d"
    node.host.sh(script)
    node.start_resolver()
    node.start()
    node.cli("volume", "create", "v")
    place = node.out("volume", "inspect", "-f", "{{.Status.Mountpoint}}", "v")
    node.host.sh(f"head -c 30000000 /dev/urandom > {place}/file; echo kept > {place}/small")
    node.cli("volume", "export", "v", "-o", str(node.place / "v.tar.zst"))
    node.cli("volume", "snapshot", "create", "v", "s")
    before = node.host.sh(f"find {state}/volumes -mindepth 2 -not -name .removed | sort")
    refused = {
        "clone": ["volume", "clone", "v", "copy"],
        "snapshot": ["volume", "snapshot", "create", "v", "t"],
        "restore": ["volume", "snapshot", "restore", "v@s"],
        "create": ["volume", "create", "-d", "image", "--size", "64M", "i"],
        "import": ["volume", "import", "copy", str(node.place / "v.tar.zst")],
    }
    for name, command in refused.items():
        done = node.cli(*command, check=False)
        assert done.returncode == 1, name
        assert "no space" in done.stderr or "no room" in done.stderr, f"{name}: {done.stderr}"
        assert node.host.sh(f"find {state}/volumes -mindepth 2 -not -name .removed | sort") == before, name
    assert node.out("volume", "ls", "-q") == "v"
    assert node.host.sh(f"cat {place}/small") == "kept\n"
    check_reserve(node, state)
    assert node.out("system", "check") == "kernel and store agree"
    node.cli("volume", "rm", "v")
    node.stop()
    node.host.sh(f"umount {state}")
    shutil.rmtree(node.place / "run")
    node.start_resolver()
    node.start()
