"""Images from a registry: Debian's docker-registry on the neighbour, spoken to by skopeo."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import BIN, Host, Node, wait_until

REGISTRY = Path(__file__).parents[2] / ".peers/usr/bin/docker-registry"
pytestmark = pytest.mark.skipif(
    not REGISTRY.exists(), reason="no registry: scripts/peers docker-registry fetches it, as scripts/test does"
)
SECRET = "someone:$2b$04$bqDEix.XjnkwjVTf0F6Mze3WbWbyi6qd9U9e34l3tLtQ14HY78222"  # bcrypt of "secret"
Serve = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def serve(host: Host, place: Path) -> Iterator[Serve]:
    """Start the registry, with a part of its configuration; netstored finds it insecure, which is configured."""
    settings = place / "containers"
    settings.mkdir()
    (settings / "registries.conf").write_text('[[registry]]\nlocation = "203.0.113.2:5000"\ninsecure = true\n')
    (settings / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    host.sh(f"mount --bind {settings} /etc/containers")
    started: list[subprocess.Popen[bytes]] = []

    def start(auth: str) -> subprocess.Popen[bytes]:
        for each in started:
            each.kill()
            each.wait()
        config = place / "registry.yml"
        config.write_text(
            f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {place}/registry}}}}\n"
            f"http: {{addr: ':5000'}}\nlog: {{level: error}}\n{auth}"
        )
        command = host.command("ip", "netns", "exec", "neighbour", str(REGISTRY), "serve", str(config))
        with (place / "registry.log").open("ab") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
        wait_until(lambda: host.sh("curl -s -m 1 http://203.0.113.2:5000/v2/ || true"), what="the registry")
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.wait()


def push(host: Host, busybox_tar: Path, place: Path) -> None:
    """Make an OCI layout of a root filesystem, and push it as web:1."""
    layout, root = place / "layout", place / "root.tar"
    script = """
import hashlib, json, pathlib, sys
layout, tar = map(pathlib.Path, sys.argv[1:])
blobs = layout / "blobs/sha256"; blobs.mkdir(parents=True)
def blob(data):
    name = hashlib.sha256(data).hexdigest(); (blobs / name).write_bytes(data)
    return {"digest": f"sha256:{name}", "size": len(data)}
layer = blob(tar.read_bytes())
config = blob(json.dumps({"architecture": "amd64", "os": "linux", "config": {"Cmd": ["cat", "/data/hello"]},
                          "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]}}).encode())
kind = "application/vnd.oci.image."
manifest = blob(json.dumps({"schemaVersion": 2, "mediaType": kind + "manifest.v1+json",
    "config": {"mediaType": kind + "config.v1+json", **config},
    "layers": [{"mediaType": kind + "layer.v1.tar", **layer}]}).encode())
(layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [
    {"mediaType": kind + "manifest.v1+json", **manifest}]}))
(layout / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
"""
    root.symlink_to(busybox_tar)
    host.run("python3", "-c", script, str(layout), str(root))
    host.run(
        "skopeo",
        "copy",
        "--insecure-policy",
        "--dest-tls-verify=false",
        f"oci:{layout}",
        "docker://203.0.113.2:5000/shop/web:1",
    )


def test_pull(serve: Serve, node: Node, busybox_tar: Path) -> None:
    registry = serve("")
    push(node.host, busybox_tar, node.place)
    pulled = node.cli("pull", "203.0.113.2:5000/shop/web:1")
    assert pulled.stdout.strip() == "203.0.113.2:5000/shop/web:1"
    assert "Copying blob" in pulled.stderr
    assert "203.0.113.2:5000/shop/web" in node.out("images")
    assert node.out("run", "--rm", "203.0.113.2:5000/shop/web:1") == "from the image"
    node.cli("image", "rm", "203.0.113.2:5000/shop/web:1")
    run = node.cli("run", "--rm", "203.0.113.2:5000/shop/web:1")  # missing: pulled first
    assert run.stdout == "from the image\n"
    assert "pulling it" in run.stderr

    for name, word in (("shop/web:2", "none of that name and tag"), ("nosuch:1", "none of that name and tag")):
        refused = node.cli("run", "--rm", f"203.0.113.2:5000/{name}", check=False)
        assert refused.returncode == 125
        assert word in refused.stderr
    never = node.cli("run", "--pull", "never", "203.0.113.2:5000/shop/web:3", check=False)
    assert "no such image" in never.stderr
    registry.kill()
    registry.wait()
    away = node.cli("pull", "-q", "203.0.113.2:5000/shop/web:1", check=False)
    assert away.returncode == 1
    assert "registry 203.0.113.2:5000 is not reachable" in away.stderr
    assert list((node.place / "state/images/tmp").iterdir()) == []


def test_pull_with_a_login(serve: Serve, node: Node, busybox_tar: Path) -> None:
    serve("")
    push(node.host, busybox_tar, node.place)
    (node.place / "htpasswd").write_text(SECRET + "\n")
    serve(f"auth: {{htpasswd: {{realm: shop, path: {node.place}/htpasswd}}}}\n")
    image = "203.0.113.2:5000/shop/web:1"
    refused = node.cli("pull", image, check=False)
    assert "203.0.113.2:5000 refuses to give" in refused.stderr
    assert "skopeo login 203.0.113.2:5000" in refused.stderr
    wrong = node.cli("pull", "-u", "someone", image, check=False, stdin="guess\n")
    assert "refuses to give" in wrong.stderr
    assert node.cli("pull", "-u", "someone", image, stdin="secret\n").stdout.strip().endswith(image)


def test_a_pull_that_is_given_up_leaves_nothing(serve: Serve, node: Node, place: Path) -> None:
    serve("").send_signal(signal.SIGSTOP)
    command = [str(BIN / "netstore"), "--host", node.address, "pull", "-q", "203.0.113.2:5000/shop/web:1"]
    pull = subprocess.Popen(node.host.command(*command))
    tmp = place / "state/images/tmp"
    wait_until(lambda: any(tmp.iterdir()))
    pull.kill()
    pull.wait()
    wait_until(lambda: not any(tmp.iterdir()))
    wait_until(lambda: "skopeo" not in node.host.sh("ps -eo args"))
