"""Volumes on what only a whole kernel has: project quotas, NFS and SMB from real servers, ext4 that grows while it is used."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Node, wait_until

BUSYBOX = "/bin/busybox"


def sh(command: str) -> str:
    done = subprocess.run(["sh", "-ec", command], capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.fail(f"{command}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def status(node: Node, name: str) -> dict[str, object]:
    return dict(json.loads(node.out("volume", "inspect", name))[0]["status"])


def write(node: Node, container: str, path: str, megabytes: int) -> str:
    """Write a file in a container; returns what dd complained of."""
    command = ("exec", container, BUSYBOX, "dd", "if=/dev/zero", f"of={path}", "bs=1M", f"count={megabytes}")
    done = node.cli(*command, check=False)
    return done.stderr if done.returncode else ""


class TestQuotas:
    """The state directory is on a filesystem with project quotas."""

    @pytest.fixture(params=["xfs", "ext4"])
    def place(self, request: pytest.FixtureRequest) -> Iterator[Path]:
        make = {"xfs": "mkfs.xfs -q", "ext4": "mkfs.ext4 -q -O project,quota"}[request.param]
        top = Path(tempfile.mkdtemp(prefix="netstore-test-"))
        top.chmod(0o711)
        (top / "host").mkdir()
        sh(
            f"truncate -s 600M {top}/disk; {make} {top}/disk; mount -o prjquota {top}/disk {top}/host; chmod 711 {top}/host"
        )
        yield top / "host"
        sh(f"umount -l {top}/host")
        shutil.rmtree(top)

    def test_a_size_is_held_and_nobody_else_notices(self, node: Node, image: str) -> None:
        made = node.cli("volume", "create", "--size", "16M", "data")
        assert "held by a project quota (driver local)" in made.stderr
        node.cli("volume", "create", "--size", "64M", "other")
        node.cli("volume", "create", "free")
        volumes = [flag for name in ("data", "other", "free") for flag in ("-v", f"{name}:/{name}")]
        node.cli("run", "-d", "--name", "c", *volumes, image, "sleep", "1000")
        refused = write(node, "c", "/data/big", 32)
        assert "No space left" in refused or "quota exceeded" in refused
        assert 15 << 20 <= int(str(status(node, "data")["used_bytes"])) <= 16 << 20
        assert status(node, "data")["capacity_bytes"] == str(16 << 20)
        assert not write(node, "c", "/other/big", 32)
        assert not write(node, "c", "/free/big", 32)
        node.cli("volume", "update", "--size", "48M", "data")
        assert not write(node, "c", "/data/big", 32)
        shrunk = node.cli("volume", "update", "--size", "8M", "data", check=False)
        assert "at least what is used" in shrunk.stderr
        node.kill()
        node.start()
        assert write(node, "c", "/data/more", 32)
        assert json.loads(node.out("system", "check", "--format", "json")) == []
        node.cli("rm", "-f", "c")
        node.cli("volume", "rm", "data")
        node.cli("volume", "create", "--size", "16M", "data")
        assert int(str(status(node, "data")["used_bytes"])) < 16 << 10  # ext4 counts directories

    def test_what_netstored_writes_is_held_too(self, node: Node, image: str) -> None:
        """The daemon is root: ext4 lets root past a quota, if it may raise its limits (CAP_SYS_RESOURCE)."""
        node.cli("volume", "create", "--size", "48M", "data")
        node.cli("run", "-d", "--name", "c", "-v", "data:/data", image, "sleep", "1000")
        assert not write(node, "c", "/data/big", 32)
        archive = node.place / "data.tar"
        node.cli("volume", "export", "data", "-o", str(archive))
        small = node.cli("volume", "import", "small", str(archive), "--size", "16M", check=False)
        assert small.returncode, status(node, "small")
        assert "small" not in node.out("volume", "ls", "-q")
        clone = node.cli("volume", "clone", "data", "less", "--size", "16M", check=False)
        assert clone.returncode, status(node, "less")
        assert node.out("volume", "ls", "-q") == "data"
        node.cli("volume", "clone", "data", "more", "--size", "64M")
        assert node.out("run", "--rm", "-v", "more:/data", image, "stat", "-c", "%s", "/data/big") == str(32 << 20)


def test_an_ext4_grows_while_it_is_written(node: Node, image: str) -> None:
    node.cli("volume", "create", "-d", "image", "--size", "64M", "data")
    script = f"exec 3>/data/log; n=0; while :; do n=$((n+1)); echo $n >&3; {BUSYBOX} usleep 10000; done"
    node.cli("run", "-d", "--name", "c", "-v", "data:/data", image, "sh", "-c", script)
    node.cli("volume", "update", "--size", "256M", "data")
    assert not write(node, "c", "/data/big", 128)
    node.cli("stop", "-t", "0", "c")
    node.cli("volume", "verify", "data")
    lines = node.out("run", "--rm", "-v", "data:/data", image, "cat", "/data/log").split()
    assert lines == [str(number + 1) for number in range(len(lines))]


@dataclass
class Server:
    """A file server of Debian's on 192.0.2.1, which the machine's own namespace has; it is gone when its cable is pulled."""

    flags: list[str]
    directory: Path

    def cable(self, state: str) -> None:
        sh(f"ip link set nas {state}")


@contextmanager
def nfs(directory: Path) -> Iterator[list[str]]:
    Path("/etc/exports").write_text(f"{directory} *(rw,no_root_squash,no_subtree_check,fsid=1)\n")
    sh("systemctl start nfs-server; exportfs -ra; echo 1 > /proc/fs/nfsd/v4_end_grace || true")
    try:
        yield ["type=nfs", f"device=:{directory}", "o=addr=192.0.2.1,nfsvers=4.2"]
    finally:
        sh("exportfs -ua; systemctl stop nfs-server")
        Path("/etc/exports").write_text("")


@contextmanager
def smb(directory: Path) -> Iterator[list[str]]:
    settings = Path("/etc/samba/smb.conf")
    before = settings.read_text()
    settings.write_text(f"[global]\nserver min protocol = SMB3\n[share]\npath = {directory}\nread only = no\n")
    sh("printf 'secret\\nsecret\\n' | smbpasswd -s -a root; systemctl start smbd")
    try:
        yield ["type=cifs", "device=//192.0.2.1/share", "o=username=root,vers=3.1.1,password=secret"]
    finally:
        sh("systemctl stop smbd")
        settings.write_text(before)


@pytest.fixture(params=[nfs, smb], ids=["nfs", "smb"])
def server(request: pytest.FixtureRequest, node: Node, tmp_path: Path) -> Iterator[Server]:
    sh(
        f"ip link add nas type veth peer name nas netns {node.host.holder}; ip addr add 192.0.2.1/24 dev nas; ip link set nas up"
    )
    node.host.sh("ip addr add 192.0.2.2/24 dev nas; ip link set nas up")
    with request.param(tmp_path) as options:
        yield Server([flag for option in options for flag in ("-o", option)], tmp_path)
    sh("ip link del nas")


def test_a_server_that_is_gone_holds_nothing_up(server: Server, node: Node, image: str) -> None:
    node.cli("volume", "create", *server.flags, "-o", "timeout=30", "nas")
    node.cli("volume", "create", "plain")
    assert not status(node, "nas").get("staged")  # mounted at first use
    node.cli("run", "-d", "--name", "c", "-v", "nas:/data", "-v", "plain:/plain", image, "sleep", "1000")
    node.cli("exec", "c", "sh", "-c", "echo there > /data/file")
    assert (server.directory / "file").read_text() == "there\n"
    mountpoint = str(status(node, "nas")["mountpoint"])
    assert mountpoint in node.host.sh("findmnt -rno TARGET -t nfs4,cifs")

    server.cable("down")
    begun = time.monotonic()
    shown = node.cli("volume", "inspect", "nas", check=False)
    assert "did not end in" in shown.stdout
    assert time.monotonic() - begun < 10
    begun = time.monotonic()
    assert "nas" in node.out("volume", "ls")
    node.cli("run", "--rm", "-v", "plain:/plain", image, "true")
    assert json.loads(node.out("system", "check", "--format", "json")) == []
    assert time.monotonic() - begun < 30
    begun = time.monotonic()
    node.cli("rm", "-f", "c")
    assert time.monotonic() - begun < 60
    assert mountpoint not in node.host.sh("awk '{print $5}' /proc/self/mountinfo")
    begun = time.monotonic()
    failed = node.cli("run", "--rm", "-v", "nas:/data", image, "true", check=False)
    assert failed.returncode
    assert "reachable?" in failed.stderr  # whoever gives up first: mount, or we
    assert time.monotonic() - begun < 60

    server.cable("up")
    wait_until(lambda: "there" in node.cli("run", "--rm", "-v", "nas:/data", image, "cat", "/data/file", check=False).stdout,
               seconds=60, what="the server")  # fmt: skip
    assert json.loads(node.out("system", "check", "--format", "json")) == []
    node.cli("volume", "rm", "nas")
    assert (server.directory / "file").exists()
