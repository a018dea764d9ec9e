"""Archives of images as strangers write them: what they name is theirs alone, and what is no image is told."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from netstore.errors import InvalidArgument
from netstore.launcher.images.formats import import_archive
from netstore.launcher.images.layers import Layers


def tar(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def saved(path: Path, config: Any, **manifest: Any) -> Path:
    """Write what docker save would, of one layer."""
    entry = {"Config": "config.json", "RepoTags": ["x:1"], "Layers": ["layer.tar"], **manifest}
    members = {"manifest.json": json.dumps([entry]).encode(), "config.json": json.dumps(config).encode()}
    return tar(path, **members, **{"layer.tar": bytes(10240)})


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    found = Layers(tmp_path / "images")
    found.clean()
    return found


@pytest.mark.parametrize(
    "diff_id", ["/", "sha256:/", "sha256:/etc", "sha256:..", "sha256:.", "", "sha256:" + "A" * 64, "sha256:" + "a" * 63, 7]
)  # fmt: skip
def test_a_layer_is_a_digest_and_no_path(tmp_path: Path, layers: Layers, diff_id: Any) -> None:
    """An image whose layer is / would show a container the node's files, and its removal take them away."""
    config = {"rootfs": {"type": "layers", "diff_ids": [diff_id]}}
    with pytest.raises(InvalidArgument, match="diff_id") as refused:
        import_archive(saved(tmp_path / "image.tar", config), layers)
    assert refused.value.reason == "ARCHIVE_DAMAGED"


GOOD = {"rootfs": {"diff_ids": ["sha256:" + hashlib.sha256(bytes(10240)).hexdigest()]}}


@pytest.mark.parametrize(
    ("config", "manifest"),
    [
        (GOOD | {"config": []}, {}),
        (GOOD | {"config": ["x"]}, {}),
        (GOOD | {"config": {"Labels": 7}}, {}),
        ({"rootfs": ["x"]}, {}),
        (GOOD, {"RepoTags": "x"}),
        (GOOD, {"Layers": [["x"]]}),
        (GOOD, {"Layers": [{}]}),
        (GOOD, {"Config": {}}),
    ],
)  # fmt: skip
def test_documents_of_the_wrong_shape_are_damage(tmp_path: Path, layers: Layers, config: Any, manifest: Any) -> None:
    path = saved(tmp_path / "image.tar", config, **manifest)
    if config.get("config") == []:
        assert import_archive(path, layers)[0].names == ("x:1",)
        return
    with pytest.raises(InvalidArgument) as refused:
        import_archive(path, layers)
    assert refused.value.reason == "ARCHIVE_DAMAGED"


def test_documents_without_end_are_damage(tmp_path: Path, layers: Layers) -> None:
    with pytest.raises(InvalidArgument, match="JSON"):
        import_archive(tar(tmp_path / "x.tar", **{"manifest.json": b"[" * 100_000}), layers)
    index = json.dumps({"manifests": ["x"]}).encode()
    with pytest.raises(InvalidArgument, match="manifests"):
        import_archive(tar(tmp_path / "y.tar", **{"oci-layout": b"{}", "index.json": index}), layers)
