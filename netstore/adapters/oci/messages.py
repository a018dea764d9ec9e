"""What an OCI runtime writes to a hook's stdin (runtime-spec, "State"), and what annotations ask for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import click
import msgspec

from netstore.adapters.programs import Refusal
from netstore.api.v1 import common_pb2, endpoint_pb2
from netstore.cli.grammar import parse_network, parse_port  # docker's grammar; knows the contract alone
from netstore.cli.mounts import parse_volume
from netstore.errors import InvalidArgument
from netstore.model import Endpoint, MountSpec
from netstore.rpc.mount_service import to_foreign_spec

__all__ = ["LABEL", "Bundle", "State", "decode"]

LABEL = "oci.container-id"
"""With the container's bundle as `oci.bundle` what an endpoint of a hook is known by: ids are each engine's own."""

_PREFIX = "io.netstore."
_KEYS = ("networks", "ports", "volumes", "name")
_PODS = {
    "io.kubernetes.cri.container-type": "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.ContainerType": "io.kubernetes.cri-o.SandboxID",
}
"""What containerd and CRI-O say of a Kubernetes pod: "sandbox" or "container", and the sandbox's id."""
_FULL_ID = re.compile(r"[0-9a-f]{64}")


class Root(msgspec.Struct):
    """The root filesystem: a path, relative to the bundle or absolute."""

    path: str


class Namespace(msgspec.Struct):
    """A namespace that the container is in; `path` is that of another's, "" for one of its own."""

    type: str
    path: str = ""


class Linux(msgspec.Struct):
    """What a hook needs of `linux`."""

    namespaces: list[Namespace] = []


class Bundle(msgspec.Struct):
    """What a hook needs of a bundle's config.json."""

    root: Root
    linux: Linux = msgspec.field(default_factory=Linux)

    @property
    def netns(self) -> str:
        """The path of the network namespace of another that the container joins, "" for none."""
        return next((each.path for each in self.linux.namespaces if each.type == "network"), "")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What annotations ask for."""

    networks: list[endpoint_pb2.EndpointSpec]
    volumes: list[MountSpec]


class State(msgspec.Struct, kw_only=True):
    """A container's state; `pid` is its first process, whose namespaces are made and whose root is not changed yet."""

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
    bundle: Annotated[str, msgspec.Meta(pattern=r"^/[^\0]*\Z", max_length=4096)]
    pid: Annotated[int, msgspec.Meta(ge=0)] = 0
    annotations: dict[str, str] | None = None

    @property
    def pod(self) -> tuple[str, str]:
        """What the container is of a Kubernetes pod, "sandbox" or "container", and the sandbox's id; else two ""."""
        given = self.annotations or {}
        return next(((given[part], given[pod]) for part, pod in _PODS.items() if given.keys() >= {part, pod}), ("", ""))

    @property
    def in_pod(self) -> bool:
        """Whether it is a pod's container, whose networks are its pod's."""
        return self.pod[0] == "container"

    @property
    def owner(self) -> str:
        """The id of whom the networks belong to."""
        return self.pod[1] or self.id

    def labels(self) -> dict[str, str]:
        """Return the labels of the endpoints."""
        return {LABEL: self.owner, "oci.bundle": "" if self.pod[1] else self.bundle}

    def has(self, endpoint: Endpoint) -> bool:
        """Say whether an endpoint is this container's, or its pod's."""
        return self.labels().items() <= endpoint.labels.items()

    def wanted(self) -> Wanted:
        """Return what the annotations ask for; a pod's sandbox has no volumes.

        Raises:
            Refusal, InvalidArgument: naming the annotation.
        """
        given = self._given()
        sandbox = self.pod[0] == "sandbox"
        return Wanted(self._networks(given), [] if sandbox else [_volume(text) for text in _items(given, "volumes")])

    def _given(self) -> Mapping[str, str]:
        given = {
            key.removeprefix(_PREFIX): text for key, text in (self.annotations or {}).items() if key.startswith(_PREFIX)
        }
        for key in given.keys() - set(_KEYS):
            raise Refusal(f"annotation {_PREFIX}{key[:200]} is not known", f"write {_PREFIX}{', '.join(_KEYS)}")
        return given

    def _networks(self, given: Mapping[str, str]) -> list[endpoint_pb2.EndpointSpec]:
        networks = [_network(text) for text in _items(given, "networks")]
        ports = [port for text in _items(given, "ports") for port in _ports(text)]
        if ports and not networks:
            raise Refusal(f"{_PREFIX}ports needs a network to publish on", f"name one in {_PREFIX}networks")
        for spec in networks:
            spec.name = given.get("name", "") or (self.owner[:12] if _FULL_ID.fullmatch(self.owner) else self.owner)
        if ports:
            networks[0].ports.extend(ports)
        return networks

    def read(self, config: bytes) -> Bundle:
        """Read the bundle's config.json; its root becomes absolute.

        Raises:
            Refusal: it is none of a bundle.
        """
        try:
            bundle = msgspec.json.decode(config, type=Bundle)
        except (msgspec.DecodeError, RecursionError) as error:
            raise Refusal(f"{self.bundle}/config.json: {error}") from error
        if not bundle.root.path.startswith("/"):
            bundle.root.path = f"{self.bundle}/{bundle.root.path}"
        return bundle


def decode(body: bytes) -> State:
    """Read a state.

    Raises:
        Refusal: it is none.
    """
    try:
        return msgspec.json.decode(body, type=State)
    except (msgspec.DecodeError, RecursionError) as error:  # a ValidationError is one, too
        raise Refusal(f"the container's state is not accepted: {error}") from error


def _items(given: Mapping[str, str], key: str) -> Iterator[str]:
    return (text for each in given.get(key, "").split(";") if (text := each.strip()))


def _network(text: str) -> endpoint_pb2.EndpointSpec:
    """Translate NAME[,KEY=VALUE…], with the keys of `docker run --network`; blanks are as good as commas, at which
    podman 4 splits annotations.
    """
    text = re.sub(r"\s*,\s*|\s+", ",", text)
    first = text.partition(",")[0]
    with _Told("networks"):
        asked = parse_network(text if "=" in first else f"name={text}")
    spec = endpoint_pb2.EndpointSpec(
        aliases=asked.aliases, options=asked.options, link_local_addresses=asked.link_local_addresses
    )
    for name in ("network", "ipv4_address", "ipv6_address", "mac_address", "interface_name", "gateway_priority"):
        setattr(spec, name, getattr(asked, name))
    return spec


def _ports(text: str) -> list[common_pb2.PortMapping]:
    with _Told("ports"):
        return parse_port(text)


def _volume(text: str) -> MountSpec:
    """Translate VOLUME:TARGET[:OPTIONS]; a host's paths are not for annotations to name."""
    with _Told("volumes"):
        mount = parse_volume(text)
    if not mount.source or mount.source.startswith("/"):
        raise InvalidArgument(f"{_PREFIX}volumes", text, "VOLUME:TARGET[:ro], of a volume that exists")
    return to_foreign_spec(mount, ours=False)


class _Told:
    """Turns what the grammar refuses into the annotation's error."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, click.UsageError):
            raise Refusal(f"{_PREFIX}{self._key}: {error.message}") from error
