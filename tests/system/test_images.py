"""Archives of images as skopeo and docker write them: layers, whiteouts, configuration."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from conftest import Node


def _layer(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """An OCI layout of two layers; the upper one hides a file and a directory's content."""
    busybox = Path("/bin/busybox").read_bytes()
    lower = _layer({"bin/sh": busybox, "keep": b"1", "gone": b"2", "dir/old": b"3"})
    upper = _layer({".wh.gone": b"", "dir/.wh..wh..opq": b"", "dir/new": b"4"})
    root = tmp_path / "layout"
    (root / "blobs/sha256").mkdir(parents=True)

    def blob(data: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (root / "blobs/sha256" / digest).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    config = {
        "architecture": "amd64", "os": "linux",
        "config": {"Cmd": ["sh", "-c", "echo $GREETING; pwd"], "Env": ["GREETING=hello"], "WorkingDir": "/made/here",
                   "Labels": {"a": "b"}, "ExposedPorts": {"80/tcp": {}}},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(each).hexdigest()}" for each in (lower, upper)]},
    }  # fmt: skip
    manifest = {
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": [blob(each, "application/vnd.oci.image.layer.v1.tar") for each in (lower, upper)],
    }  # fmt: skip
    entry = blob(json.dumps(manifest).encode(), manifest["mediaType"])  # type: ignore[arg-type]
    entry["annotations"] = {"org.opencontainers.image.ref.name": "two:layers"}
    (root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return root


def check(node: Node, name: str) -> None:
    assert node.out("run", "--rm", name) == "hello\n/made/here"
    listed = node.out(
        "run", "--rm", name, "sh", "-c", "for f in /keep /gone /dir/old /dir/new; do [ -e $f ] && echo $f; done; true"
    )
    assert listed.split() == ["/keep", "/dir/new"]
    found = json.loads(node.out("image", "inspect", name))[0]
    assert found["spec"]["config"]["exposed_ports"] == ["80/tcp"]
    assert found["labels"] == {"a": "b"}


def test_layout_directory(node: Node, layout: Path) -> None:
    node.cli("image", "import", str(layout))
    check(node, "two:layers")


@pytest.mark.parametrize("kind", ["docker-archive", "oci-archive"])
def test_what_skopeo_writes(node: Node, layout: Path, tmp_path: Path, kind: str) -> None:
    tar = tmp_path / "image.tar"
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", f"oci:{layout}:two:layers", f"{kind}:{tar}:two:layers"],
        check=True, capture_output=True,
    )  # fmt: skip
    assert node.out("image", "load", "-i", str(tar)) == "Loaded image: two:layers"
    check(node, "two:layers")
    node.cli("image", "rm", "two:layers")
    assert list((node.place / "state/images/layers").iterdir()) == []


def test_a_blob_that_is_not_what_it_says(node: Node, layout: Path) -> None:
    biggest = max((layout / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(biggest.read_bytes())
    data[5000] ^= 1
    biggest.write_bytes(data)
    refused = node.cli("image", "import", str(layout), check=False)
    assert refused.returncode == 1
    assert "not what its digest says" in refused.stderr
    assert list((node.place / "state/images/layers").iterdir()) == []
