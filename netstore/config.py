"""netstored's configuration: a TOML file, and flags over it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec

from netstore.errors import NetstoreError

__all__ = ["Config", "TlsConfig", "load"]


class TlsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Files (PEM) for mutual TLS on TCP: our certificate and key, and who may call."""

    cert: str
    key: str
    ca: str


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename="kebab"):
    """The whole file. Keys are written with hyphens: `state-dir = "/var/lib/netstore"`."""

    state_dir: str = "/var/lib/netstore"
    run_dir: str = "/run/netstore"
    listen: list[str] = []
    """Addresses: unix:///path, or tcp://host:port, which needs [tls]. Empty: unix://RUN_DIR/netstore.sock."""
    group: str = "netstore"
    """Group that may use the unix socket; without such a group only root may."""
    log_format: str = "console"
    log_level: str = "info"
    tls: TlsConfig | None = None


def load(path: Path, *, required: bool) -> Config:
    """Read the file; one that is missing means the defaults, unless it was asked for.

    Raises:
        NetstoreError: it cannot be read, or a key or value is not known.
    """
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Config)
    except FileNotFoundError as error:
        if not required:
            return Config()
        raise NetstoreError(f"no such file: {path}", hint="correct --config, or leave it out") from error
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        known = ", ".join(field.encode_name for field in msgspec.structs.fields(Config))
        raise NetstoreError(f"reading {path}: {error}", hint=f"keys: {known}") from error
