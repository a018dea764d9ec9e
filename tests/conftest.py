"""Fixtures: a "host" (network and mount namespace held by a process) and daemons in it. pytest itself never moves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import commands
import grpc
import pytest
from hypothesis import settings

from netstore.client import BlockingClient as Client

settings.register_profile("suite", deadline=None)  # how long a test takes says what else the machine does
settings.load_profile("suite")

BIN = Path(sys.executable).parent
SLOWER = 6 if "NETSTORE_TEST_LAB" in os.environ else 3  # an emulated machine; a machine that has much else to do


def wait_until(condition: Callable[[], object], *, seconds: float = 10.0, what: str = "") -> None:
    """Wait for a condition, looking often; fail when it does not come true."""
    end = time.monotonic() + SLOWER * seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"timed out waiting: {what or condition}")
        time.sleep(0.02)


def _snapshot() -> dict[str, list[str]]:
    def lines(command: str) -> list[str]:
        return sorted(subprocess.run(command, shell=True, capture_output=True, text=True).stdout.split("\n"))

    return {
        "links": lines("ip -o link | sed 's/^[0-9]*: //; s/ .*//'"),
        "namespaces": lines("ip netns list"),
        "tables": lines("nft list tables"),
        "mounts": lines("awk '{print $5}' /proc/self/mountinfo"),
        "loops": lines(f"losetup -nlO NAME,BACK-FILE | grep -F {tempfile.gettempdir()}/"),  # other runs have their own
        "cgroups": lines("ls -d /sys/fs/cgroup/*/netstore /sys/fs/cgroup/netstore 2>/dev/null"),
        # Without their ids: what several tests share may be restarted by one.
        "processes": lines("pgrep -a 'conmon|crun|netstored|netstore-resolv' | grep -v '<defunct>' | cut -d' ' -f2-"),
    }


def _changed(before: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return what came (+) and went (-) of each sort. Of mounts, what came: somebody else on the machine who removes a
    mount point, or puts a file in its place, takes the mount from every namespace (rmdir(2), rename(2)).
    """
    after, changed = _snapshot(), {}
    for kind in before:
        came, went = Counter(after[kind]) - Counter(before[kind]), Counter(before[kind]) - Counter(after[kind])
        if came or (went and kind != "mounts"):
            changed[kind] = [f"+{each}" for each in came.elements()] + [f"-{each}" for each in went.elements()]
    return changed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave what needs a machine of its own, or several, to scripts/lab."""
    needed = {"lab": "NETSTORE_TEST_LAB", "machines": "NETSTORE_TEST_MACHINES"}
    for item in items:
        if needed.get(item.path.parent.name, "PATH") not in os.environ:
            item.add_marker(pytest.mark.skip(reason="needs a machine of its own: scripts/lab"))


@pytest.fixture(autouse=True)
def leaks() -> Iterator[None]:
    """Fail a test that leaves something on the machine."""
    before, descriptors = _snapshot(), len(os.listdir("/proc/self/fd"))
    yield
    end = time.monotonic() + 10 * SLOWER  # what ends by itself, soon, is no leak
    while (changed := _changed(before)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not changed
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 6  # gRPC keeps its pollers, asyncio's too


@contextmanager
def new_place() -> Iterator[Path]:
    """Make a directory that unprivileged processes can pass through, as /var/lib is."""
    path = Path(tempfile.mkdtemp(prefix="netstore-test-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def place() -> Iterator[Path]:
    """See `new_place`."""
    with new_place() as path:
        yield path


@dataclass
class Host:
    """A machine as tests see it: 203.0.113.1 with an uplink to `neighbour`, 203.0.113.2."""

    holder: int
    place: Path
    namespaces: list[str] = field(default_factory=list)

    def command(self, *args: str) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.holder}/ns/net", f"--mount=/proc/{self.holder}/ns/mnt", "--", *args]

    def run(self, *args: str, check: bool = True, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(self.command(*args), capture_output=True, text=True, timeout=SLOWER * timeout)
        if check and done.returncode:
            pytest.fail(f"{args}: {done.stdout}{done.stderr}")
        return done

    def sh(self, text: str, *, check: bool = True) -> str:
        return self.run("sh", "-c", text, check=check).stdout

    def netns(self, name: str) -> str:
        self.run("ip", "netns", "add", name)
        return f"/run/netns/{name}"


@pytest.fixture
def host(place: Path) -> Iterator[Host]:
    """A host namespace with an uplink; everything in it ends with its holder."""
    holder = subprocess.Popen(["unshare", "-nm", "--propagation", "private", "sleep", "infinity"])
    own = os.readlink("/proc/self/ns/net")
    wait_until(lambda: os.readlink(f"/proc/{holder.pid}/ns/net") != own, what="the host's namespace")
    wait_until(lambda: Path(f"/proc/{holder.pid}/comm").read_text() == "sleep\n", what="the host's holder")
    host = Host(holder.pid, place)
    host.sh(
        "ip link set lo up; mkdir -p /run/netns; mount -t tmpfs netns /run/netns; ip netns add neighbour;"
        "ip link add uplink type veth peer name eth0 netns neighbour;"
        "ip addr add 203.0.113.1/24 dev uplink; ip link set uplink up;"
        "ip -n neighbour addr add 203.0.113.2/24 dev eth0; ip -n neighbour link set eth0 up;"
        "ip route add default via 203.0.113.2"
    )
    yield host
    holder.kill()
    holder.wait()


@dataclass
class Node:
    """netstored and netstore-resolver in a host."""

    host: Host
    place: Path
    daemon: subprocess.Popen[bytes] | None = None
    resolver: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"unix://{self.place}/run/netstore.sock"

    def start_resolver(self) -> None:
        self.resolver = self._spawn("netstore-resolver", "--upstream", "203.0.113.2")

    def start(self, *flags: str) -> None:
        if "--config" not in flags:  # the resolver is ours to start: it has another upstream
            config = self.place / "unmanaged.toml"
            config.write_text("[resolver]\nmanage = false\n")
            flags = ("--config", str(config), *flags)
        self.daemon = self._spawn("netstored", "--log-format", "json", *flags)
        with grpc.insecure_channel(self.address.replace("unix://", "unix:")) as channel:
            grpc.channel_ready_future(channel).result(timeout=20 * SLOWER)

    def _spawn(self, name: str, *flags: str) -> subprocess.Popen[bytes]:
        log = (self.place / f"{name}.log").open("ab")
        with log:
            return subprocess.Popen(self.host.command(*self.command(name, *flags)), stderr=log, stdout=log)

    def command(self, name: str, *flags: str) -> list[str]:
        return [str(BIN / name), "--state-dir", str(self.place / "state"), "--run-dir", str(self.place / "run"), *flags]

    def kill(self) -> None:
        assert self.daemon
        self.daemon.kill()
        self.daemon.wait()

    def stop(self) -> None:
        for process in (self.daemon, self.resolver):
            if process and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=20 * SLOWER)

    def log(self) -> str:
        return (self.place / "netstored.log").read_text()

    def cli(self, *args: str, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        command, timeout = [str(BIN / "netstore"), "--host", self.address, *args], 50.0 * SLOWER
        done = commands.run(self.host.holder, command, stdin=stdin, timeout=timeout) or subprocess.run(
            self.host.command(*command), capture_output=True, text=True, timeout=timeout, input=stdin
        )
        if check and done.returncode:
            pytest.fail(f"netstore {' '.join(args)}: {done.stdout}{done.stderr}\n{self.log()[-2000:]}")
        return done

    def out(self, *args: str) -> str:
        return self.cli(*args).stdout.strip()


@pytest.fixture
def node(host: Host, place: Path) -> Iterator[Node]:
    """A running node; its containers are removed in the end."""
    node = Node(host, place)
    node.start_resolver()
    node.start()
    yield node
    if node.daemon and node.daemon.poll() is not None:
        node.start()
    containers = node.out("ps", "-aq").split()
    if containers:
        node.cli("rm", "-f", "-v", *containers)
    node.stop()


@pytest.fixture
def client(node: Node) -> Iterator[Client]:
    """The API of a node."""
    client = Client(node.address)
    yield client
    client.channel.close()


@pytest.fixture(scope="session")
def busybox_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root filesystem of Debian's static busybox."""
    root = tmp_path_factory.mktemp("busybox")
    for name in ("bin", "etc", "tmp", "data"):
        (root / name).mkdir()
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for name in ("sh", "cat", "sleep", "wget", "httpd", "ip", "id", "ls", "echo", "nslookup", "ping", "mount", "ps", "env",
                 "stat", "touch", "true", "kill", "pwd", "hostname"):  # fmt: skip
        (root / "bin" / name).symlink_to("busybox")
    (root / "data/hello").write_text("from the image\n")
    os.chown(root / "data/hello", 1000, 1000)
    (root / "data/hello").chmod(0o640)
    os.link(root / "data/hello", root / "data/twin")
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/data:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\napp:x:1000:\nextra:x:2000:app\n")
    (root / "etc/noexec").write_text("no program\n")
    tar = root.with_suffix(".tar")
    subprocess.run(["tar", "-C", root, "--xattrs", "-cf", tar, "."], check=True)
    return tar


@pytest.fixture
def image(node: Node, busybox_tar: Path) -> str:
    """An image on the node."""
    node.cli("image", "import", str(busybox_tar), "bb", "--cmd", "sleep 1000")
    return "bb"
