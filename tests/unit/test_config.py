"""[cluster] and [adapters] of the configuration: every bad value is named with its key and what is accepted."""

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
    ("key", "value", "named", "accepted"),
    [
        ("endpoints", '["http://10.0.0.1:2379"]', "'http://10.0.0.1:2379'", "https://10.0.0.1:2379"),
        ("endpoints", '["https://10.0.0.1"]', "'https://10.0.0.1'", "https://10.0.0.1:2379"),
        ("endpoints", "[]", "[]", "at least one"),
        ("endpoints", '"https://10.0.0.1:2379"', "'https://10.0.0.1:2379'", "array"),
        ("endpoints", "[1]", "1", "str"),
        ("endpoints", None, "is missing", "keys: endpoints, ca"),
        ("ca", None, "is missing", "keys: endpoints, ca"),
        ("ca", '"ca.pem"', "'ca.pem'", "absolute path"),
        ("cert", '""', "''", "absolute path"),
        ("key", "7", "7", "str"),
        ("advertise", '"n1.example"', "'n1.example'", "an address"),
        ("advertise", '"0.0.0.0"', "'0.0.0.0'", "an address"),
        ("advertise", '"127.0.0.1"', "'127.0.0.1'", "an address"),
        ("advertise", '"ff02::1"', "'ff02::1'", "an address"),
        ("name", '"a b"', "'a b'", "letters, digits"),
        ("name", f'"{"n" * 129}"', "nnn", "128 letters"),
        ("data-path-port", "80", "80", "1024 to 49151"),
        ("data-path-port", "70000", "70000", "1024 to 49151"),
        ("data-path-port", '"4789"', "'4789'", "int"),
        ("wireguard-port", "80", "80", "1024 to 65535"),
        ("wireguard-port", "4789", "4789", "neither data-path-port"),
        ("wireguard-port", "4790", "4790", "nor the next one"),
        ("wireguard-port", "65536", "65536", "1024 to 65535"),
        ("wireguard-port", "51820.0", "51820.0", "int"),
        ("key-rotation", '"0s"', "'0s'", "at least 1s"),
        ("key-rotation", '"900ms"', "'900ms'", "at least 1s"),
        ("key-rotation", '"soon"', "'soon'", "12h"),
        ("key-rotation", '"-1h"', "'-1h'", "12h"),
        ("key-rotation", "12", "12", "str"),
        (
            "token",
            '"x"',
            "is no key",
            "keys: endpoints, ca, cert, key, advertise, name, data-path-port, wireguard-port",
        ),
    ],
)
def test_bad(tmp_path: Path, key: str, value: str | None, named: str, accepted: str) -> None:
    with pytest.raises(NetstoreError) as refused:
        load(write(tmp_path / "c.toml", **{key: value}), required=True)
    assert key in refused.value.what
    assert "cluster" in refused.value.what
    assert named in refused.value.what
    assert accepted in refused.value.hint


@pytest.mark.parametrize(
    ("text", "named", "accepted"),
    [
        ("[adapters]\ncni = 'yes'", "adapters.cni: 'yes'", "bool"),
        ("[adapters]\nnetavark = 1", "adapters.netavark: 1", "bool"),
        ("[adapters]\nhook = []", "adapters.hook: []", "bool"),
        ("[adapters]\ndocker = true", "adapters.docker: True", "object"),
        ("[adapters]\nnosuch = 1", "adapters.nosuch is no key", "keys: cni, netavark"),
        ("[adapters.docker]\nsocket = 'x.sock'", "adapters.docker: socket 'x.sock'", "absolute path"),
        ("[adapters.docker]\nsocket = '/x'", "adapters.docker: socket '/x'", "ends with .sock"),
        ("[adapters.docker]\nsocket = 3", "adapters.docker.socket: 3", "str"),
        ("[adapters.docker]\nport = 3", "adapters.docker.port is no key", "keys: socket"),
        ("adapters = 3", "adapters: 3", "object"),
        ("nosuch = 3", "nosuch is no key", "keys: state-dir"),
        ("[[address-pool]]\nbase = 1\nsize = 24", "address-pool.0.base: 1", "str"),
        ("[[address-pool]]\nbase = '10.0.0.0/8'", "address-pool.0.size is missing", "keys: base, size"),
    ],
)
def test_what_else_is_bad(tmp_path: Path, text: str, named: str, accepted: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(NetstoreError) as refused:
        load(tmp_path / "c.toml", required=True)
    assert named in refused.value.what
    assert accepted in refused.value.hint
