"""WireGuard: one interface of the node, through which the tunnels of encrypted networks go to the other nodes.

It carries packets between the nodes' own underlay addresses. No route leads to it: who sends by it names it. IPv4 needs
no more; IPv6 sends by an interface only what a route by it is there for, so that there is a table with one route, and a
rule that it is for those who name the interface.
"""

from __future__ import annotations

import errno
import os
from base64 import b64encode
from collections.abc import Mapping
from typing import Any

from netstore.errors import KernelError
from netstore.kernel import addressing, netlink
from netstore.kernel.links import host_socket
from netstore.kernel.sysctls import accept_ipv6, sysctl
from netstore.model import WIREGUARD_LINK

__all__ = ["OVERHEAD", "make", "new_key", "set_peers"]

OVERHEAD = {4: 60, 6: 80}
"""Bytes that it adds: IP, UDP, its header and tag; before that it fills up to a multiple of 16."""

_MTU = 65000  # the tunnels in it keep to the underlay's
_KEEP_ALIVE_SECONDS = 25


def new_key() -> str:
    """Return a private key, base64; the kernel clamps it (RFC 7748)."""
    return b64encode(os.urandom(32)).decode()


def make(address: str, port: int, key: str) -> str:
    """Make the interface where it is missing, or give it another private key; returns the public one.

    `address` is the node's own on the underlay: without any, rp_filter would drop whatever comes in (of IPv4).

    Raises:
        KernelError: EOPNOTSUPP: the kernel has no WireGuard.
    """
    route = host_socket()
    if route.index_of(WIREGUARD_LINK) is None:
        route.run([netlink.wireguard_add(WIREGUARD_LINK)])
    index = route.index_of(WIREGUARD_LINK)
    assert index is not None
    with _client() as client:
        _ask(lambda: client.set(WIREGUARD_LINK, private_key=key, listen_port=port))
        route.run([netlink.link_set(WIREGUARD_LINK, alias="netstore node", mtu=_MTU)])
        if ":" in address:
            accept_ipv6(WIREGUARD_LINK)
            route.run([netlink.link_set(index, up=True), *addressing.routes_by_name(WIREGUARD_LINK, index)])
        else:
            sysctl(f"net/ipv4/conf/{WIREGUARD_LINK}/rp_filter", "2")
            route.run(
                [addressing.address_add(index, address, 32, tolerate={errno.EEXIST}), netlink.link_set(index, up=True)]
            )
        return str(_text(_ask(lambda: list(client.info(WIREGUARD_LINK)))[0].get_attr("WGDEVICE_A_PUBLIC_KEY")))


def set_peers(peers: Mapping[str, tuple[str, int]]) -> None:
    """Speak with these alone: public key and port by address on the underlay.

    A new key takes its address over before the old one goes. It is greeted at once, so that what it sends meanwhile
    waits at its end for a moment, and is not lost.
    """
    with _client() as client:
        answers = _ask(lambda: list(client.info(WIREGUARD_LINK)))
        present = {
            _text(peer.get_attr("WGPEER_A_PUBLIC_KEY"))
            for answer in answers
            for peer in answer.get_attr("WGDEVICE_A_PEERS") or ()
        }
        for address, (key, port) in peers.items():
            if key not in present:
                peer = {
                    "public_key": key, "endpoint_addr": address, "endpoint_port": port,
                    "allowed_ips": [f"{address}/{128 if ':' in address else 32}"],
                    "persistent_keepalive": _KEEP_ALIVE_SECONDS,
                }  # fmt: skip
                _ask(lambda peer=peer: client.set(WIREGUARD_LINK, peer=peer))
        for key in present - {key for key, _ in peers.values()}:
            _ask(lambda key=key: client.set(WIREGUARD_LINK, peer={"public_key": key, "remove": True}))


def _client() -> Any:
    from pyroute2 import WireGuard  # it takes most of a second the first time

    return WireGuard()


def _ask(call: Any) -> Any:
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        return call()
    except NetlinkError as error:
        raise KernelError(error.code, "setting WireGuard's interface", WIREGUARD_LINK) from error


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
