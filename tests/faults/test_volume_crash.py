"""kill -9 at the steps of everything that makes or changes a volume's data: afterwards it is whole or absent.

A step is a system call that changes something that lasts. strace(1) holds netstored for a moment after each; it is killed
after the n-th, started again, and looked at. NETSTORE_TEST_CRASH_STEPS says at how many steps, spread over all [2].
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import BIN, Node

TRIES = int(os.environ.get("NETSTORE_TEST_CRASH_STEPS", "2"))
_STEPS = (
    "mkdir,rename,renameat2,unlink,unlinkat,rmdir,ftruncate,fallocate,fsync,fdatasync,syncfs,mount,umount2,ioctl,"
    "copy_file_range,sendfile,symlinkat,mkdirat,linkat,fchownat"
)


class Steps:
    """Counts the steps of a netstored, and kills it after one of them."""

    def __init__(self, pid: int, *, kill_at: int = 0) -> None:
        self.count = 0
        self._pid = pid
        self._kill_at = kill_at
        flags = ["-f", "-q", "-e", f"trace={_STEPS}", "-e", f"inject={_STEPS}:delay_exit=3000", "-e", "signal=none"]
        self._strace = subprocess.Popen(["strace", *flags, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
        assert self._strace.stderr
        self._attached = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(self._strace.stderr,))
        self._reader.start()
        # It says nothing with -q: its first look at the tracee shows that it is there.
        while f"TracerPid:\t{self._strace.pid}" not in Path(f"/proc/{pid}/status").read_text():
            threading.Event().wait(0.01)

    def _read(self, lines: object) -> None:
        for line in lines:  # type: ignore[attr-defined]
            if "resumed>" in line or "(" not in line or "LOOP_GET_STATUS64" in line:
                continue
            self.count += 1
            if self.count == self._kill_at:
                os.kill(self._pid, 9)

    def close(self) -> None:
        if self._strace.poll() is None:
            self._strace.terminate()
        self._strace.wait()
        self._reader.join()
        assert self._strace.stderr
        self._strace.stderr.close()


def fill(root: Path, text: str) -> None:
    for index in range(12):
        (root / f"d{index % 3}").mkdir(exist_ok=True)
        (root / f"d{index % 3}" / f"f{index}").write_text(text * 3000)


def shown(node: Node, volume: str) -> set[str]:
    """Look into a volume, staged for it."""
    place = Path(node.out("volume", "stage", volume, "looking"))
    found = node.host.run(
        "sh", "-c", f"cd {place} && find . -type f -name 'f*' -exec head -c 3 {{}} \\; -exec echo \\;"
    ).stdout
    node.cli("volume", "unstage", volume, "looking")
    lines = found.split()
    return set(lines) | {f"{len(lines)} files"}


def leftovers(node: Node) -> list[str]:
    """Parts of copies that lie about."""
    volumes = node.place / "state/volumes"
    names = ("draft", "freezing")
    return [
        str(path)
        for path in volumes.rglob("*")
        if path.name in names or (path.parent.name == "snapshots" and path.name[0] == ".")
    ]


def into(node: Node, volume: str, text: str) -> None:
    place = Path(node.out("volume", "stage", volume, "filling"))
    source = node.place / f"tree-{text}"
    source.mkdir(exist_ok=True)
    fill(source, text)
    node.cli("volume", "cp", f"{source}/.", f"{volume}:/")
    node.host.run("sync", "-f", str(place))
    node.cli("volume", "unstage", volume, "filling")


IMAGE = ["-d", "image", "--size", "16M"]


def with_data(*flags: str) -> Callable[[Node], None]:
    def prepare(node: Node) -> None:
        node.cli("volume", "create", *flags, "v")
        into(node, "v", "new")
        node.cli("volume", "snapshot", "create", "v", "s")
        into(node, "v", "old")

    return prepare


def nothing(node: Node) -> None:
    pass


def small(node: Node) -> None:
    node.cli("volume", "create", *IMAGE, "v")
    into(node, "v", "old")


def used(node: Node) -> None:
    small(node)
    node.cli("volume", "stage", "v", "someone")


def archive(node: Node) -> None:
    small(node)
    node.cli("volume", "export", "v", "-o", str(node.place / "v.tar.zst"))


def check_made(node: Node) -> None:
    if node.out("volume", "ls", "-q"):
        assert node.out("volume", "inspect", "-f", "{{.Status.State}}", "v") == "VOLUME_STATE_ACTIVE"
        assert shown(node, "v") == {"0 files"}


def check_grown(node: Node) -> None:
    assert shown(node, "v") == {"old", "12 files"}
    size = int(node.out("volume", "inspect", "-f", "{{.Spec.SizeBytes}}", "v"))
    image = next((node.place / "state/volumes/image").glob("*/image"))
    assert size in (16 << 20, 32 << 20)
    assert image.stat().st_size == size
    assert "nothing wrong" in node.out("volume", "verify", "v")


def check_snapshot(node: Node) -> None:
    place = node.out("volume", "inspect", "-f", "{{.Status.Mountpoint}}", "v")
    node.host.run("timeout", "5", "touch", f"{place}/thawed")
    if node.out("volume", "snapshot", "ls", "-q"):
        assert "nothing wrong" in node.out("volume", "verify", "v@t")
    else:
        assert not list((node.place / "state/volumes/image").glob("*/snapshots/*"))


def check_restored(node: Node) -> None:
    assert shown(node, "v") in ({"old", "12 files"}, {"new", "12 files"})
    assert node.out("volume", "snapshot", "ls", "-q") == "v@s"


def check_copy(node: Node) -> None:
    assert shown(node, "v") == {"old", "12 files"}
    if "copy" in node.out("volume", "ls", "-q").split():
        assert shown(node, "copy") == {"old", "12 files"}
    else:
        assert (
            len(list((node.place / "state/volumes").glob("*/*/")))
            - len(list((node.place / "state/volumes").glob("*/.*/")))
            == 1
        )


def check_removed(node: Node) -> None:
    if node.out("volume", "ls", "-q"):
        assert shown(node, "v") == {"old", "12 files"}


OPERATIONS = {
    "create": (nothing, ["volume", "create", *IMAGE, "v"], check_made),
    "grow": (small, ["volume", "update", "v", "--size", "32M"], check_grown),
    "snapshot": (used, ["volume", "snapshot", "create", "v", "t"], check_snapshot),
    "restore-image": (with_data(*IMAGE), ["volume", "snapshot", "restore", "v@s"], check_restored),
    "restore-local": (with_data(), ["volume", "snapshot", "restore", "v@s"], check_restored),
    "clone": (small, ["volume", "clone", "v", "copy"], check_copy),
    "clone-to-local": (small, ["volume", "clone", "v", "copy", "-d", "local"], check_copy),
    "import": (archive, ["volume", "import", "copy", "{place}/v.tar.zst"], check_copy),
    "rm": (small, ["volume", "rm", "v"], check_removed),
}


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace(1): scripts/setup installs it")
@pytest.mark.timeout(240)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_its_steps_a_volume_is_whole_or_absent(node: Node, operation: str) -> None:
    prepare, command, check = OPERATIONS[operation]
    prepare(node)
    node.stop()
    shutil.copytree(node.place / "state", node.place / "before", symlinks=True)
    total = run(node, command, 0)
    check(node)
    done = max(total, 1)
    assert done >= 4, f"{operation} has {total} steps: strace sees nothing"
    for step in sorted({1 + index * done // TRIES for index in range(TRIES)}):
        node.stop()
        node.host.sh(f"grep -o '{node.place}/state/[^ ]*' /proc/self/mountinfo | sort -ru | xargs -r -n 1 umount")
        for path in ("state", "run"):
            shutil.rmtree(node.place / path)
        shutil.copytree(node.place / "before", node.place / "state", symlinks=True)
        run(node, command, step)
        assert node.out("system", "check") == "kernel and store agree", f"{operation} killed at {step} of {total}"
        assert leftovers(node) == [], f"{operation} killed at {step} of {total}"
        check(node)
    for holder in ("someone", "looking"):
        if "v" in node.out("volume", "ls", "-q").split():
            node.cli("volume", "unstage", "v", holder)


def run(node: Node, command: list[str], kill_at: int) -> int:
    """Run a command, and kill netstored after a step of it (0: never), then start it again; returns the steps."""
    node.start_resolver()
    node.start()
    assert node.daemon
    words = [word.format(place=node.place) for word in command]
    steps = Steps(node.daemon.pid, kill_at=kill_at)
    try:
        shell = node.host.command(str(BIN / "netstore"), "-H", node.address, *words)
        process = subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if kill_at:
            try:
                node.daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:  # it had fewer steps this time: it is done
                node.kill()
            process.kill()
        said = process.communicate(timeout=30)[0]
        assert kill_at or process.returncode == 0, said
    finally:
        steps.close()
    if kill_at:
        node.start()
    return steps.count


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
