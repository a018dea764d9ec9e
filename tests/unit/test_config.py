"""[cluster] of the configuration: every bad value is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from netstore.config import load
from netstore.errors import NetstoreError

GOOD = {
    "endpoints": '["https://10.0.0.1:2379", "https://[fd00::1]:2379"]', "ca": '"/ca"', "cert": '"/cert"', "key": '"/key"',
    "advertise": '"10.0.0.5"', "name": '"n1"', "data-path-port": "4789",
}  # fmt: skip


def write(path: Path, **changed: str | None) -> Path:
    values = {**GOOD, **{key.replace("_", "-"): value for key, value in changed.items()}}
    lines = [f"{key} = {value}" for key, value in values.items() if value is not None]
    path.write_text("\n".join(["[cluster]", *lines]))
    return path


def test_good(tmp_path: Path) -> None:
    cluster = load(write(tmp_path / "c.toml"), required=True).cluster
    assert cluster is not None
    assert cluster.advertise == "10.0.0.5"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"endpoints": '["http://10.0.0.1:2379"]'}, "http://10.0.0.1:2379"),
        ({"endpoints": '["https://10.0.0.1"]'}, "https://10.0.0.1"),
        ({"endpoints": "[]"}, "endpoints"),
        ({"endpoints": None}, "endpoints"),
        ({"ca": None}, "ca"),
        ({"advertise": '"n1.example"'}, "n1.example"),
        ({"advertise": '"0.0.0.0"'}, "0.0.0.0"),
        ({"advertise": '"127.0.0.1"'}, "127.0.0.1"),
        ({"name": '"a b"'}, "a b"),
        ({"data_path_port": "80"}, "80"),
        ({"data_path_port": "70000"}, "70000"),
        ({"token": '"x"'}, "token"),
    ],
)
def test_bad(tmp_path: Path, changed: dict[str, str | None], named: str) -> None:
    with pytest.raises(NetstoreError, match=named.replace(".", r"\.")):
        load(write(tmp_path / "c.toml", **changed), required=True)
