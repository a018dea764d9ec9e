"""NetworkDriver: dockerd's networks and endpoints.

Its ids are ours: a network has dockerd's NetworkID, and each endpoint is in a sandbox whose id is dockerd's EndpointID.
Its interface waits in the host's namespace: dockerd moves it, gives it the addresses, and answers names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_interface, ip_network
from typing import Any

from netstore.adapters.docker.messages import (
    EndpointCall,
    IpamData,
    NetworkCall,
    NetworkCreate,
    NetworkOptions,
    Nothing,
    PortBinding,
)
from netstore.api.v1 import common_pb2
from netstore.drivers.bridged import PREFIX
from netstore.drivers.options import ENDPOINT_OPTIONS, MAC_ADDRESS
from netstore.errors import AlreadyExists, InvalidArgument, NotFound
from netstore.model import Endpoint, EndpointSpec, Network, NetworkSpec, Pool, PortMapping, SandboxRef
from netstore.networks.ipam import is_chosen
from netstore.networks.manager import NetworkManager
from netstore.networks.planning import AttachRequest
from netstore.rpc.endpoints import check_mac, to_port
from netstore.rpc.fields import check_name

__all__ = ["NetworkDriver", "to_pools"]

NAME = "netstore.name"
_PROTOCOLS = {6: common_pb2.PROTOCOL_TCP, 17: common_pb2.PROTOCOL_UDP, 132: common_pb2.PROTOCOL_SCTP}


class NetworkDriver:
    """See the module. Every call may come again, or late."""

    def __init__(self, networks: NetworkManager) -> None:
        self._networks = networks.networks
        self._endpoints = networks.endpoints

    async def capabilities(self, _: Nothing) -> dict[str, Any]:
        """Answer that every dockerd has its own networks."""
        return {"Scope": "local", "ConnectivityScope": "local"}

    async def create(self, call: NetworkCreate) -> dict[str, Any]:
        """Make a network."""
        given = call.options or NetworkOptions()
        data = [*(call.ipv4_data or ()), *(call.ipv6_data or ())]
        spec = NetworkSpec(internal=given.internal, options=given.generic or {}, pools=to_pools(data))
        await self._make(call, spec)
        return {}

    async def _make(self, call: NetworkCall, spec: NetworkSpec) -> Network:
        """Make a network, or find it; its families are those of its pools, whose subnets may be any."""
        options = dict(spec.options)
        name = check_name(f"-o {NAME}", options.pop(NAME, f"docker-{call.network_id[:12]}"))
        spec = replace(
            spec, options=options, pools=tuple(each for each in spec.pools if is_chosen(each)),
            enable_ipv4=not all(map(_is_six, spec.pools)), enable_ipv6=any(map(_is_six, spec.pools)),
        )  # fmt: skip
        network, _ = await self._networks.create(name, spec, network_id=call.own_id)
        if network.id != call.own_id:
            raise AlreadyExists(f"network {name} exists", hint=f"choose another name (-o {NAME}=…), or none")
        return network

    async def delete(self, call: NetworkCall) -> dict[str, Any]:
        """Remove a network, and what a dockerd that lost its state left on it."""
        await self._detach(await self._forgotten(call))
        try:
            await self._networks.delete(call.own_id)
        except NotFound:
            pass
        return {}

    async def _forgotten(self, call: NetworkCall) -> list[Endpoint]:
        """Return the endpoints that dockerd has on a network which, it says, has none any more, or not yet."""
        found = await self._endpoints.all("network_id = ?", call.own_id)
        return [endpoint for endpoint, _, sandbox in found if not sandbox.path and not sandbox.container_id]

    async def _detach(self, endpoints: Sequence[Endpoint]) -> None:
        for endpoint in endpoints:
            await self._endpoints.detach(endpoint.id)

    async def create_endpoint(self, call: EndpointCall) -> dict[str, Any]:
        """Make an endpoint, and answer what dockerd did not choose of its addresses."""
        ours = {option.key for option in ENDPOINT_OPTIONS} - {MAC_ADDRESS}  # dockerd says --mac-address there, too
        for key in (call.options or {}).keys() & ours:
            raise InvalidArgument(f"--driver-opt {key}", (call.options or {})[key], "nothing: dockerd moves interfaces")
        asked = call.interface
        given = {
            "Address": asked.address if asked else "",
            "AddressIPv6": asked.address_ipv6 if asked else "",
            "MacAddress": asked.mac_address if asked else "",
        }
        spec = EndpointSpec(
            ipv4_address=_bare("Address", given["Address"]), ipv6_address=_bare("AddressIPv6", given["AddressIPv6"]),
            mac_address=check_mac(given["MacAddress"], "MacAddress"),
        )  # fmt: skip
        request = AttachRequest(network=call.own_id, sandbox=SandboxRef(moved_id=call.endpoint_id), spec=spec)
        ((endpoint, _, _),) = await self._endpoints.attach([request])
        made = {"MacAddress": endpoint.mac_address}
        for each in endpoint.addresses:
            made["AddressIPv6" if ":" in each.address else "Address"] = f"{each.address}/{each.prefix}"
        return {"Interface": {key: value for key, value in made.items() if not given[key]}}

    async def delete_endpoint(self, call: EndpointCall) -> dict[str, Any]:
        """Remove an endpoint."""
        try:
            await self._endpoints.detach((await self._find(call)).id)
        except NotFound:
            pass
        return {}

    async def information(self, call: EndpointCall) -> dict[str, Any]:
        """Answer that there is nothing to say of an endpoint: dockerd shows none of it."""
        await self._find(call)
        return {"Value": {}}

    async def join(self, call: EndpointCall) -> dict[str, Any]:
        """Answer which interface dockerd is to move, and the gateways.

        dockerd is kept from adding a bridge of its own as the way out of a network that has none.
        """
        endpoint, network, _ = await self._endpoints.get((await self._find(call)).id)
        answer: dict[str, Any] = {
            "InterfaceName": {
                "SrcName": endpoint.waiting_interface,
                "DstPrefix": network.spec.options.get(PREFIX, "eth"),
            },
            "DisableGatewayService": True,
        }
        return answer | _gateways(endpoint, network)

    async def leave(self, call: EndpointCall) -> dict[str, Any]:
        """Do nothing: dockerd moves the interface back before it removes the endpoint."""
        return {}

    async def publish(self, call: EndpointCall) -> dict[str, Any]:
        """Publish ports, those that are published already once."""
        endpoint = await self._find(call)
        wanted = [_port(each, f"{index}") for index, each in enumerate(call.ports)]
        if new := [each for each in wanted if not any(_is(each, present) for present in endpoint.ports)]:
            await self._endpoints.publish(endpoint.id, new)
        return {}

    async def unpublish(self, call: EndpointCall) -> dict[str, Any]:
        """Take all ports of an endpoint back."""
        try:
            endpoint = await self._find(call)
            await self._endpoints.unpublish(endpoint.id, endpoint.ports)
        except NotFound:
            pass
        return {}

    async def discover(self, _: Nothing) -> dict[str, Any]:
        """Hear of other nodes: nothing to do, clusters are netstore's own."""
        return {}

    async def _find(self, call: EndpointCall) -> Endpoint:
        return await self._endpoints.find(call.own_id, SandboxRef(moved_id=call.endpoint_id))


def to_pools(data: Sequence[IpamData]) -> tuple[Pool, ...]:
    """Return the pools that dockerd chose, IPv4 first."""
    return tuple(sorted(map(_pool, data), key=_is_six))


def _pool(data: IpamData) -> Pool:
    try:
        ip_network(data.pool or "0.0.0.0/0")
    except ValueError as error:
        raise InvalidArgument("Pool", data.pool, "a network such as 10.9.0.0/24") from error
    aux = {name: _bare(f"AuxAddresses[{name}]", text) for name, text in (data.aux_addresses or {}).items()}
    return Pool(subnet=data.pool, gateway=_bare("Gateway", data.gateway), aux_addresses=aux)


def _is_six(pool: Pool) -> bool:
    return ":" in pool.subnet


def _bare(field: str, text: str) -> str:
    """Return the address of a CIDR, "" for none."""
    try:
        return str(ip_interface(text).ip) if text else ""
    except ValueError as error:
        raise InvalidArgument(field, text, "an address such as 10.9.0.5/24") from error


def _gateways(endpoint: Endpoint, network: Network) -> dict[str, str]:
    if network.spec.internal:
        return {}
    return {"GatewayIPv6" if ":" in each.gateway else "Gateway": each.gateway for each in endpoint.addresses}


def _port(port: PortBinding, index: str) -> PortMapping:
    protocol = _PROTOCOLS.get(port.proto)
    if protocol is None:
        raise InvalidArgument(f"portmap[{index}].Proto", port.proto, "6 (TCP), 17 (UDP) or 132 (SCTP)")
    for name in ("port", "host_port", "host_port_end"):
        if not 0 <= getattr(port, name) <= 65535:
            raise InvalidArgument(f"portmap[{index}].{name}", getattr(port, name), "0 to 65535")
    mapping = common_pb2.PortMapping(
        host_ip=port.host_ip or "", host_port=port.host_port, container_port=port.port, protocol=protocol,
        host_port_last=port.host_port_end if port.host_port_end > port.host_port else 0,
    )  # fmt: skip
    return to_port(mapping, f"portmap[{index}]")


def _is(asked: PortMapping, present: PortMapping) -> bool:
    """Say whether a port is what was asked for: dockerd asks again when it heard no answer."""
    first, last = asked.host_port, asked.host_port_last or asked.host_port
    same = replace(asked, host_port=present.host_port, host_port_last=present.host_port_last) == present
    return same and (not first or first <= present.host_port <= last)
