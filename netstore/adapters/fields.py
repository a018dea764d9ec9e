"""What foreign configurations have in common, as fields of the contract."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_interface

from netstore.api.v1 import common_pb2, endpoint_pb2
from netstore.errors import InvalidArgument

__all__ = ["PORT_KEEPER", "set_addresses", "to_port"]

PORT_KEEPER = "conmon"
"""Podman lets it listen on a container's published ports, so that nobody else takes them."""

_PROTOCOLS = {
    "": common_pb2.PROTOCOL_TCP,
    "tcp": common_pb2.PROTOCOL_TCP,
    "udp": common_pb2.PROTOCOL_UDP,
    "sctp": common_pb2.PROTOCOL_SCTP,
}


def to_port(
    protocol: str, *, field: str, host_ip: str, host_port: int, container_port: int, count: int = 1
) -> common_pb2.PortMapping:
    """Translate a published port; `protocol` is a word in any case, "" for tcp.

    Raises:
        InvalidArgument: the protocol is none.
    """
    number = _PROTOCOLS.get(protocol.lower())
    if number is None:
        raise InvalidArgument(field, protocol, "tcp, udp or sctp")
    return common_pb2.PortMapping(
        host_ip=host_ip, host_port=host_port, container_port=container_port, protocol=number, count=count
    )


def set_addresses(spec: endpoint_pb2.EndpointSpec, texts: Iterable[str], field: str) -> None:
    """Set at most one static address of each family; a prefix length is the network's own to say.

    Raises:
        InvalidArgument: one is no address, or a family has two.
    """
    for text in filter(None, texts):
        try:
            address = ip_interface(text).ip
        except ValueError as error:
            raise InvalidArgument(field, text, "10.9.0.5/24 or fd00::5/64") from error
        key = f"ipv{address.version}_address"
        if getattr(spec, key) not in ("", str(address)):  # podman names one twice when it reloads
            raise InvalidArgument(field, text, "one address of each family")
        setattr(spec, key, str(address))
