"""netstored's configuration: a TOML file, and flags over it."""

from __future__ import annotations

import re
import tomllib
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import msgspec

from netstore.durations import parse_duration
from netstore.errors import NetstoreError

__all__ = ["ClusterConfig", "Config", "ResolverConfig", "TlsConfig", "VolumesConfig", "load"]


class TlsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Files (PEM) for mutual TLS on TCP: our certificate and key, and who may call."""

    cert: str
    key: str
    ca: str


class AddressPoolConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """Where networks without a subnet get theirs: `size` is the prefix length of what is cut from `base`, a CIDR."""

    base: str
    size: int


class ResolverConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """How names are answered.

    `manage`: netstored starts netstore-resolver where nobody else did, and again when it ends. The others are flags of
    the netstore-resolver that it starts; `upstream` [] means the host's name servers.
    """

    manage: bool = True
    user: str = "nobody"
    upstream: list[str] = []
    resolv_conf: str = "/etc/resolv.conf"


class FirewallConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename="kebab"):
    """[firewall]: `docker-user` lets our networks through Docker's default drop, by rules in DOCKER-USER."""

    docker_user: bool = False


def _refused(key: str, value: object, accepted: str) -> NetstoreError:
    return NetstoreError(f"cluster: {key} {value!r} is not accepted", hint=accepted)


class ClusterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename="kebab"):
    """[cluster]: `endpoints` are etcd's, https://HOST:PORT; `ca`, `cert` and `key` files (PEM) for mutual TLS with it.

    `advertise` is the node's address for the tunnels of others, `data-path-port` their UDP port, the same on every
    node; `name` "" means the host name. `wireguard-port` is that of what is encrypted, the same on every node;
    `key-rotation` is how long a node uses one key of it.
    """

    endpoints: list[str]
    ca: str
    cert: str
    key: str
    advertise: str
    name: str = ""
    data_path_port: int = 4789
    wireguard_port: int = 51820
    key_rotation: str = "12h"

    def check(self) -> None:
        """Check the values.

        Raises:
            NetstoreError: naming the first that will not do.
        """
        for each in self.endpoints:
            if not re.fullmatch(r"https://[^/\s]+:\d{1,5}/?", each):
                raise _refused("endpoints", each, "https://10.0.0.1:2379 and its like")
        if not self.endpoints:
            raise _refused("endpoints", self.endpoints, '["https://10.0.0.1:2379", …], at least one')
        for key in ("ca", "cert", "key"):
            if not getattr(self, key).startswith("/"):
                raise _refused(key, getattr(self, key), "the absolute path of a PEM file")
        accepted = "an address of this node's own that the others reach, such as 10.0.0.1"
        try:
            address = ip_address(self.advertise)
        except ValueError as error:
            raise _refused("advertise", self.advertise, accepted) from error
        if address.is_unspecified or address.is_loopback or address.is_multicast:
            raise _refused("advertise", self.advertise, accepted)
        if self.name and not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}", self.name):
            raise _refused("name", self.name, "at most 128 letters, digits and _.-, a letter or digit first")
        if not 1024 <= self.data_path_port <= 49151:
            raise _refused("data-path-port", self.data_path_port, "1024 to 49151")
        if not 1024 <= self.wireguard_port <= 65535 or self.wireguard_port in (
            self.data_path_port, self.data_path_port + 1,
        ):  # fmt: skip
            accepted = "1024 to 65535, neither data-path-port nor the next one"
            raise _refused("wireguard-port", self.wireguard_port, accepted)
        self.rotation_seconds()

    def rotation_seconds(self) -> float:
        """Return how long a key is used.

        Raises:
            NetstoreError: it is no duration, or none to speak of.
        """
        try:
            if (seconds := parse_duration(self.key_rotation)) < 1:
                raise ValueError(seconds)
        except ValueError as error:
            raise _refused("key-rotation", self.key_rotation, "a duration of at least 1s, such as 12h") from error
        return seconds


class VolumesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename="kebab"):
    """[volumes]: `btrfs_pool` is the device of the driver btrfs, or the size of a pool file, such as 50G; `trash` is
    how long removed volumes can come back, such as 24h.
    """

    btrfs_pool: str = ""
    trash: str = "0s"

    def trash_seconds(self) -> float:
        """Return how long removed volumes stay in the trash.

        Raises:
            NetstoreError: it is no duration.
        """
        try:
            return parse_duration(self.trash)
        except ValueError as error:
            raise NetstoreError(f"volumes: trash {self.trash!r} is not accepted", hint=str(error)) from error


class DockerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[adapters.docker]: `socket` is where dockerd looks for the plugin; its name is the plugin's."""

    socket: str = "/run/docker/plugins/netstore.sock"

    def check(self) -> None:
        """Check the values.

        Raises:
            NetstoreError: naming the first that will not do.
        """
        if not re.fullmatch(r"/.{1,99}\.sock", self.socket):
            accepted = "an absolute path of at most 107 bytes that ends with .sock, as dockerd looks for it"
            raise NetstoreError(f"adapters.docker: socket {self.socket!r} is not accepted", hint=accepted)


class AdaptersConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename="kebab"):
    """[adapters]: foreign protocols that are served. `cni`: RUN_DIR/cni.sock, for the program netstore-cni; `netavark`:
    RUN_DIR/netavark.sock, for the same program under the name by which podman calls it. `hook`: RUN_DIR/hook.sock, for
    `netstore hook`. `docker`: a plugin for dockerd, whose firewall lets our networks through then, as with
    `docker-user`; with [cluster] also RUN_DIR/docker-swarm.sock, for the managed plugin of its swarm.
    """

    cni: bool = True
    netavark: bool = True
    hook: bool = True
    docker: DockerConfig | None = None


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
    resolver: ResolverConfig = ResolverConfig()
    address_pool: list[AddressPoolConfig] = []
    """[[address-pool]] tables; a family without one has Docker's pools (IPv4), or the node's own /48 (IPv6)."""

    default_network_opts: dict[str, dict[str, str]] = {}
    """[default-network-opts.DRIVER] tables: options of the networks of a driver that do not give them, as Docker's."""

    volumes: VolumesConfig = VolumesConfig()
    cluster: ClusterConfig | None = None
    """Without it the node is on its own."""
    firewall: FirewallConfig = FirewallConfig()
    adapters: AdaptersConfig = AdaptersConfig()

    @property
    def admits_docker(self) -> bool:
        """Whether our networks are let through Docker's forward chain."""
        return self.firewall.docker_user or self.adapters.docker is not None

    def address_pools(self) -> list[tuple[IPv4Network | IPv6Network, int]]:
        """Return the address pools, checked.

        Raises:
            NetstoreError: one is no network, or its size does not fit.
        """
        pools = []
        for each in self.address_pool:
            try:
                base = ip_network(each.base)
            except ValueError as error:
                raise NetstoreError(f"address-pool: base {each.base!r}: {error}", hint="write 10.64.0.0/12") from error
            widest = 30 if base.version == 4 else 126
            if not base.prefixlen <= each.size <= widest:
                raise NetstoreError(
                    f"address-pool: size {each.size} does not fit {base}", hint=f"{base.prefixlen} to {widest}"
                )
            pools.append((base, each.size))
        return pools


def load(path: Path, *, required: bool) -> Config:
    """Read the file; one that is missing means the defaults, unless it was asked for.

    Raises:
        NetstoreError: it cannot be read, or a key or value is not known.
    """
    try:
        data = tomllib.loads(path.read_text())
        found = msgspec.convert(data, Config)
    except FileNotFoundError as error:
        if not required:
            return Config()
        raise NetstoreError(f"no such file: {path}", hint="correct --config, or leave it out") from error
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise NetstoreError(f"reading {path}: {error}", hint="it is to be a TOML file: see docs/reference") from error
    except msgspec.ValidationError as error:
        raise _explained(path, data, str(error)) from error
    if found.cluster:
        found.cluster.check()
    if found.adapters.docker:
        found.adapters.docker.check()
    return found


def _explained(path: Path, data: Any, text: str) -> NetstoreError:
    """Return an error that names key, value and what is accepted, for one of msgspec's: TEXT - at `$.section.key`."""
    what, _, place = text.partition(" - at `$")
    steps: list[str] = re.findall(r"[^.\[\]`]+", place)
    if named := re.match(r"Object (contains unknown|missing required) field `(.+)`", what):
        key, known = ".".join([*steps, named[2]]), ", ".join(_keys(Config, steps))
        problem = "is no key" if named[1] == "contains unknown" else "is missing"
        return NetstoreError(f"reading {path}: {key} {problem}", hint=f"keys: {known}")
    for step in steps:
        data = data[int(step) if isinstance(data, list) else step]
    accepted = what.partition(", got")[0].removeprefix("Expected ").replace("`", "")
    return NetstoreError(f"reading {path}: {'.'.join(steps)}: {data!r} is not accepted", hint=f"write {accepted}")


def _keys(kind: Any, steps: list[str]) -> list[str]:
    """Return the keys of a section."""
    for step in filter(lambda each: not each.isdigit(), steps):
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            kind = next(each.type for each in msgspec.structs.fields(kind) if each.encode_name == step)
        kind = next((each for each in get_args(kind) if each is not NoneType), kind)
    return [each.encode_name for each in msgspec.structs.fields(kind)]
