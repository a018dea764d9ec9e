"""Volumes: create, stage, snapshot, list and write, through gRPC, beside the floor and dockerd where it is installed.

Runs inside a network and mount namespace of its own; `scripts/bench volumes` makes it. Figures are milliseconds.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from common import BIN, measure, sh, show, start_netstore

from netstore.api.v1 import snapshot_pb2, volume_pb2
from netstore.client import BlockingClient as Client
from netstore.client import pages

ROUNDS = 30
GIB = 1 << 30
MANY = int(os.environ.get("NETSTORE_BENCH_COUNT", "10000"))


def create(client: Client, name: str, **spec: object) -> volume_pb2.Volume:
    request = volume_pb2.CreateVolumeRequest(volume={"name": name, "spec": spec}, request_id=str(uuid.uuid4()))
    return client.volumes.CreateVolume(request).volume


def stage(client: Client, name: str) -> Path:
    staged = client.volumes.StageVolume(volume_pb2.StageVolumeRequest(volume=name, holder="bench")).volume
    return Path(staged.status.mountpoint)


def unstage(client: Client, name: str) -> None:
    client.volumes.UnstageVolume(volume_pb2.UnstageVolumeRequest(volume=name, holder="bench"))


def remove(client: Client, name: str) -> None:
    client.volumes.DeleteVolume(volume_pb2.DeleteVolumeRequest(volume=name))


def local(client: Client, place: Path) -> None:
    def floor(index: int) -> None:
        data = place / f"floor{index}/_data"
        data.mkdir(parents=True)
        for directory in (data.parent, place):
            descriptor = os.open(directory, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    show("floor: two directories, made durable", measure(floor, ROUNDS))
    show("create local (to hold: 3)", measure(lambda i: create(client, f"l{i}"), 200))
    show("remove local", measure(lambda i: remove(client, f"l{i}"), 200))


def images(client: Client) -> None:
    for kind in ("ext4", "xfs", "btrfs"):
        made, mounted = [], []
        for index in range(ROUNDS):
            name = f"{kind}{index}"
            started = time.perf_counter()
            create(client, name, driver="image", size_bytes=GIB, options={"fs": kind})
            between = time.perf_counter()
            stage(client, name)
            mounted.append((time.perf_counter() - started) * 1e3)
            made.append((between - started) * 1e3)
            unstage(client, name)
            remove(client, name)
        show(f"create image {kind} 1 GiB, allocated in full", made)
        show(f"create and mount it{' (to hold: 20)' if kind == 'ext4' else ''}", mounted)


def snapshots(client: Client) -> None:
    data = Path(create(client, "pooled", driver="btrfs").status.mountpoint)
    for number in range(2000):
        (data / f"file{number}").write_bytes(b"x" * 4096)

    def snapshot(index: int) -> None:
        wanted = snapshot_pb2.Snapshot(name=f"s{index}", spec={"volume": "pooled"})
        client.snapshots.CreateSnapshot(snapshot_pb2.CreateSnapshotRequest(snapshot=wanted))

    show("btrfs snapshot of 2,000 files (to hold: 10)", measure(snapshot, ROUNDS))


def reflink(place: Path) -> None:
    """Snapshots of an image that is used, where the host's filesystem shares extents: a state directory on xfs."""
    state, disk = place / "reflink", place / "reflink.img"
    state.mkdir()
    with disk.open("wb") as file:
        file.truncate(4 * GIB)
    sh(f"mkfs.xfs -q -m reflink=1 {disk} && mount -o loop {disk} {state}")
    client = start_netstore(state)
    create(client, "shared", driver="image", size_bytes=GIB)
    data = stage(client, "shared")
    (data / "written").write_bytes(os.urandom(100 << 20))
    os.sync()
    frozen, beyond = [], []
    for index in range(ROUNDS):
        wanted = snapshot_pb2.Snapshot(name=f"s{index}", spec={"volume": "shared"})
        started = time.perf_counter()
        made = client.snapshots.CreateSnapshot(snapshot_pb2.CreateSnapshotRequest(snapshot=wanted)).snapshot
        frozen.append(made.status.frozen_time.ToNanoseconds() / 1e6)
        beyond.append((time.perf_counter() - started) * 1e3 - frozen[-1])
    show("image snapshot on xfs with reflink, frozen for", frozen)
    show("the same, beyond the freeze (to hold: 15)", beyond)
    unstage(client, "shared")


def write(path: Path, size: int) -> float:
    """Write a file in order, durably; returns bytes a second."""
    block = os.urandom(1 << 20)
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size >> 20):
            file.write(block)
        os.fsync(file.fileno())
    taken = time.perf_counter() - started
    path.unlink()
    return size / taken


def read(path: Path) -> float:
    """Read a file in order, not from the cache; returns bytes a second."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        while file.read(1 << 20):
            pass
        return path.stat().st_size / (time.perf_counter() - started)


def throughput(client: Client, place: Path) -> None:
    for kind in ("ext4", "xfs"):
        create(client, f"fast-{kind}", driver="image", size_bytes=2 * GIB, options={"fs": kind})
        volume = stage(client, f"fast-{kind}")
        size = GIB // 2
        figures: dict[str, list[float]] = {"host": [], "volume": [], "host read": [], "volume read": []}
        for directory in (place, volume):
            (directory / "reading").write_bytes(os.urandom(size))
        os.sync()
        for _ in range(8):  # in turn, so that what else runs hits both
            for name, directory in (("host", place), ("volume", volume)):
                figures[name].append(write(directory / "written", size))
                figures[f"{name} read"].append(read(directory / "reading"))
        for way in ("", " read"):
            ratio = max(figures[f"volume{way}"]) / max(figures[f"host{way}"])
            middle = statistics.median(figures[f"volume{way}"]) / statistics.median(figures[f"host{way}"])
            label = f"image {kind} against host directory, {'read' if way else 'written'} (to hold: 0.9)"
            print(
                f"{label:<62}{ratio:>8.2f} of best, {middle:.2f} of p50; host {max(figures[f'host{way}']) / 1e6:.0f} MB/s"
            )
        unstage(client, f"fast-{kind}")
        remove(client, f"fast-{kind}")


def many(client: Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: create(client, f"many{index}"), range(MANY)))

    def everything(_: int) -> None:
        found = pages(client.volumes.ListVolumes, volume_pb2.ListVolumesRequest(), "volumes")
        assert len(found) >= MANY

    show(f"list {MANY:,} volumes, all pages (to hold: 300)", measure(everything, 5))
    command = [str(BIN / "netstore"), "-H", client.address, "volume", "ls", "-q"]
    show("netstore CLI volume ls -q", measure(lambda _: subprocess.run(command, check=True, capture_output=True), 3))
    show(f"create local, the {MANY:,}th and on", measure(lambda i: create(client, f"late{i}"), 100))


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("docker")
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


@contextmanager
def dockerd(place: Path) -> Iterator[UnixConnection | None]:
    """Debian's dockerd, in this private namespace, spoken to as netstored is: through a connection that stays."""
    if not shutil.which("dockerd"):
        print("dockerd is not installed (apt-get install docker.io): not measured")
        yield None
        return
    path = f"{place}/docker.sock"
    daemon = subprocess.Popen(
        ["dockerd", "-H", f"unix://{path}", "--data-root", place / "docker", "--exec-root", place / "docker-run",
         "--pidfile", place / "docker.pid", "--storage-driver", "vfs", "--iptables=false", "--bridge=none"],
        stderr=(place / "dockerd.log").open("w"),
    )  # fmt: skip
    try:
        for _ in range(150):
            if os.path.exists(path) and daemon.poll() is None:
                break
            time.sleep(0.2)
        yield UnixConnection(path)
    finally:
        daemon.terminate()
        daemon.wait(timeout=30)


def docker(connection: UnixConnection) -> None:
    def made(index: int) -> None:
        body = json.dumps({"Name": f"d{index}"})
        connection.request("POST", "/volumes/create", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 201

    def removed(index: int) -> None:
        connection.request("DELETE", f"/volumes/d{index}")
        connection.getresponse().read()

    try:
        show("dockerd create local, through its API", measure(made, 200))
        show("dockerd remove local", measure(removed, 200))
    except OSError as error:
        print(f"dockerd: not measured: {error}")


def main() -> None:
    place = Path(sys.argv[1])
    print(f"{'ms':<52}{'p50':>9}{'min':>9}{'p95':>9}")
    client = start_netstore(place, '[volumes]\nbtrfs-pool = "1G"\n')
    local(client, place)
    with dockerd(place) as connection:
        if connection:
            docker(connection)
    images(client)
    snapshots(client)
    reflink(place)
    throughput(client, place)
    many(client)


if __name__ == "__main__":
    main()
