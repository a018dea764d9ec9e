"""The OCI hook under engines: podman with its hooks' directory, containerd by ctr and as a kubelet calls it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import Node, wait_until
from oci_bundle import configuration, hooks
from podman_engine import HTTPD, Podman, needs_podman, running
from test_cni import program_of
from test_containerd import PATH, Containerd, field, needs_containerd

FETCH = "ip netns exec neighbour curl -s -m2 203.0.113.1:8080/hello || true"


def for_containerd(test: Any) -> Any:
    for mark in needs_containerd:
        test = mark(test)
    return test


def left(node: Node) -> list[str]:
    return [*node.out("endpoint", "ls", "-q").split(), *node.out("volume", "mounts", "-q").split()]


@pytest.fixture
def prepared(node: Node) -> Node:
    """A node with a network and a volume."""
    node.cli("network", "create", "--subnet", "10.1.0.0/24", "app")
    node.cli("volume", "create", "data")
    return node


@pytest.fixture
def podman(prepared: Node, busybox_tar: Path) -> Iterator[Podman]:
    """A podman that has no network plugin."""
    podman = Podman(prepared.host, prepared.place / "podman")
    podman.place.mkdir()
    podman.configure('network_backend = "cni"')
    (podman.place / "hooks.d").mkdir()
    for stage, (hook,) in hooks(prepared).items():
        wanted = {
            "version": "1.0.0",
            "hook": hook,
            "when": {"annotations": {"^io\\.netstore\\.": ".*"}},
            "stages": [stage],
        }
        (podman.place / f"hooks.d/{stage}.json").write_text(json.dumps(wanted))
    with running(podman, busybox_tar):
        yield podman


@needs_podman
@pytest.mark.timeout(240)
def test_podman(prepared: Node, podman: Podman) -> None:
    node, place = prepared, podman.place
    (place / "resolv.conf").write_text("nameserver 127.0.0.11\n")
    hooked = ("--hooks-dir", f"{place}/hooks.d")  # podman reads it when a container starts
    base = ("create", "--network", "none", "-v", f"{place}/resolv.conf:/etc/resolv.conf")

    def create(name: str, *asked: str) -> None:
        annotations = [flag for each in asked for flag in ("--annotation", f"io.netstore.{each}")]
        told = f"run.oci.hooks.stderr={place}/told"  # crun throws away what hooks say, podman what crun says
        podman(*hooked, *base, "--name", name, *annotations, "--annotation", told, *HTTPD[:-1], "/data")

    create("web", "networks=app ip=10.1.0.5", "ports=8080:80", "volumes=data:/data/volume", "name=web")
    create("peer", "networks=app", "volumes=data:/volume:ro")
    for each in ("web", "peer"):
        podman(*hooked, "start", each)
    wait_until(lambda: node.host.sh(FETCH) == "from the image\n", what="the port")
    podman("exec", "web", "/bin/sh", "-c", "echo kept > /data/volume/file")
    assert podman("exec", "peer", "/bin/wget", "-qO-", "http://web/volume/file") == "kept"
    assert podman("exec", "peer", "/bin/cat", "/volume/file") == "kept"
    create("bad", "networks=app ip=10.1.0.5")
    with pytest.raises(pytest.fail.Exception, match="error executing hook"):
        podman(*hooked, "start", "bad")
    assert "10.1.0.5 of network app is taken" in (place / "told").read_text()
    podman(*hooked, "stop", "-t0", "web")
    wait_until(lambda: len(node.out("endpoint", "ls", "-q").split()) == 1, what="poststop")
    podman(*hooked, "start", "web")
    wait_until(lambda: node.host.sh(FETCH) == "from the image\n", what="the port, once more")
    podman("rm", "-af", "-t0")
    assert left(node) == []
    assert node.out("system", "check") == "kernel and store agree"


@pytest.fixture
def containerd(prepared: Node, busybox_tar: Path) -> Iterator[Containerd]:
    """A containerd whose containers have the hook."""
    containerd = Containerd(prepared.host, prepared.place / "containerd")
    runtime = '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]'
    containerd.configure(
        program_of(prepared),
        f'{runtime}\nruntime_type = "io.containerd.runc.v2"\nbase_runtime_spec = "{containerd.place}/spec.json"\n'
        'pod_annotations = ["io.netstore.*"]\ncontainer_annotations = ["io.netstore.*"]\n',
    )
    spec = json.loads(prepared.host.run("env", PATH, "ctr", "oci", "spec").stdout)
    (containerd.place / "spec.json").write_text(json.dumps(spec | {"hooks": hooks(prepared)}))
    with containerd.running(busybox_tar):
        yield containerd


def _pod(*annotations: str) -> bytes:
    pairs = (each.split("=", 1) for each in annotations)
    return b"".join(field(7, field(1, f"io.netstore.{key}") + field(2, value)) for key, value in pairs)


@for_containerd
def test_kubernetes(prepared: Node, containerd: Containerd) -> None:
    """A pod has its networks beside that of CNI, once the first container with the hook comes; a container its volumes."""
    node = prepared
    asked = _pod(
        "networks=app,ip=10.1.0.5,ifname=app0,gw-priority=1", "ports=8080:80", "volumes=data:/volume", "name=web"
    )

    def start(pod: str, name: str) -> str:
        metadata = field(1, field(1, "web") + field(2, "uid-web") + field(3, "default"))
        image, command = field(2, field(1, "docker.io/library/pause:1")), field(3, "/bin/sleep") + field(3, "1000")
        config = field(1, field(1, name)) + image + command + field(15, b"")
        request = field(1, pod) + field(2, config) + field(3, metadata + asked + field(8, b""))
        container = containerd.call("CreateContainer", request)[2:].decode()
        containerd.call("StartContainer", field(1, container))
        return container

    pod = containerd.run("web", asked)
    first, second = start(pod, "first"), start(pod, "second")
    wait_until(lambda: node.host.sh(FETCH) == "from the image\n", what="the port")
    assert len(node.out("volume", "mounts", "-q").split()) == 2
    command = ["/bin/sh", "-c", "ip addr show app0; echo kept > /volume/file"]
    inside = field(1, second) + b"".join(field(2, each) for each in command) + field(3, 5)
    assert "10.1.0.5/24" in containerd.call("ExecSync", inside).decode(errors="replace")
    containerd.call("StopContainer", field(1, first) + field(2, 0))
    wait_until(lambda: len(node.out("volume", "mounts", "-q").split()) == 1, what="poststop")
    node.cli("system", "check", "--repair")  # finds nothing: the pod lives
    assert node.host.sh(FETCH) == "from the image\n"
    containerd.stop(pod)
    again = containerd.run("web-again", asked)
    start(again, "first")  # the address is free although nobody told
    containerd.stop(again)
    node.cli("system", "check", "--repair")
    assert left(node) == []
    bad = containerd.run("bad", _pod("networks=nosuch"))
    asked = _pod("networks=nosuch")
    with pytest.raises(grpc.RpcError, match="no such network: nosuch"):
        start(bad, "first")
    containerd.stop(bad)
    assert left(node) == []


@for_containerd
def test_ctr(prepared: Node, containerd: Containerd, busybox_tar: Path) -> None:
    node, place = prepared, prepared.place / "ctr"
    node.host.sh(f"mkdir -p {place}/rootfs; tar -C {place}/rootfs -xf {busybox_tar}")
    asked = {"io.netstore.networks": "app", "io.netstore.ports": "8080:80", "io.netstore.volumes": "data:/volume"}
    spec = configuration(node, asked, root={"path": f"{place}/rootfs"})
    (place / "config.json").write_text(json.dumps(spec))
    containerd.ctr("run", "--detach", "--null-io", "--config", f"{place}/config.json", "web")
    wait_until(lambda: node.host.sh(FETCH) == "from the image\n", what="the port")
    assert len(left(node)) == 2
    containerd.ctr("tasks", "kill", "-s", "KILL", "web")
    wait_until(lambda: "STOPPED" in containerd.ctr("tasks", "ls"), what="the end")
    containerd.ctr("tasks", "rm", "web")
    containerd.ctr("containers", "rm", "web")
    assert left(node) == []
