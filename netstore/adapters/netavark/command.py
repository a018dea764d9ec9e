"""netavark's commands: podman's input, calls of the network manager, podman's answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import msgspec

from netstore.adapters.fields import PORT_KEEPER
from netstore.adapters.netavark.messages import (
    CONTAINER_LABEL,
    NETWORK_LABEL,
    Container,
    Creation,
    NetworkInfo,
    Subnet,
    decode,
    endpoint_spec,
    free_subnet,
    network_spec,
    status,
    to_ports,
)
from netstore.adapters.programs import Refusal
from netstore.api.v1 import common_pb2, endpoint_pb2
from netstore.errors import FailedPrecondition, InUse, NetstoreError, NotFound
from netstore.model import Endpoint, Network, Sandbox
from netstore.networks.context import KeyedLocks
from netstore.networks.manager import NetworkManager
from netstore.networks.networks import NetworkChange
from netstore.networks.planning import AttachRequest
from netstore.rpc.endpoints import check_ports, to_attach
from netstore.rpc.fields import check_name, check_servers
from netstore.rpc.networks import to_spec

__all__ = ["Netavark"]

_AT_PATH = "sandbox_id IN (SELECT id FROM sandboxes WHERE path = ?)"
_ATTEMPTS = 5
Joined = tuple[Endpoint, Network, Sandbox]


class Netavark:
    """Carries out calls. Those about one namespace come one after the other."""

    def __init__(self, networks: NetworkManager) -> None:
        self._networks = networks.networks
        self._endpoints = networks.endpoints
        self._locks = KeyedLocks()

    async def answer(self, variables: Mapping[str, str], body: bytes) -> bytes:
        """Carry out a call; returns what is printed.

        Raises:
            Refusal: it failed.
        """
        command, target = variables.get("NETAVARK_COMMAND", ""), variables.get("NETAVARK_TARGET", "")
        if not target and command in ("setup", "teardown", "update"):
            raise Refusal(f"{command} needs {'the name of a network' if command == 'update' else 'a namespace'}")
        try:
            async with self._locks.hold(target):
                match command:
                    case "setup":
                        return msgspec.json.encode(await self._setup(target, decode(body, Container)))
                    case "teardown":
                        await self._teardown(target, decode(body, Container))
                    case "update":
                        await self._update(target, variables.get("NETAVARK_DNS", ""))
                    case "create":
                        return msgspec.json.encode(await self._create(decode(body, Creation)))
                    case _:
                        raise Refusal(f"{command[:200]!r} is no command", "setup, teardown, update, create or version")
        except NetstoreError as error:
            raise Refusal(error.what, error.hint) from error
        return b""

    def describe(self, refusal: Refusal, body: bytes) -> bytes:
        """Return what is printed of a failure."""
        text = f"{refusal.msg}: {refusal.details}" if refusal.details else refusal.msg
        return msgspec.json.encode({"error": text})

    async def _setup(self, netns: str, container: Container) -> dict[str, Any]:
        wanted = container.in_order()
        names = {info.name for _, info in wanted}
        elsewhere = [endpoint for endpoint, network, _ in await self._at(netns) if network.name not in names]
        ports = [] if any(each.ports for each in elsewhere) else to_ports(container)
        requests = []
        for asked, info in wanted:
            publishes = info.driver == "bridge"  # as netavark does
            spec = endpoint_spec(container, asked, info, netns, ports if publishes else [])
            ports = [] if publishes else ports
            message = endpoint_pb2.Endpoint(spec=spec, labels={CONTAINER_LABEL: container.container_id})
            servers = check_servers(container.dns_servers or (), "dns_servers")
            requests.append(replace(to_attach(message), dns_servers=servers, port_keeper=PORT_KEEPER))
        made = await self._attach(requests, [info for _, info in wanted])
        return {info.name: status(info, *joined[:2]) for (_, info), joined in zip(wanted, made, strict=True)}

    async def _attach(self, requests: Sequence[AttachRequest], infos: Sequence[NetworkInfo]) -> list[Joined]:
        """Attach to networks, which are made where they are missing, and go again when it fails."""
        for attempt in range(1, _ATTEMPTS + 1):
            for info in infos:
                await self._have(info)
            try:
                found = [await self._networks.named(each.network) for each in requests]
                wanted = [replace(each, network=one.id) for each, one in zip(requests, found, strict=True)]
                return await self._endpoints.attach(wanted)
            except NotFound:  # its last endpoint has just left it
                if attempt == _ATTEMPTS:
                    raise
            except NetstoreError:
                await self._drop(infos)
                raise
        raise AssertionError

    async def _have(self, info: NetworkInfo) -> None:
        """Make a network unless there is one of its name, ours or not, with the same subnets."""
        with contextlib.suppress(NotFound):
            _check_subnets(await self._networks.named(info.name), info)
            return
        spec = to_spec(network_spec(info))
        await self._networks.create(
            check_name("network", info.name), spec, labels={NETWORK_LABEL: info.id or info.name}
        )

    async def _drop(self, infos: Sequence[NetworkInfo]) -> None:
        """Remove networks that podman's configuration made and nobody uses."""
        for info in infos:
            with contextlib.suppress(NotFound, InUse):
                network = await self._networks.named(info.name)
                if NETWORK_LABEL in network.labels:
                    await self._networks.delete(network.id)

    async def _at(self, netns: str) -> list[Joined]:
        """Return the endpoints of a namespace, which may be gone."""
        return await self._endpoints.all(_AT_PATH, netns)

    async def _teardown(self, netns: str, container: Container) -> None:
        """Undo setup of the networks that are named, as far as it goes; then tell what failed."""
        present = await self._at(netns)
        leaving = [endpoint for endpoint, network, _ in present if network.name in container.networks]
        done = await asyncio.gather(*(self._endpoints.detach(each.id) for each in leaving), return_exceptions=True)
        await self._drop([info for name, info in container.network_info.items() if name in container.networks])
        for failed in done:
            if isinstance(failed, BaseException):
                raise failed
        if any(each.ports for each in leaving):
            await self._hand_over(to_ports(container), present)

    async def _hand_over(self, ports: Sequence[common_pb2.PortMapping], present: Sequence[Joined]) -> None:
        """Publish a container's ports on another network of its own, when it left the one that had them."""
        for endpoint, network, _ in await self._endpoints.all(_AT_PATH, present[0][2].path):
            if network.spec.driver == "bridge":
                await self._endpoints.publish(endpoint.id, check_ports(ports, "port_mappings"), keeper=PORT_KEEPER)
                return

    async def _update(self, name: str, servers: str) -> None:
        """Change a network's name servers; of one that nobody uses now podman knows them itself."""
        wanted = check_servers([each for each in servers.split(",") if each], "network-dns-servers")
        with contextlib.suppress(NotFound):
            network = await self._networks.named(name)
            await self._networks.update(network.id, "", NetworkChange(dns_servers=wanted))

    async def _create(self, creation: Creation) -> NetworkInfo:
        """Complete podman's configuration of a network, and try it: it is made, and taken away again."""
        info = creation.network
        if not info.subnets:
            taken = [pool.subnet for network, _ in await self._networks.all() for pool in network.pools]
            info.subnets = [Subnet(subnet=free_subnet(creation, taken))]
        spec = to_spec(network_spec(info))
        network, _ = await self._networks.create(
            check_name("network", info.name), spec, labels={NETWORK_LABEL: info.id}
        )
        with contextlib.suppress(InUse):
            await self._networks.delete(network.id)
        info.subnets = [Subnet(subnet=pool.subnet, gateway=pool.gateway or None) for pool in network.pools]
        info.network_interface = info.network_interface or network.interface
        info.ipam_options = {"driver": "host-local", **(info.ipam_options or {})}
        info.created = info.created or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return info


def _check_subnets(network: Network, info: NetworkInfo) -> None:
    try:
        wanted = {ip_network(each.subnet, strict=False) for each in info.subnets or ()}
    except ValueError as error:
        raise Refusal(f"subnets: {error}") from error
    present = {ip_network(pool.subnet) for pool in network.pools}
    if wanted and wanted != present:
        raise FailedPrecondition(
            f"network {network.name} has {', '.join(sorted(map(str, present))) or 'no subnet'}, and podman's "
            f"{', '.join(sorted(map(str, wanted)))}",
            hint=f"give podman's the same subnets, or another name (`netstore network inspect {network.name}`)",
        )
