"""What dockerd says, typed (libnetwork's remote.md and ipam.md, Docker's volume plugin protocol).

Keys that are not here are ignored: dockerd adds some with every version. Go writes null for what is empty.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import msgspec

__all__ = [
    "AddressRequest",
    "EndpointCall",
    "Interface",
    "IpamData",
    "NetworkAllocation",
    "NetworkCall",
    "NetworkCreate",
    "NetworkOptions",
    "Nothing",
    "PoolRequest",
    "PortBinding",
    "VolumeCall",
    "VolumeCreate",
]

Id = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
NetworkId = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64}|[0-9a-z]{25})\Z")]
"""Of a dockerd's own network, or of one of its swarm's (swarmkit's identity.NewID)."""
PORTS = "com.docker.network.portmap"

_WORDS = {"id": "ID", "ip": "IP", "ipv4": "IPv4", "ipv6": "IPv6"}


def _go(name: str) -> str:
    """Return a field's name as Go's structs have it."""
    return "".join(_WORDS.get(part, part.capitalize()) for part in name.split("_"))


class Nothing(msgspec.Struct, rename=_go):
    """Of calls without arguments, or whose arguments do not matter."""


class IpamData(msgspec.Struct, kw_only=True, rename=_go):
    """One pool of a network: addresses are in CIDR notation."""

    pool: str = ""
    gateway: str = ""
    aux_addresses: dict[str, str] | None = None


class NetworkOptions(msgspec.Struct, kw_only=True):
    """Of `docker network create`: `generic` are those of -o."""

    generic: dict[str, str] | None = msgspec.field(name="com.docker.network.generic", default=None)
    internal: bool = msgspec.field(name="com.docker.network.internal", default=False)


class NetworkCall(msgspec.Struct, kw_only=True, rename=_go):
    """A call about a network."""

    network_id: NetworkId

    @property
    def own_id(self) -> str:
        """The network's id here, the same on every node: a swarm's ids are not of our form."""
        return self.network_id if len(self.network_id) == 64 else hashlib.sha256(self.network_id.encode()).hexdigest()


class NetworkCreate(NetworkCall, kw_only=True, rename=_go):
    """NetworkDriver.CreateNetwork."""

    options: NetworkOptions | None = None
    ipv4_data: list[IpamData] | None = None
    ipv6_data: list[IpamData] | None = None


class NetworkAllocation(NetworkCall, kw_only=True, rename=_go):
    """NetworkDriver.AllocateNetwork: `options` are those of -o; swarm's `ipv4_data` holds subnets of both families."""

    options: dict[str, str] | None = None
    ipv4_data: list[IpamData] | None = None
    ipv6_data: list[IpamData] | None = None


class PortBinding(msgspec.Struct, kw_only=True, rename=_go):
    """A port to publish. `proto` is IP's number; host port 0 is any free one, or any up to `host_port_end`."""

    proto: int
    port: int
    host_ip: str | None = None
    host_port: int = 0
    host_port_end: int = 0


class Interface(msgspec.Struct, kw_only=True, rename=_go):
    """What dockerd chose of an endpoint; addresses are in CIDR notation."""

    address: str = ""
    address_ipv6: str = msgspec.field(name="AddressIPv6", default="")
    mac_address: str = ""


class EndpointCall(NetworkCall, kw_only=True, rename=_go):
    """A call about an endpoint; `options` holds ports, and whatever --driver-opt said."""

    endpoint_id: Id
    interface: Interface | None = None
    options: dict[str, Any] | None = None

    @property
    def ports(self) -> list[PortBinding]:
        """The ports that are to be published.

        Raises:
            msgspec.ValidationError: they are none.
        """
        return msgspec.convert((self.options or {}).get(PORTS) or [], list[PortBinding])


class PoolRequest(msgspec.Struct, kw_only=True, rename=_go):
    """IpamDriver.RequestPool; `pool` "" asks for any."""

    address_space: str = ""
    pool: str = ""
    sub_pool: str = ""
    v6: bool = False


class AddressRequest(msgspec.Struct, kw_only=True, rename=_go):
    """Calls about a pool, or an address of it; `address` "" asks for any."""

    pool_id: str
    address: str = ""
    options: dict[str, str] | None = None


class VolumeCall(msgspec.Struct, kw_only=True, rename=_go):
    """A call about a volume; `id` is that of a mount."""

    name: str
    id: Annotated[str, msgspec.Meta(max_length=128)] = ""


class VolumeCreate(VolumeCall, kw_only=True, rename=_go):
    """VolumeDriver.Create."""

    opts: dict[str, str] | None = None
