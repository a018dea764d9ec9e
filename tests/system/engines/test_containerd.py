"""Debian's containerd, called as a kubelet calls it (CRI, runtime.v1): pods get their network by netstore-cni."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from conftest import Host, Node, wait_until
from test_cni import program_of

PEERS = Path(__file__).parents[3] / ".peers"
PATH = f"PATH={PEERS}/usr/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PAUSE = "docker.io/library/pause:1"
CAPABILITIES = dict.fromkeys(("portMappings", "bandwidth", "ips", "mac", "dns", "aliases"), True)
COMMAND = ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/data"]

needs_containerd = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        not (PEERS / "usr/bin/containerd").exists() or not (PEERS / "usr/lib/cni/loopback").exists(),
        reason="no containerd: scripts/peers docker.io containernetworking-plugins fetches it, as scripts/test does",
    ),
]
pytestmark = needs_containerd


def field(number: int, value: int | str | bytes) -> bytes:
    """Encode one field of a protobuf message: CRI's few that are needed here have no generated code."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(number: int) -> bytes:
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def pod(name: str, *more: bytes) -> bytes:
    """Encode a PodSandboxConfig in a RunPodSandboxRequest."""
    metadata = field(1, name) + field(2, f"uid-{name}") + field(3, "default")
    return field(1, field(1, metadata) + field(2, name) + b"".join(more) + field(8, b""))


def docker_archive(layer: Path, path: Path) -> None:
    """Write an image of one layer that serves /data."""
    data = layer.read_bytes()
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(data).hexdigest()}"]}
    config = {"architecture": "amd64", "os": "linux", "config": {"Cmd": COMMAND}, "rootfs": rootfs}
    manifest = [{"Config": "config.json", "RepoTags": [PAUSE], "Layers": ["layer.tar"]}]
    files = {
        "config.json": json.dumps(config).encode(),
        "layer.tar": data,
        "manifest.json": json.dumps(manifest).encode(),
    }
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@dataclass
class Containerd:
    """containerd in a host, whose pods are the image's server itself."""

    host: Host
    place: Path

    def configure(self, program: Path, more: str = "") -> None:
        place, plugins, networks = self.place, self.place / "bin", self.place / "net.d"
        for each in (plugins, networks):
            each.mkdir(parents=True)
        shutil.copy(program, plugins / "netstore-cni")
        shutil.copy(PEERS / "usr/lib/cni/loopback", plugins)
        plugin = {"type": "netstore-cni", "capabilities": CAPABILITIES,
                  "create": {"subnet": "10.80.0.0/24", "subnet6": "fd80::/64"}}  # fmt: skip
        listed = {"cniVersion": "1.0.0", "name": "pods", "plugins": [plugin]}
        (networks / "10-pods.conflist").write_text(json.dumps(listed))
        cri = '[plugins."io.containerd.grpc.v1.cri"'
        (place / "config.toml").write_text(
            f'version = 2\nroot = "{place}/root"\nstate = "{place}/state"\n[grpc]\naddress = "{place}/s"\n'
            f'[plugins."io.containerd.internal.v1.opt"]\npath = "{place}/opt"\n'
            f'{cri}]\nsandbox_image = "{PAUSE}"\nrestrict_oom_score_adj = true\n'
            f'{cri}.containerd]\nsnapshotter = "native"\n'
            f'{cri}.cni]\nbin_dir = "{plugins}"\nconf_dir = "{networks}"\n{more}'
        )

    @contextmanager
    def running(self, image: Path) -> Iterator[Containerd]:
        """Run a configured one, with the image of its pods."""
        with (self.place / "log").open("w") as log:
            command = self.host.command("env", PATH, "containerd", "-c", f"{self.place}/config.toml")
            daemon = subprocess.Popen(command, stderr=log, stdout=log)
        try:
            wait_until((self.place / "s").exists, what="containerd")
            docker_archive(image, self.place / "pause.tar")
            self.ctr("images", "import", "--snapshotter", "native", f"{self.place}/pause.tar")
            yield self
        finally:
            daemon.terminate()
            daemon.wait(timeout=30)

    def ctr(self, *args: str) -> str:
        return self.host.run("env", PATH, "ctr", "-a", f"{self.place}/s", "-n", "k8s.io", *args).stdout

    def call(self, method: str, request: bytes) -> bytes:
        with grpc.insecure_channel(f"unix:{self.place}/s") as channel:
            answer: bytes = channel.unary_unary(f"/runtime.v1.RuntimeService/{method}")(request, timeout=30)
            return answer

    def run(self, name: str, *more: bytes) -> str:
        """Run a pod and return its id, which is the answer's only field."""
        return self.call("RunPodSandbox", pod(name, *more))[2:].decode()

    def stop(self, pod_id: str) -> None:
        for method in ("StopPodSandbox", "StopPodSandbox", "RemovePodSandbox"):  # a kubelet repeats itself
            self.call(method, field(1, pod_id))


@pytest.fixture
def containerd(node: Node, busybox_tar: Path) -> Iterator[Containerd]:
    """A containerd with the image of its pods."""
    containerd = Containerd(node.host, node.place / "containerd")
    containerd.configure(program_of(node))
    with containerd.running(busybox_tar):
        yield containerd


def test_pods(containerd: Containerd, node: Node) -> None:
    """A pod has both families, a published port, its bandwidth; it ends with netstored away and back."""
    ports = field(5, field(2, 80) + field(3, 8080))
    bandwidth = field(7, field(1, "kubernetes.io/ingress-bandwidth") + field(2, "8M"))
    web = containerd.run("web-0", ports, bandwidth)
    status = containerd.call("PodSandboxStatus", field(1, web))
    assert field(1, "10.80.0.2") + field(2, field(1, "fd80::2")) in status
    wait_until(
        lambda: "image" in node.host.sh("ip netns exec neighbour curl -s -m2 203.0.113.1:8080/hello || true"),
        what="the port",
    )
    shown = json.loads(node.out("endpoint", "inspect", *node.out("endpoint", "ls", "-q").split()))[0]
    assert shown["name"] == "web-0"
    assert shown["spec"]["options"] == {"netstore.endpoint.bandwidth_in": "8000000"}
    other = containerd.run("web-1")
    assert "image" in node.host.sh("curl -s -m2 10.80.0.3/hello")
    node.kill()
    with pytest.raises(grpc.RpcError, match="is netstored running"):
        containerd.call("StopPodSandbox", field(1, web))
    assert "image" in node.host.sh("curl -s -m2 10.80.0.3/hello")
    node.start()
    for each in (web, other):
        containerd.stop(each)
    assert node.out("endpoint", "ls", "-q") == ""
    assert node.out("system", "check") == "kernel and store agree"


def test_refused_pods(containerd: Containerd, node: Node) -> None:
    """A pod whose port is taken fails with the reason, and leaves nothing."""
    ports = field(5, field(2, 80) + field(3, 8080))
    first = containerd.run("web-0", ports)
    with pytest.raises(grpc.RpcError, match=r"host port .*8080/tcp is taken by endpoint web-0"):
        containerd.run("web-1", ports)
    assert len(node.out("endpoint", "ls", "-q").split()) == 1
    containerd.stop(first)
    containerd.stop(containerd.run("web-1", ports))
    assert node.out("endpoint", "ls", "-q") == ""
