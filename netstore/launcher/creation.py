"""Creating containers: what is asked for, checked and resolved, and the one transaction that reserves all of it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from netstore.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from netstore.launcher.images.catalogue import find_image
from netstore.launcher.names import random_name
from netstore.model import (
    Attachment,
    Container,
    ContainerSpec,
    Endpoint,
    EndpointSpec,
    Image,
    Kind,
    Mount,
    MountSpec,
    MountType,
    Network,
    PortMapping,
    Protocol,
    Sandbox,
    Scope,
    Volume,
    new_id,
)
from netstore.networks.networks import DEFAULT_NETWORK
from netstore.networks.planning import Place, changes, changes_of_labels, reserve
from netstore.store import Transaction
from netstore.volumes.manager import VolumeManager

__all__ = ["Draft", "Reserved", "divided", "draft", "exposed", "reserve_container", "wanted_ports"]


@dataclass(frozen=True, slots=True)
class Draft:
    """A container before it exists: names resolved, nothing reserved. `joined` is the sandbox that it shares."""

    container: Container
    image: Image
    networks: tuple[tuple[Network, Attachment], ...]
    joined: Sandbox | None
    warnings: tuple[str, ...]

    @property
    def on_host(self) -> bool:
        """The container uses the host's own namespace."""
        return any(network.spec.driver == "host" for network, _ in self.networks)


@dataclass(frozen=True, slots=True)
class Reserved:
    """A container as committed; `made` are volumes whose storage is still to be made."""

    container: Container
    sandbox: Sandbox
    image: Image
    made: tuple[Volume, ...]
    fresh: bool = True


def draft(tx: Transaction, name: str, spec: ContainerSpec, labels: Mapping[str, str]) -> Draft:
    """Resolve a spec.

    Raises:
        NotFound: no such image, network or container to join.
        InvalidArgument: fields that contradict each other.
    """
    image = find_image(tx, spec.image)
    config = image.config
    entrypoint = config.entrypoint if spec.entrypoint is None else spec.entrypoint
    # As Docker: another entrypoint drops the image's command.
    command = spec.command or (() if spec.entrypoint is not None else config.cmd)
    if not (*entrypoint, *command):
        raise InvalidArgument("spec.command", "", "a command, for the image has none")
    joined = None
    networks: tuple[tuple[Network, Attachment], ...] = ()
    if spec.sandbox_container:
        _refuse_with_joined(spec)
        joined = tx.sandboxes.require(tx.containers.find(spec.sandbox_container).sandbox_id)
    else:
        wanted = spec.networks or (Attachment(network=DEFAULT_NETWORK),)
        networks = tuple((tx.networks.find(each.network), each) for each in wanted)
        _check_networks(networks)
    container = Container(
        id=new_id(), name=name or _free_name(tx), spec=spec, image_id=image.id, sandbox_id="",
        args=(*entrypoint, *command), labels={**config.labels, **labels}, create_time=time.time(),
    )  # fmt: skip
    return Draft(container, image, networks, joined, _warnings(spec, networks))


def reserve_container(
    tx: Transaction, plan: Draft, sandbox: Sandbox, volumes: VolumeManager, request_id: str
) -> Reserved:
    """Add the rows of a container: its sandbox, endpoints, volumes and uses; all of them, or none.

    Raises:
        AlreadyExists: the name is taken.
        AddressTaken: a static address has a holder.
    """
    for made in tx.answered(request_id, "CreateContainer"):
        return _existing(tx, tx.containers.require(made))
    container = plan.container
    for present in tx.containers.all("name = ?", container.name):
        difference = changes(container.spec, present.spec) or changes_of_labels(container.labels, present.labels)
        if difference:
            raise AlreadyExists(
                f"the container name {container.name} is taken by {present.id[:12]}, which differs: {difference}",
                hint="remove that container, or choose another name", difference=difference,
            )  # fmt: skip
        return _existing(tx, present)
    if plan.joined is None:
        tx.sandboxes.insert(sandbox)
    revision = tx.event(Kind.CONTAINER, "create", container.id, container.name, image=plan.image.name)
    container = replace(container, sandbox_id=sandbox.id, revision=revision)
    tx.containers.insert(container)
    mounts, made_volumes = _claim_mounts(tx, plan, container, volumes)
    container = replace(container, mounts=mounts)
    tx.containers.update(container)
    for network, attachment in plan.networks:
        spec = EndpointSpec(
            aliases=attachment.aliases, ipv4_address=attachment.ipv4_address, ipv6_address=attachment.ipv6_address,
            mac_address=attachment.mac_address, options=attachment.options,
            interface_name=attachment.interface_name, gateway_priority=attachment.gateway_priority,
            links=attachment.links, link_local_addresses=attachment.link_local_addresses,
        )  # fmt: skip
        place = Place(sandbox=sandbox, others=tx.endpoints.all("sandbox_id = ?", sandbox.id))
        reserve(tx, network, place, spec, name=container.name, labels=container.labels, attached=False)
    tx.answer(request_id, "CreateContainer", [container.id])
    return Reserved(container, sandbox, plan.image, tuple(made_volumes))


def _existing(tx: Transaction, container: Container) -> Reserved:
    sandbox, image = tx.sandboxes.require(container.sandbox_id), tx.images.require(container.image_id)
    return Reserved(container, sandbox, image, (), fresh=False)


_EXPOSED = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/(tcp|udp|sctp))?")


def exposed(texts: Iterable[str]) -> Iterator[PortMapping]:
    """Yield the ports that EXPOSE or --expose names, each to be published on any free host port."""
    for text in texts:
        match = _EXPOSED.fullmatch(text)
        if match:
            last = min(int(match[2] or match[1]), 65535)
            for number in range(max(int(match[1]), 1), last + 1):
                yield PortMapping(container_port=number, protocol=Protocol(match[3] or "tcp"))


def wanted_ports(spec: ContainerSpec, image: Image) -> tuple[PortMapping, ...]:
    """Return the ports that a container publishes: those asked for and, with `publish_all`, those exposed."""
    if not spec.publish_all:
        return spec.ports
    asked = {(port.container_port + n, port.protocol) for port in spec.ports for n in range(port.count)}
    every = dict.fromkeys(exposed((*image.config.exposed_ports, *spec.exposed_ports)))
    return (*spec.ports, *(port for port in every if (port.container_port, port.protocol) not in asked))


def divided(
    ports: Sequence[PortMapping], endpoints: Sequence[tuple[Endpoint, Network]]
) -> dict[str, tuple[PortMapping, ...]]:
    """Return which ports each endpoint of a container publishes, by id: the first that can has all, but for those that
    every node publishes, which are for the first on a network that spans nodes.
    """
    able = [(each.id, network) for each, network in endpoints if network.interface and not network.spec.internal]
    if not able:
        return {}
    first = able[0][0]
    spanning = next((each for each, network in able if network.scope is Scope.GLOBAL), first)
    places = {first: (), spanning: ()} | dict[str, tuple[PortMapping, ...]]()
    for port in ports:
        place = spanning if port.mesh else first
        places[place] = (*places[place], port)
    return places


_OF_THE_JOINED = (
    "networks", "ports", "hostname", "domainname", "dns_servers", "dns_search", "dns_options", "extra_hosts",
    "publish_all",
)  # fmt: skip


def _refuse_with_joined(spec: ContainerSpec) -> None:
    """As Docker: who joins a sandbox takes it as it is."""
    for field in _OF_THE_JOINED:
        value = getattr(spec, field)
        if value:
            raise InvalidArgument(f"spec.{field}", value, "nothing: they are those of the container that is joined")


def _check_networks(networks: tuple[tuple[Network, Attachment], ...]) -> None:
    names = [network.name for network, _ in networks]
    if len(set(names)) < len(names):
        raise InvalidArgument("spec.networks", names, "each network once")
    lonely = [network.name for network, _ in networks if network.predefined and not network.interface]
    if lonely and len(names) > 1:
        raise InvalidArgument("spec.networks", names, f"{lonely[0]} alone, or networks without it")
    for index, (network, attachment) in enumerate(networks):
        if not network.predefined:
            continue
        for field in ("aliases", "ipv4_address", "ipv6_address") if network.interface else (
            "aliases", "ipv4_address", "ipv6_address", "mac_address", "interface_name", "links",
            "link_local_addresses",
        ):  # fmt: skip
            value = getattr(attachment, field)
            if value:
                raise InvalidArgument(
                    f"spec.networks[{index}].{field}",
                    value,
                    f"nothing on network {network.name}: use one that you created",
                )


def _warnings(spec: ContainerSpec, networks: tuple[tuple[Network, Attachment], ...]) -> tuple[str, ...]:
    if not (spec.ports or spec.publish_all) or any(
        network.interface and not network.spec.internal for network, _ in networks
    ):
        return ()
    kind = networks[0][0].name if networks else "the joined container's"
    return (f"published ports are discarded on network {kind}",)


def _free_name(tx: Transaction) -> str:
    while True:
        name = random_name()
        if not tx.row("SELECT 1 FROM containers WHERE name = ?", name):
            return name
        name = f"{name}{new_id()[:4]}"
        if not tx.row("SELECT 1 FROM containers WHERE name = ?", name):
            return name


def _claim_mounts(
    tx: Transaction, plan: Draft, container: Container, volumes: VolumeManager
) -> tuple[tuple[Mount, ...], list[Volume]]:
    """Resolve mounts to host paths; the image's volumes that none covers become anonymous volumes."""
    specs = list(plan.container.spec.mounts)
    targets = [os.path.normpath(spec.target) for spec in specs]
    for index, target in enumerate(targets):
        if target in targets[:index]:
            raise InvalidArgument(f"spec.mounts[{index}].target", target, "each target once")
    mounts, made = _mounts_of_others(tx, plan.container.spec, container, targets), []
    targets += [os.path.normpath(mount.spec.target) for mount in mounts]
    specs += [MountSpec(target=path) for path in plan.image.config.volumes if os.path.normpath(path) not in targets]
    for index, spec in enumerate(specs):
        if spec.type is MountType.VOLUME:
            volume, fresh = volumes.claim(tx, spec, container.id)
            made += [volume] if fresh else []
            mounts.append(Mount(spec=spec, source=volume.mountpoint, volume_id=volume.id, volume=volume.name))
        elif spec.type is MountType.BIND:
            mounts.append(Mount(spec=spec, source=_bind_source(spec, index)))
        elif spec.type is MountType.IMAGE:
            mounts.append(Mount(spec=spec, source=find_image(tx, spec.source).id))
        else:
            mounts.append(Mount(spec=spec))
    return tuple(mounts), made


def _mounts_of_others(
    tx: Transaction, spec: ContainerSpec, container: Container, covered: Sequence[str]
) -> list[Mount]:
    """Take over the mounts of other containers (--volumes-from) but those of memory; a later one covers an earlier."""
    taken: dict[str, Mount] = {}
    for reference in spec.volumes_from:
        name, _, mode = reference.partition(":")
        for mount in tx.containers.find(name).mounts:
            target = os.path.normpath(mount.spec.target)
            if mount.spec.type is MountType.TMPFS or target in covered:
                continue
            read_only = mount.spec.read_only or mode == "ro"
            taken[target] = replace(mount, spec=replace(mount.spec, read_only=read_only, no_copy=True, chown=False))
    for volume_id in {mount.volume_id for mount in taken.values() if mount.volume_id}:
        tx.execute("INSERT OR IGNORE INTO volume_uses VALUES (?, ?)", volume_id, container.id)
    return list(taken.values())


def _bind_source(spec: MountSpec, index: int) -> str:
    if not spec.create_source and not Path(spec.source).exists():
        raise FailedPrecondition(
            f"spec.mounts[{index}].source: {spec.source} does not exist on this node",
            hint="create it, or let -v (or bind-create-src) make a directory", reason="BIND_SOURCE_MISSING",
        )  # fmt: skip
    return spec.source
