"""Mounts under attack: paths exchanged while they are resolved, and a daemon killed in the middle."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from conftest import Host, Node

from netstore.api.v1 import mount_pb2
from netstore.client import BlockingClient as Client

RACE = """
import atexit, os, shutil, subprocess, sys
from contextlib import suppress
from pathlib import Path
from netstore.errors import NetstoreError
from netstore.kernel import mounts
from netstore.kernel.mountns import MountNamespace
from netstore.kernel.paths import closing
from netstore.launcher.trees import make_tree
from netstore.model import Mount, MountSpec

place, what, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
# Exchanges names as fast as it can: what is checked a moment ago is something else now.
SWAPPER = '''
import ctypes, sys
libc = ctypes.CDLL(None)
one, two = (path.encode() for path in sys.argv[1:3])
print(flush=True)
while True:
    libc.renameat2(-100, one, -100, two, 2)
'''

def swap(one, two):
    process = subprocess.Popen([sys.executable, "-c", SWAPPER, one, two], stdout=subprocess.PIPE)
    atexit.register(process.kill)
    process.stdout.readline()

outside = place / "outside"
outside.mkdir()
(outside / "name").write_text("outside")
results, BATCH = {"inside": 0, "refused": 0, "escaped": 0}, 500

if what == "subpath":
    root = place / "volume"
    (root / "dir/sub").mkdir(parents=True)
    (root / "dir/sub/name").write_text("inside")
    os.symlink("../" * 20 + str(outside), root / "up")
    os.symlink(outside, root / "abs")
    (root / "sub").symlink_to("dir/sub")
    (outside / "sub").mkdir()
    (outside / "sub/name").write_text("outside")
    swap(str(root / "dir"), str(root / "up"))
    swap(str(root / "sub"), str(root / "abs"))
    with closing(os.open(root, os.O_PATH)) as opened:
        for number in range(rounds):
            mount = Mount(spec=MountSpec(target="/t", subpath=("dir/sub", "sub")[number % 2]), source=str(root),
                          volume_id="v", volume="v")
            try:
                tree = make_tree(mount, root=opened)
            except NetstoreError:
                results["refused"] += 1
                continue
            with closing(tree), closing(os.open("name", os.O_RDONLY, dir_fd=tree)) as file:
                results["inside" if os.read(file, 9) == b"inside" else "escaped"] += 1
else:
    # Containers whose processes exchange the target with links that lead to the host's root, in every way there is.
    rootfs = place / "rootfs"
    for name in ("bin", "proc", "old", "dir/target", "other"):
        (rootfs / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", rootfs / "bin")
    os.symlink("../" * 20 + str(outside), rootfs / "up")
    os.symlink(f"/proc/{os.getpid()}/root{outside}", rootfs / "magic")
    script = f'''
    mount --bind {rootfs} {rootfs}; cd {rootfs}; mount -t proc proc proc; pivot_root . old
    ./bin/busybox umount -l /old; echo; exec ./bin/busybox sleep 1000
    '''
    swap(str(rootfs / "dir"), str(rootfs / "up"))
    swap(str(rootfs / "other"), str(rootfs / "magic"))
    host = lambda: Path("/proc/self/mountinfo").read_text()
    before = host()

    def race(inside):
        source = os.open("/old", os.O_PATH)
        for number in range(BATCH):
            target = ("/dir/target", "/other/made/here", "/dir")[number % 3]
            with closing(mounts.clone(source, "old")) as tree:
                try:
                    inside.attach(tree, target, inside.look(target).missing)
                    results["inside"] += 1
                except NetstoreError:
                    results["refused"] += 1
            if number % 50 == 0:  # an unmount waits for an RCU grace period: the others go with the container
                with suppress(NetstoreError):
                    inside.detach(target, (), lazy=True)
        os.close(source)

    for _ in range(rounds // BATCH):
        command = ["unshare", "-m", "--propagation", "private", "sh", "-c", script]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as sleeper:
            sleeper.stdout.readline()
            with MountNamespace.of_process(sleeper.pid) as there:
                there._inside(race)  # one way in for all: it costs more than a round
            sleeper.kill()
    made = [path.name for path in outside.iterdir()]
    if host() != before or made != ["name"]:
        results["escaped"] += 1
print(results["inside"], results["refused"], results["escaped"])
"""


@pytest.mark.parametrize("what", ["subpath", "target"])
def test_races_lose(host: Host, place: Path, what: str) -> None:
    (place / "race").mkdir()
    done = host.run(sys.executable, "-c", RACE, str(place / "race"), what, "20000", timeout=55, check=False)
    assert done.returncode == 0, done.stderr
    inside, refused, escaped = map(int, done.stdout.split())
    print(f"{what}: {inside} inside, {refused} refused, {escaped} escaped")
    assert escaped == 0
    assert inside + refused == 20_000
    assert inside > 100
    assert refused > 100


def test_links_of_a_container_lead_nowhere(node: Node, image: str) -> None:
    """Volumes that a container filled with links, and targets that it made links of."""
    node.cli("volume", "create", "good")
    links = "ln -s /proc/self/root /v/magic; ln -s /proc/1/root/etc /v/one; ln -s ../../../../../../etc /v/up; ln -s /etc /v/abs"
    node.cli("run", "--rm", "-v", "evil:/v", image, "sh", "-c", links)
    for name in ("magic", "one", "up", "abs", "magic/etc", "up/passwd"):
        refused = node.cli(
            "run", "--rm", "--mount", f"source=evil,target=/v,volume-subpath={name}", image, "true", check=False
        )
        assert "leads out of volume evil" in refused.stderr, (name, refused)
    inside = (
        "ln -s /proc/self/root/etc /a; ln -s ../../../../../../../etc /b; ln -s /proc/1/root/etc /c; exec sleep 1000"
    )
    node.cli("run", "-d", "--name", "c", image, "sh", "-c", inside)
    before = Path(f"/proc/{node.host.holder}/mountinfo").read_text()
    for target in ("/a", "/b", "/c", "/a/x/y", "/../../../etc"):
        node.cli("volume", "attach", "good", f"c:{target}", check=False)
    assert Path(f"/proc/{node.host.holder}/mountinfo").read_text() == before
    assert not Path("/etc/x").exists()
    node.cli("rm", "-f", "c")


def test_kill_9_in_the_middle(node: Node, client: Client, image: str) -> None:
    """Whole or absent after each of many kills: what the store says is what the container sees."""
    for name in ("one", "two"):
        node.cli("run", "--rm", "-v", f"{name}:/v", image, "sh", "-c", f"echo {name} > /v/name")
    node.cli("run", "-d", "--name", "c", image)
    pid = node.out("inspect", "-f", "{{.Status.Pid}}", "c")
    ref = mount_pb2.MountNamespaceRef(container="c")

    failures: list[grpc.RpcError] = []

    def work() -> None:
        worker = Client(node.address)
        try:
            while True:
                for volume, replace in (("one", False), ("two", True)):
                    spec = mount_pb2.MountSpec(source=volume, target="/a/v")
                    worker.mounts.Mount(mount_pb2.MountRequest(namespace=ref, spec=spec, replace=replace))
                worker.mounts.Unmount(mount_pb2.UnmountRequest(namespace=ref, target="/a/v"))
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                failures.append(error)
        finally:
            worker.channel.close()

    for number in range(8):
        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.1 + number * 0.013)
        node.kill()
        thread.join()
        assert not failures
        node.start()
        assert node.out("system", "check") == "kernel and store agree"
        found = client.mounts.ListMounts(mount_pb2.ListMountsRequest(namespace=ref), wait_for_ready=True).mounts
        lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        there = [line for line in lines if line.split()[4] == "/a/v"]
        assert len(there) == len(found), (found, there)
        for mount in found:
            assert node.out("exec", "c", "cat", "/a/v/name") == mount.status.volume
            client.mounts.Unmount(mount_pb2.UnmountRequest(namespace=ref, target="/a/v"))
        assert subprocess.run(["ls", f"/proc/{pid}/root/a"], capture_output=True).returncode, "what was made is left"
    assert os.path.exists(f"/proc/{pid}")
    node.cli("volume", "rm", "one", "two")
