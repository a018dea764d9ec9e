"""CNI's commands: a call in, calls of the network manager, a result out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_interface
from typing import Any

import msgspec

from netstore.adapters.cni.messages import (
    BAD_CONFIG,
    NOT_AVAILABLE,
    CniError,
    Config,
    Create,
    Identity,
    Request,
    decode,
    describe,
    result,
)
from netstore.adapters.fields import PORT_KEEPER, set_addresses, to_port
from netstore.adapters.programs import Refusal
from netstore.api.v1 import endpoint_pb2, network_pb2
from netstore.drivers.options import BANDWIDTH_IN, BANDWIDTH_OUT
from netstore.errors import FailedPrecondition, NetstoreError, NotFound
from netstore.model import Endpoint, Network, Sandbox
from netstore.networks.context import KeyedLocks
from netstore.networks.manager import NetworkManager
from netstore.networks.planning import AttachRequest
from netstore.rpc.endpoints import to_attach
from netstore.rpc.fields import check_name, check_servers
from netstore.rpc.networks import to_spec

__all__ = ["Plugin"]

# Written so that the index of the schema serves them.
_CONTAINER = """json_extract(body, '$.labels."cni.container-id"')"""
_OF_CONTAINER = f"{_CONTAINER} = ?"
_OF_CONFIG = f"""{_CONTAINER} > '' AND json_extract(body, '$.labels."cni.network"') = ?"""
Joined = tuple[Endpoint, Network, Sandbox]


class Plugin:
    """Carries out calls. Those about one container come one after the other, in the order in which they arrived: a
    runtime that gave up waiting for ADD calls DEL at once.
    """

    def __init__(self, networks: NetworkManager) -> None:
        self._manager = networks
        self._locks = KeyedLocks()
        self._verbs = {
            "ADD": self._add, "DEL": self._delete, "CHECK": self._check, "GC": self._collect, "STATUS": self._status,
        }  # fmt: skip

    async def answer(self, variables: Mapping[str, str], body: bytes) -> bytes:
        """Carry out one call; returns what is printed.

        Raises:
            CniError: with the specification's code, or one of ours from 100.
        """
        printed = await self._call(decode(variables, body))
        return b"" if printed is None else msgspec.json.encode(printed)

    def describe(self, refusal: Refusal, body: bytes) -> bytes:
        """Return what is printed of a failure."""
        return msgspec.json.encode(describe(refusal, body))

    async def _call(self, request: Request) -> dict[str, Any] | None:
        key = request.variables.get("CNI_CONTAINERID", "") or request.command
        async with self._locks.hold(key):
            try:
                return await self._verbs[request.command](request)
            except NetstoreError as error:
                raise CniError.of(error) from error

    async def _add(self, request: Request) -> dict[str, Any]:
        if request.config.previous is not None:
            raise CniError(BAD_CONFIG, "prevResult: netstore-cni makes the interface", "name it first in plugins")
        wanted = _wanted(request)
        try:
            joined = await self._attach(wanted)
        except NotFound:
            if request.config.create is None:
                raise
            async with self._manager.sandboxes.open(wanted.sandbox):  # else nothing is made
                await self._make_network(request.config.network_name, request.config.create)
            joined = await self._attach(wanted)
        if not request.identity.has(joined[0]):
            raise FailedPrecondition(
                f"{request.variables['CNI_NETNS']} is attached to network {wanted.network} already, by somebody else",
                hint="detach it first, or name another network",
            )
        return result(request, *joined)

    async def _attach(self, wanted: AttachRequest) -> Joined:
        network = await self._manager.networks.named(wanted.network)
        (joined,) = await self._manager.endpoints.attach([replace(wanted, network=network.id)])
        return joined

    async def _make_network(self, name: str, create: Create) -> None:
        pools = [
            network_pb2.IpamConfig(subnet=subnet, gateway=gateway)
            for subnet, gateway in ((create.subnet, create.gateway), (create.subnet6, ""))
            if subnet or gateway
        ]
        spec = network_pb2.NetworkSpec(
            driver=create.driver, internal=create.internal, options=create.options, ipam=pools,
            enable_ipv6=bool(create.subnet6) or ":" in create.subnet,
        )  # fmt: skip
        await self._manager.networks.create(check_name("network", name), to_spec(spec))

    async def _delete(self, request: Request) -> None:
        for endpoint, _, _ in await self._find(request.identity):
            await self._manager.endpoints.detach(endpoint.id)

    async def _find(self, identity: Identity) -> list[Joined]:
        found = await self._manager.endpoints.all(_OF_CONTAINER, identity.container)
        return [joined for joined in found if identity.has(joined[0])]

    async def _check(self, request: Request) -> None:
        for joined in await self._find(request.identity):
            missing = await self._manager.missing(*joined) or _difference(request.config, joined[0])
            if missing:
                raise FailedPrecondition(missing, hint="`netstore system check --repair` repairs what it can")
            return
        raise NotFound("attachment", f"{request.identity.interface} of container {request.identity.container}")

    async def _collect(self, request: Request) -> None:
        valid = request.config.valid
        if valid is None:
            raise CniError(BAD_CONFIG, "cni.dev/valid-attachments is missing", "GC needs it: a list, [] for none")
        wanted = {(each.container_id, each.ifname) for each in valid}
        found = await self._manager.endpoints.all(_OF_CONFIG, request.config.name)
        stale = [
            endpoint.id
            for endpoint, _, _ in found
            if (endpoint.labels["cni.container-id"], endpoint.labels.get("cni.ifname", "")) not in wanted
        ]
        done = await asyncio.gather(*map(self._manager.endpoints.detach, stale), return_exceptions=True)
        for failed in done:  # the others were collected all the same
            if isinstance(failed, BaseException):
                raise failed

    async def _status(self, request: Request) -> None:
        try:
            await self._manager.networks.named(request.config.network_name)
        except NotFound as error:
            if request.config.create is None:
                raise CniError(NOT_AVAILABLE, error.what, _MISSING) from error


_MISSING = 'create it (`netstore network create`), or write "create": {} into the network configuration'


def _wanted(request: Request) -> AttachRequest:
    """Translate what ADD asks for: capabilities come before args.cni, these before CNI_ARGS."""
    config, arguments, variables = request.config, request.arguments, request.variables
    runtime, given = request.runtime, config.args.cni
    spec = endpoint_pb2.EndpointSpec(
        network=config.network_name,
        sandbox=endpoint_pb2.SandboxRef(netns_path=variables["CNI_NETNS"]),
        name=arguments.get("K8S_POD_NAME", ""),
        interface_name=variables["CNI_IFNAME"],
        mac_address=runtime.mac or given.mac or arguments.get("MAC", ""),
        aliases=[*_aliases(request), *given.aliases],
        ports=[
            to_port(
                each.protocol, field="portMappings: protocol", host_ip=each.host_ip, host_port=each.host_port,
                container_port=each.container_port,
            )
            for each in runtime.port_mappings if each.host_port
        ],
    )  # fmt: skip
    set_addresses(spec, runtime.ips or given.ips or arguments.get("IP", "").split(","), "ips")
    for key, rate in ((BANDWIDTH_IN, runtime.bandwidth.ingress_rate), (BANDWIDTH_OUT, runtime.bandwidth.egress_rate)):
        if rate:
            spec.options[key] = str(rate)
    labels = {each.key: each.value for each in given.labels} | request.identity.labels()
    servers = (runtime.dns and (runtime.dns.servers or runtime.dns.nameservers)) or config.dns.nameservers
    return replace(
        to_attach(endpoint_pb2.Endpoint(spec=spec, labels=labels)),
        dns_servers=check_servers(servers, "dns.servers"),
        port_keeper=PORT_KEEPER,
    )


def _aliases(request: Request) -> Sequence[str]:
    aliases = request.runtime.aliases
    return aliases.get(request.config.name, []) if isinstance(aliases, dict) else aliases


def _difference(config: Config, endpoint: Endpoint) -> str:
    """Say which of the endpoint's addresses the chain's result lacks, "" for none."""
    if config.previous is None:
        return ""
    try:
        held = {ip_interface(each.address).ip for each in config.previous.ips}
    except ValueError as error:
        raise CniError(BAD_CONFIG, f"prevResult: {error}") from error
    lacking = [each.address for each in endpoint.addresses if ip_address(each.address) not in held]
    return f"prevResult lacks {', '.join(lacking)}, which the interface has" if lacking else ""
