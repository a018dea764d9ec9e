"""Mounts: hot attach through gRPC beside its floor (the system calls alone), and copy-up beside `cp -a`.

Runs inside a network and mount namespace of its own; `scripts/bench mounts` makes it. Figures are milliseconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from common import BIN, measure, sh, show, start_netstore

from netstore.api.v1 import container_pb2, mount_pb2, volume_pb2
from netstore.client import BlockingClient as Client
from netstore.kernel import mounts
from netstore.kernel.mountns import MountNamespace
from netstore.kernel.paths import closing
from netstore.volumes.copyup import copy_up

COUNT = int(os.environ.get("NETSTORE_BENCH_COUNT", "200"))
COPIES = 5


def floor(place: Path) -> None:
    """The same system calls in this process: copy a tree, go in, look, attach; then detach."""
    place.joinpath("source").mkdir()
    sleeper = subprocess.Popen(["unshare", "-m", "--propagation", "private", "sh", "-c", "echo; sleep 1000"], stdout=-1)
    assert sleeper.stdout
    sleeper.stdout.readline()
    with MountNamespace.of_process(sleeper.pid) as there, closing(os.open(place / "source", os.O_PATH)) as source:

        def attach(_: int) -> None:
            there.look("/mnt")
            with closing(mounts.clone(source, "source")) as tree:
                there.attach(tree, "/mnt")

        def detach(_: int) -> None:
            there.detach("/mnt")

        times: dict[str, list[float]] = {"attach": [], "detach": []}
        for index in range(COUNT):
            times["attach"] += measure(lambda _, i=index: attach(i), 1)  # type: ignore[misc]
            times["detach"] += measure(lambda _, i=index: detach(i), 1)  # type: ignore[misc]
    show("floor: attach, system calls and two threads", times["attach"])
    show("floor: detach", times["detach"])
    sleeper.kill()
    sleeper.wait()


def hot(client: Client, place: Path) -> None:
    root = place / "root"
    (root / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/sleep")
    sh(f"tar -C {root} -cf {place}/bb.tar . && {BIN}/netstore -H {client.address} image import {place}/bb.tar bb")
    for name in ("one", "two"):
        client.volumes.CreateVolume(volume_pb2.CreateVolumeRequest(volume={"name": name}))
    made = client.containers.CreateContainer(
        container_pb2.CreateContainerRequest(
            container={"name": "c", "spec": {"image": "bb", "command": ["/bin/sleep", "1000"]}}
        )
    ).container
    client.containers.StartContainer(container_pb2.StartContainerRequest(container=made.id))
    ref = mount_pb2.MountNamespaceRef(container="c")

    def mount(volume: str, **more: bool) -> None:
        replace = more.pop("replace", False)
        spec = mount_pb2.MountSpec(source=volume, target="/data", **more)
        client.mounts.Mount(mount_pb2.MountRequest(namespace=ref, spec=spec, replace=replace))

    steps = {
        "netstore attach (gRPC; to hold: 3)": lambda: mount("one"),
        "netstore rw to ro": lambda: mount("one", read_only=True),
        "netstore exchange": lambda: mount("two", replace=True),
        "netstore detach": lambda: client.mounts.Unmount(mount_pb2.UnmountRequest(namespace=ref, target="/data")),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(COUNT):
        for name, step in steps.items():
            times[name] += measure(lambda _, s=step: s(), 1)  # type: ignore[misc]
    for name in steps:
        show(name, times[name])
    client.containers.DeleteContainer(container_pb2.DeleteContainerRequest(container="c", force=True))


def copies(place: Path) -> None:
    """10,000 files of 1 to 16 KiB in 100 directories; each copy is removed before the next is timed."""
    source = place / "tree"
    for number in range(10_000):
        path = source / f"d{number % 100}"
        if number < 100:
            path.mkdir(parents=True)
        (path / f"f{number}").write_bytes(b"x" * (1 + number * 7919 % 16384))
    times: dict[str, list[float]] = {"cp -a": [], "netstore copy-up": []}
    descriptor = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    for number in range(COPIES):
        target = place / f"copy{number}"
        times["cp -a"] += measure(lambda _, t=target: sh(f"cp -a {source} {t}"), 1)  # type: ignore[misc]
        data = place / f"volume{number}/_data"
        data.mkdir(parents=True)
        times["netstore copy-up"] += measure(lambda _, d=data: copy_up(descriptor, d), 1)  # type: ignore[misc]
    peer = show("cp -a of 10,000 files", times["cp -a"])
    own = show("netstore copy-up of 10,000 files", times["netstore copy-up"])
    print(f"{'':<52}{own / peer:>9.2f} times cp -a (to hold: 1)")


def main() -> None:
    place = Path(sys.argv[1])
    print(f"{'ms':<52}{'p50':>9}{'min':>9}{'p95':>9}")
    floor(place)
    copies(place)
    hot(start_netstore(place), place)


if __name__ == "__main__":
    main()
