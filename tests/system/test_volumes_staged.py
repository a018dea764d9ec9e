"""Volumes of every driver in containers: staged while they are used, whole after kill -9, held to their size."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import Node, wait_until


def mountpoint(node: Node, name: str) -> Path:
    return Path(json.loads(node.out("volume", "inspect", name))[0]["status"]["mountpoint"])


def mounted(node: Node, path: Path) -> bool:
    return str(path) in node.host.sh("awk '{print $5}' /proc/self/mountinfo").split("\n")


def loops(node: Node) -> list[str]:
    shown = node.host.sh("losetup -nlO BACK-FILE")
    return [line for line in shown.split("\n") if str(node.place) in line]


def test_an_image_is_staged_while_it_is_used(node: Node, image: str) -> None:
    node.cli("volume", "create", "-d", "image", "--size", "32M", "data")
    place = mountpoint(node, "data")
    assert not mounted(node, place)
    node.cli("create", "--name", "one", "-v", "data:/data", image, "sleep", "1000")
    assert not mounted(node, place)  # only the copy-up needed it
    node.cli("start", "one")
    node.cli("run", "-d", "--name", "two", "-v", "data:/data", image, "sleep", "1000")
    assert node.out("exec", "two", "cat", "/data/hello") == "from the image"
    assert node.out("exec", "-u", "app", "two", "id", "-u") == "1000"
    assert node.out("exec", "two", "stat", "-c", "%u %a", "/data/hello") == "1000 640"
    assert "lost+found" not in node.out("exec", "two", "ls", "-A", "/data")
    full = node.cli(
        "exec", "one", "/bin/busybox", "dd", "if=/dev/zero", "of=/data/big", "bs=1M", "count=64", check=False
    )
    assert "No space left on device" in full.stderr
    node.cli("stop", "-t", "0", "one")
    assert mounted(node, place)
    node.kill()
    node.start()  # the container goes on, and so does the mount
    assert mounted(node, place)
    assert len(loops(node)) == 1
    node.host.sh(f"umount -l {place}")
    found = node.cli("system", "check", check=False)
    assert "it is used and not mounted" in found.stdout
    node.cli("system", "check", "--repair")
    assert mounted(node, place)
    assert len(loops(node)) == 1  # the same device, which the container still has
    assert "in use by" in node.cli("volume", "rm", "data", check=False).stderr
    node.cli("stop", "-t", "0", "two")
    assert not mounted(node, place)
    assert not loops(node)
    assert node.out("run", "--rm", "-v", "data:/data", image, "cat", "/data/hello") == "from the image"
    node.cli("rm", "one", "two")
    node.cli("volume", "rm", "data")
    assert not place.parent.exists()


def test_a_reboot_or_a_container_that_ended_meanwhile(node: Node, image: str) -> None:
    node.cli("volume", "create", "-d", "image", "--size", "16M", "data")
    node.cli("run", "-d", "--name", "c", "-v", "data:/data", image, "sleep", "1000")
    place, pid = mountpoint(node, "data"), node.out("inspect", "-f", "{{.Status.Pid}}", "c")
    node.kill()
    node.host.sh(f"kill -9 {pid}")
    node.start()
    assert "Exited (137)" in node.out("ps", "-a")
    assert not mounted(node, place)
    assert not loops(node)
    node.cli("start", "c")
    assert node.out("exec", "c", "cat", "/data/hello") == "from the image"


def test_local_mounts_what_docker_mounts(node: Node, image: str) -> None:
    outside = node.place / "outside"
    outside.mkdir()
    node.cli("volume", "create", "-o", "type=none", "-o", f"device={outside}", "-o", "o=bind", "bound")
    node.cli("run", "--rm", "-v", "bound:/data", image, "sh", "-c", "echo hi > /data/there")
    assert (outside / "there").read_text() == "hi\n"
    assert (outside / "hello").read_text() == "from the image\n"
    node.cli("volume", "create", "-o", "type=tmpfs", "-o", "device=tmpfs", "-o", "o=size=4m,uid=1000", "memory")
    shown = node.out("run", "--rm", "-v", "memory:/m", image, "sh", "-c", "stat -c %u /m; mount | grep ' /m '")
    assert shown.startswith("1000\ntmpfs on /m type tmpfs")
    node.cli("volume", "create", "-o", "type=ext4", "-o", "device=/dev/nosuch", "lost")
    refused = node.cli("run", "--rm", "-v", "lost:/data", image, "true", check=False)
    assert refused.returncode == 125
    assert "mounting /dev/nosuch" in refused.stderr
    assert node.out("ps", "-aq") == ""
    node.cli("volume", "rm", "bound", "memory", "lost")
    assert (outside / "there").exists()


def test_kill_9_while_volumes_are_made(node: Node) -> None:
    def create(index: int) -> None:
        node.host.sh(
            f"{Path('.venv/bin/netstore').resolve()} -H {node.address} volume create -d image --size 16M k{index}"
            " >/dev/null 2>&1 &"
        )

    for delay in ("0.2", "0.4"):
        for index in range(4):
            create(index)
        node.host.sh(f"sleep {delay}")
        node.kill()
        node.start()
        assert node.out("system", "check") == "kernel and store agree"
        names = node.out("volume", "ls", "-q").split()
        there = {path.name for path in (node.place / "state/volumes/image").glob("*")}
        assert len(there) == len(names)
        for name in names:
            node.cli("volume", "rm", name)
    assert not loops(node)


def test_a_size_without_a_driver_says_what_holds_it(node: Node, image: str) -> None:
    made = node.cli("volume", "create", "--size", "16M", "data")
    assert made.stdout == "data\n"
    assert made.stderr == "16M held by ext4 in an image file (driver image)\n"
    node.cli("volume", "create", "--size", "16M", "data")  # the same again
    refused = node.cli("volume", "create", "--size", "32M", "data", check=False)
    assert "size_bytes is 16777216, asked for 33554432" in refused.stderr
    node.cli("run", "--rm", "--mount", "src=made,dst=/d,volume-opt=size=16M", image, "true")
    assert node.out("volume", "inspect", "-f", "{{.Spec.Driver}}", "made") == "image"
    node.cli("run", "-d", "--name", "c", "-v", "data:/data", image, "sleep", "1000")
    found = json.loads(node.out("volume", "inspect", "data"))[0]
    assert found["spec"]["size_bytes"] == "16777216"
    status = found["status"]
    assert (status["state"], status["staged"], status["containers"]) == ("VOLUME_STATE_ACTIVE", True, ["c"])
    assert 0 < int(status["used_bytes"]) < int(status["capacity_bytes"]) < 16 << 20
    assert int(status["used_inodes"]) > 3
    refused = node.cli("volume", "update", "--size", "8M", "data", check=False)
    assert "at least 16777216" in refused.stderr


def test_a_size_changes_while_it_is_used(node: Node, image: str) -> None:
    node.cli("volume", "create", "-d", "image", "-o", "fs=btrfs", "--size", "160M", "data")
    node.cli("volume", "create", "-d", "tmpfs", "--size", "4M", "memory")
    node.cli("run", "-d", "--name", "c", "-v", "data:/data", "-v", "memory:/memory", image, "sleep", "1000")

    def room(path: str) -> int:
        return int(node.out("exec", "c", "/bin/busybox", "df", "-m", path).split()[-5])

    before = room("/data")
    node.cli("volume", "update", "--size", "320M", "data")
    assert room("/data") > before + 100
    node.cli("volume", "update", "--size", "8M", "memory")
    assert room("/memory") == 8
    assert node.out("volume", "inspect", "-f", "{{.Spec.SizeBytes}}", "memory") == str(8 << 20)
    node.cli("exec", "c", "sh", "-c", "echo kept > /memory/file")
    node.cli("rm", "-f", "c")
    assert node.out("run", "--rm", "-v", "memory:/memory", image, "cat", "/memory/file") == "kept"
    refused = node.cli("volume", "update", "--size", "15T", "data", check=False)
    assert "no room" in refused.stderr
    assert node.out("volume", "inspect", "-f", "{{.Spec.SizeBytes}}", "data") == str(320 << 20)
    assert node.out("system", "check") == "kernel and store agree"


def test_an_engine_stages_over_restarts(node: Node) -> None:
    node.cli("volume", "create", "-d", "image", "--size", "16M", "data")
    place = Path(node.out("volume", "stage", "data", "csi"))
    node.out("volume", "stage", "data", "other")
    assert mounted(node, place)
    assert "held staged by csi, other" in node.cli("volume", "rm", "data", check=False).stderr
    node.kill()
    node.host.sh(f"umount {place}")  # a reboot
    node.start()
    assert mounted(node, place)
    node.cli("volume", "unstage", "data", "csi")
    assert mounted(node, place)
    node.cli("volume", "unstage", "data", "other")
    node.cli("volume", "unstage", "data", "other")
    assert not mounted(node, place)
    node.cli("volume", "rm", "data")


def test_a_stage_that_fails_later_takes_nothing_back(node: Node) -> None:
    """An engine that holds a volume and asks again while its disk is away still holds it after a restart."""
    device = disk(node, "disk")
    label = f"t{node.host.holder}"
    node.host.sh(f"mkfs.ext4 -q -L {label} {device}")
    try:
        node.cli("volume", "create", "-d", "block", "-o", f"label={label}", "data")
        place = Path(node.out("volume", "stage", "data", "csi"))
        node.host.sh(f"umount {place}; losetup -d {device}")
        wait_until(lambda: node.cli("volume", "stage", "data", "csi", check=False).returncode, what="the disk to go")
        assert "held staged by csi" in node.cli("volume", "rm", "data", check=False).stderr
        assert node.cli("volume", "stage", "data", "other", check=False).returncode
        assert "held staged by csi\n" in node.cli("volume", "rm", "data", check=False).stderr
        device = node.host.sh(f"losetup --show -f {node.place}/disk").strip()
        node.kill()
        node.start()
        wait_until(lambda: mounted(node, place), what="the volume to be staged again")
        node.cli("volume", "unstage", "data", "csi")
        node.cli("volume", "rm", "data")
    finally:
        node.host.sh(f"losetup -d {device}")


def test_drivers_and_passwords(node: Node) -> None:
    shown = node.out("volume", "drivers")
    assert "image" in shown
    assert "no btrfs pool" in shown
    found = json.loads(node.out("volume", "drivers", "--format", "json"))
    (image,) = (each for each in found if each["name"] == "image")
    assert "VOLUME_CAPABILITY_SIZE" in image["capabilities"]
    assert {option["key"] for option in image["options"]} >= {"fs", "sparse"}
    node.cli(
        "volume", "create", "-o", "type=cifs", "-o", "device=//nas/share", "-o", "o=username=u,password=hidden", "nas"
    )
    inspected = node.out("volume", "inspect", "nas")
    assert "hidden" not in inspected
    assert "password=*****" in inspected
    for words in ("username=u,password=unlike", "password=hidden,,x"):
        options = ("-o", "type=cifs", "-o", "device=//nas/share", "-o", f"o={words}")
        done = node.cli("volume", "create", *options, "nas", check=False)
        assert done.returncode
        assert "hidden" not in done.stderr
        assert "unlike" not in done.stderr
    node.cli("volume", "create", "-o", "type=ceph", "-o", "device=nas:/", "-o", "o=name=admin,secret=hidden", "ceph")
    assert "secret=*****" in node.out("volume", "inspect", "ceph")
    assert "hidden" not in node.out("volume", "inspect", "ceph")
    assert "hidden" not in node.log()
    assert "unlike" not in node.log()


def test_a_device_that_looks_like_a_flag_is_none(node: Node) -> None:
    """`mount -V` ends well, and mounts nothing: what is written would be the host's, and gone with the last holder."""
    node.cli("volume", "create", "-o", "type=nfs", "-o", "device=-V", "odd")
    assert node.cli("volume", "stage", "odd", "somebody", check=False).returncode
    node.cli("volume", "rm", "odd")


def disk(node: Node, name: str) -> str:
    node.host.sh(f"truncate -s 32M {node.place}/{name}")
    return node.host.sh(f"losetup --show -f {node.place}/{name}").strip()


def test_a_disk_is_formatted_when_asked(node: Node, image: str) -> None:
    device = disk(node, "disk")
    try:
        refused = node.cli("volume", "create", "-d", "block", "-o", f"path={device}", "raw", check=False)
        assert f"{device} holds no filesystem" in refused.stderr
        assert "--format ext4" in refused.stderr
        node.cli("volume", "create", "-d", "block", "-o", f"path={device}", "--format", "ext4", "data")
        node.cli("run", "--rm", "-v", "data:/data", image, "sh", "-c", "echo kept > /data/mine")
        assert node.out("run", "--rm", "-v", "data:/data", image, "cat", "/data/mine") == "kept"
        node.cli("volume", "rm", "data")
    finally:
        node.host.sh(f"losetup -d {device}")


def test_disks_come_and_go(node: Node) -> None:
    label = f"t{node.host.holder}"  # other loop devices of the machine come and go too: by label it is found anywhere
    device = disk(node, "disk")
    node.host.sh(f"mkfs.ext4 -q -L {label} {device}")
    try:
        node.cli("volume", "create", "-d", "block", "-o", f"label={label}", "data")
        place = Path(node.out("volume", "stage", "data", "engine"))
        assert mounted(node, place)
        node.host.sh(f"umount {place}; losetup -d {device}")  # the disk is pulled
        wait_until(lambda: "device-vanish" in events(node), what="the disk to go")
        wait_until(lambda: not mounted(node, place), what="the mount to go")
        assert f"no device with label {label}" in node.out("volume", "inspect", "data")
        device = node.host.sh(f"losetup --show -f {node.place}/disk").strip()
        wait_until(lambda: "device-appear" in events(node), what="the disk to come")
        wait_until(lambda: mounted(node, place), what="the mount to come")
        assert node.out("volume", "inspect", "-f", "{{.Status.State}}", "data") == "active"
        node.cli("volume", "unstage", "data", "engine")
        node.cli("volume", "rm", "data")
    finally:
        node.host.sh(f"losetup -d {device}")


def events(node: Node) -> str:
    return node.out("system", "events", "--since", "0", "--until-now")


def test_a_container_gets_a_device(node: Node, image: str) -> None:
    node.cli("volume", "create", "-d", "image", "--size", "8M", "--type", "block", "raw")
    busybox = "/bin/busybox"
    write = f"{busybox} dd if=/dev/zero of=/dev/raw bs=1M count=1 conv=notrunc && echo done"
    assert "done" in node.out("run", "--rm", "-v", "raw:/dev/raw", image, "sh", "-c", write)
    refused = node.cli("run", "--rm", "-v", "raw:/dev/raw:ro", image, "sh", "-c", write, check=False)
    assert refused.returncode
    assert node.out("run", "--rm", "-v", "raw:/disk", image, "sh", "-c", f"{busybox} stat -c %F /disk") == (
        "block special file"
    )
    # on a running container, with what it may do to the device
    node.cli("run", "-d", "--name", "c", image)

    def tries(container_path: str) -> tuple[bool, bool]:
        read = f"{busybox} dd if={container_path} of=/dev/null bs=512 count=1"
        write = f"{busybox} dd if=/dev/zero of={container_path} bs=512 count=1 conv=notrunc"
        return tuple(not node.cli("exec", "c", "sh", "-c", each, check=False).returncode for each in (read, write))  # type: ignore[return-value]

    node.cli("volume", "attach", "raw", "c:/dev/hot")
    assert tries("/dev/hot") == (True, True)
    numbers = node.out("exec", "c", "sh", "-c", f"{busybox} stat -c '0x%t 0x%T' /dev/hot").split()
    node.cli("exec", "c", "sh", "-c", f"{busybox} mknod /own b {int(numbers[0], 16)} {int(numbers[1], 16)}")
    node.cli("volume", "attach", "raw", "c:/dev/hot:ro")
    assert tries("/dev/hot") == (True, False)
    node.cli("volume", "attach", "raw", "c:/other")
    assert tries("/dev/hot") == (True, True)
    node.kill()
    node.start()
    assert node.out("system", "check") == "kernel and store agree"
    node.cli("volume", "detach", "c:/other")
    assert tries("/own") == (True, False)
    node.cli("volume", "detach", "c:/dev/hot")
    assert tries("/own") == (False, False)
    node.cli("rm", "-f", "c")
    # a node that a container makes in a volume lets nobody in
    node.cli("volume", "create", "plain")
    node.cli("run", "--rm", "-v", "plain:/p", image, "sh", "-c", f"{busybox} mknod /p/node b 7 0")
    stolen = f"{busybox} dd if=/stolen of=/dev/null bs=512 count=1"
    mount = "type=volume,src=plain,dst=/stolen,volume-subpath=node"
    assert node.cli("run", "--rm", "--mount", mount, image, "sh", "-c", stolen, check=False).returncode
    assert not loops(node)
    node.cli("volume", "rm", "raw", "plain")
