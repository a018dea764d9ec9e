"""Images and containers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from netstore.model.mounts import Mount, MountSpec
from netstore.model.networks import PortMapping

__all__ = ["Attachment", "Container", "ContainerSpec", "ContainerState", "Image", "ImageConfig", "Restart"]


class ContainerState(StrEnum):
    """Where a container is in its life."""

    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"


class Restart(StrEnum):
    """When a container is started again by itself: Docker's policies."""

    NO = "no"
    ON_FAILURE = "on-failure"  # it ended with another code than 0, at most `restart_limit` times
    ALWAYS = "always"  # also one that was stopped, when the node starts
    UNLESS_STOPPED = "unless-stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """Defaults to run an image (OCI image-spec, config.md)."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    stop_signal: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A root filesystem with the defaults to run it. `layers` are hexadecimal sha256, bottom first."""

    id: str
    name: str
    config: ImageConfig
    layers: tuple[str, ...]
    size_bytes: int = 0
    architecture: str = ""
    os: str = "linux"
    create_time: float = 0.0
    revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """One network of a container spec."""

    network: str
    aliases: tuple[str, ...] = ()
    ipv4_address: str = ""
    ipv6_address: str = ""
    mac_address: str = ""
    interface_name: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    gateway_priority: int = 0
    link_local_addresses: tuple[str, ...] = ()
    links: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSpec:
    """What was asked for. `entrypoint` None keeps the image's; `stop_timeout` is in seconds."""

    image: str
    command: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    hostname: str = ""
    domainname: str = ""
    dns_servers: tuple[str, ...] = ()
    dns_search: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()
    extra_hosts: tuple[str, ...] = ()
    publish_all: bool = False
    exposed_ports: tuple[str, ...] = ()
    networks: tuple[Attachment, ...] = ()
    sandbox_container: str = ""
    ports: tuple[PortMapping, ...] = ()
    mounts: tuple[MountSpec, ...] = ()
    volumes_from: tuple[str, ...] = ()
    auto_remove: bool = False
    read_only: bool = False
    stop_signal: str = ""
    stop_timeout: float = 10.0
    restart: Restart = Restart.NO
    restart_limit: int = 0
    tty: bool = False
    open_stdin: bool = False
    stdin_once: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """An image's filesystem, a sandbox, mounts and a process.

    `pid` and `supervisor_pid` (conmon) go with `supervisor_start`, the supervisor's start time in clock ticks
    (proc_pid_stat(5), field 22), so that a reused pid is never taken for it. `stopped` is by a person, not by itself;
    `restart_count` counts since a person started it.
    """

    id: str
    name: str
    spec: ContainerSpec
    image_id: str
    sandbox_id: str
    args: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    state: ContainerState = ContainerState.CREATED
    pid: int = 0
    supervisor_pid: int = 0
    supervisor_start: int = 0
    exit_code: int = 0
    message: str = ""
    stopped: bool = False
    restart_count: int = 0
    create_time: float = 0.0
    start_time: float = 0.0
    finish_time: float = 0.0
    revision: int = 0
