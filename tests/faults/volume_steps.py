"""Run inside a private mount namespace by test_volume_crash.py: `volume_steps.py PLACE`.

Plays each operation of the volume manager again and again, on a copy of the same state directory, killed by SIGKILL
before its first, second, … step; what the next start makes of it is looked at. A step is a system call that changes what
lasts. A round is a fork, so that nothing is imported twice; what blocks runs in one thread of it, and strace(1) kills
that thread as it enters the step. Prints at how many steps each operation was killed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from netstore.errors import NetstoreError
from netstore.kernel.filesystems import mount, mounts_below, unmount_all
from netstore.kernel.tools import run_tool
from netstore.model import VolumeSpec
from netstore.store import Store
from netstore.volumes.archives import Archives, Wanted
from netstore.volumes.manager import VolumeManager

STEPS = (
    "mkdir,rename,renameat2,unlink,unlinkat,rmdir,ftruncate,truncate,fallocate,fsync,fdatasync,syncfs,mount,umount2,"
    "ioctl,copy_file_range,sendfile,symlinkat,mkdirat,linkat,fchownat,vfork"
)
PLACE = Path(sys.argv[1])
STATE, BEFORE, LOG = PLACE / "state", PLACE / "before", PLACE / "strace"
MIB = 1 << 20
IMAGE = VolumeSpec(driver="image", size_bytes=8 * MIB)
Work = Callable[[VolumeManager], Awaitable[object]]


def beginning(path: str) -> str:
    with open(path) as file:
        return file.read(3)


async def content(volumes: VolumeManager, name: str) -> set[str]:
    """Look into a volume, staged for it: the beginnings of its files, and how many there are."""
    place = (await volumes.stage(name, "looking"))[0].mountpoint
    files = [os.path.join(directory, name) for directory, _, names in os.walk(place) for name in names]
    found = {beginning(path) for path in files} | {f"{len(files)} files"}
    await volumes.unstage(name, "looking")
    return found


async def into(volumes: VolumeManager, text: str) -> None:
    place = Path((await volumes.stage("v", "filling"))[0].mountpoint)
    for index in range(6):
        (place / f"d{index % 2}").mkdir(exist_ok=True)
        (place / f"d{index % 2}" / f"f{index}").write_text(text * 3000)
    await volumes.unstage("v", "filling")


def with_data(spec: VolumeSpec) -> Work:
    async def prepare(volumes: VolumeManager) -> None:
        await volumes.create("v", spec, labels={})
        await into(volumes, "new")
        await volumes.snapshots.create("v", "s", labels={})
        await into(volumes, "old")

    return prepare


async def nothing(_: VolumeManager) -> None:
    pass


async def small(volumes: VolumeManager) -> None:
    await volumes.create("v", IMAGE, labels={})
    await into(volumes, "old")


async def used(volumes: VolumeManager) -> None:
    await small(volumes)
    await volumes.stage("v", "someone")


async def archive(volumes: VolumeManager) -> None:
    await small(volumes)
    with (PLACE / "v.tar").open("wb") as file:
        async for part in Archives(volumes, STATE).export("v", "", level=1):
            if isinstance(part, bytes):
                file.write(part)


async def import_archive(volumes: VolumeManager) -> None:
    async def chunks() -> AsyncIterator[bytes | str]:
        yield (PLACE / "v.tar").read_bytes()
        yield ""

    wanted = Wanted(name="copy", spec=IMAGE, labels={}, upload_id="one")
    await Archives(volumes, STATE).import_volume(wanted, 0, chunks())


async def names(volumes: VolumeManager) -> list[str]:
    return [volume.name for volume, _ in await volumes.all()]


async def check_made(volumes: VolumeManager) -> None:
    if await names(volumes):
        assert await content(volumes, "v") == {"0 files"}


async def check_grown(volumes: VolumeManager) -> None:
    assert await content(volumes, "v") == {"old", "6 files"}
    volume, _ = await volumes.get("v")
    image = next(STATE.glob("volumes/image/*/image"))
    assert volume.spec.size_bytes in (8 * MIB, 16 * MIB)
    assert image.stat().st_size == volume.spec.size_bytes
    run_tool(["e2fsck", "-fn", str(image)], "checking")
    place = Path((await volumes.stage("v", "looking"))[0].mountpoint)
    held = os.statvfs(place).f_blocks * os.statvfs(place).f_frsize
    assert (held > 10 * MIB) == (volume.spec.size_bytes == 16 * MIB)
    await volumes.unstage("v", "looking")


async def check_snapshot(volumes: VolumeManager) -> None:
    volume, _ = await volumes.get("v")
    run_tool(["touch", f"{volume.mountpoint}/thawed"], "writing", timeout=5)
    if await volumes.snapshots.all("v"):
        await volumes.filling.clone("v", "t", "look", None, labels={}, request_id="")
        assert await content(volumes, "look") == {"old", "6 files"}
    else:
        assert not list(STATE.glob("volumes/image/*/snapshots/*"))
    await volumes.unstage("v", "someone")


async def check_restored(volumes: VolumeManager) -> None:
    assert await content(volumes, "v") in ({"old", "6 files"}, {"new", "6 files"})
    assert [snapshot.name for snapshot, _ in await volumes.snapshots.all("v")] == ["s"]


async def check_copy(volumes: VolumeManager) -> None:
    for name in await names(volumes):
        assert await content(volumes, name) == {"old", "6 files"}


OPERATIONS: dict[str, tuple[Work, Work, Work]] = {
    "create": (nothing, lambda v: v.create("v", IMAGE, labels={}), check_made),
    "create-local": (nothing, lambda v: v.create("v", VolumeSpec(driver="local"), labels={}), check_made),
    "grow": (small, lambda v: v.update("v", "", spec={"size_bytes": 16 * MIB}), check_grown),
    "snapshot": (used, lambda v: v.snapshots.create("v", "t", labels={}), check_snapshot),
    "restore-image": (with_data(IMAGE), lambda v: v.snapshots.restore("v", "s"), check_restored),
    "restore-local": (with_data(VolumeSpec()), lambda v: v.snapshots.restore("v", "s"), check_restored),
    "clone": (small, lambda v: v.filling.clone("v", "", "copy", None, labels={}, request_id=""), check_copy),
    "import": (archive, import_archive, check_copy),
    "rm": (small, lambda v: v.delete("v"), check_copy),
}


async def started() -> VolumeManager:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    volumes = VolumeManager(Store(STATE / "netstore.db"), STATE)
    await volumes.start()
    await volumes.settle()
    return volumes


async def prepare(work: Work) -> None:
    await work(await started())


async def operate(work: Work, told: int, go: int) -> None:
    volumes = await started()
    os.write(told, str(await asyncio.to_thread(threading.get_native_id)).encode())
    os.read(go, 1)
    await work(volumes)


async def look(check: Work) -> None:
    volumes = await started()
    findings = [finding for finding in await volumes.check(repair=False) if finding.resource_id or finding.detail]
    assert findings == []
    names = ("draft", "freezing", "growing")
    halves = [
        path
        for path in STATE.glob("volumes/**/*")
        if path.name in names or (path.parent.name == "snapshots" and path.name[0] == ".")
    ]
    assert halves == []
    await check(volumes)
    rows = await volumes.all()
    assert len([path for path in STATE.glob("volumes/*/*") if path.name[0] != "."]) == len(rows)


def forked(work: Callable[..., Coroutine[None, None, None]], *args: object) -> int:
    """Run something in a child; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        asyncio.run(work(*args))
        os._exit(0)
    except (NetstoreError, OSError, AssertionError, subprocess.CalledProcessError):
        traceback.print_exc()
        os._exit(1)


def reset() -> None:
    """Begin with what there was, as after a reboot."""
    unmount()
    shutil.rmtree(STATE, ignore_errors=True)
    subprocess.run(["cp", "-a", "--sparse=never", BEFORE, STATE], check=True)


def unmount() -> None:
    for path in sorted(mounts_below(STATE), reverse=True):
        unmount_all(Path(path), lazy=True)


def run(work: Work, kill: str = "") -> list[str]:
    """Run an operation, killed as strace(1) is told to; returns the steps that it made."""
    reset()
    told, go = os.pipe(), os.pipe()
    pid = forked(operate, work, told[1], go[0])
    os.close(told[1])
    thread = os.read(told[0], 20).decode()
    injected = ["-e", f"inject={kill}"] if kill else []
    command = ["strace", "-q", "-o", str(LOG), "-e", f"trace={STEPS}", "-e", "signal=none", *injected, "-p", thread]
    with subprocess.Popen(command) as strace:
        while f"TracerPid:\t{strace.pid}" not in Path(f"/proc/{pid}/task/{thread}/status").read_text():
            threading.Event().wait(0.002)
        os.write(go[1], b"!")
        status = os.waitpid(pid, 0)[1]
    for descriptor in (told[0], *go):
        os.close(descriptor)
    lines = [line for line in LOG.read_text().splitlines() if "(" in line]
    assert os.WIFSIGNALED(status) == bool(kill), (kill, status, lines)
    return lines


def kills(steps: list[str]) -> Iterator[tuple[str, str]]:
    """Yield how to be killed before each step, but where the one before it changed nothing, and what that step is."""
    counts: Counter[str] = Counter()  # strace counts each system call for itself
    changed = True
    for step in steps:
        name = step.partition("(")[0]
        counts[name] += 1
        if changed:
            yield f"{name}:signal=KILL:when={counts[name]}", step
        changed = " = -1 " not in step and "LOOP_GET_STATUS64" not in step and "LOOP_CTL_GET_FREE" not in step


def main() -> None:
    mount("tmpfs", PLACE, "tmpfs", "size=400m")  # no disk to wait for
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    for operation, (first, work, check) in OPERATIONS.items():
        for place in (STATE, BEFORE):
            shutil.rmtree(place, ignore_errors=True)
        STATE.mkdir()
        ended(forked(prepare, first), f"{operation}: the preparation")
        unmount()
        STATE.rename(BEFORE)
        points = list(kills(run(work)))
        ended(forked(look, check), f"{operation}: the whole of it")
        for kill, step in points:
            run(work, kill)
            ended(forked(look, check), f"{operation} killed before {step}")
        unmount()
        print(operation, len(points))


def ended(pid: int, what: str) -> None:
    assert os.waitpid(pid, 0)[1] == 0, what


if __name__ == "__main__":
    main()
