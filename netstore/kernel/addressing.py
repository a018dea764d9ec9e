"""The messages of route netlink (rtnetlink(7)) for addresses, routes, neighbours and forwarding entries.

`route` sends them; `netlink` has those for interfaces. Kernel constants keep their C names.
"""

from __future__ import annotations

import errno
import functools
import ipaddress
import socket
import struct
from collections.abc import Collection
from dataclasses import replace

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from netstore.kernel.attributes import attribute
from netstore.kernel.route import AF_BRIDGE, NTF_MASTER, NTF_SELF, Attributes, Request, encode, encode_neighbour

__all__ = [
    "RTPROT_NETSTORE",
    "address_add",
    "address_delete",
    "forwarding_delete",
    "forwarding_local",
    "forwarding_set",
    "host_route_delete",
    "host_route_set",
    "neighbour_delete",
    "neighbour_set",
    "route_delete",
    "route_replace",
    "routes_by_name",
]

RTM_NEWADDR, RTM_DELADDR = 20, 21
RTM_NEWNEIGH, RTM_DELNEIGH = 28, 29
NDA_DST, NDA_LLADDR, NDA_IFINDEX = 1, 2, 8
NUD_REACHABLE, NUD_NOARP = 0x02, 0x40
RTM_NEWROUTE, RTM_DELROUTE = 24, 25
RTM_NEWRULE, FR_ACT_TO_TBL = 32, 1
FRA_PRIORITY, FRA_TABLE, FRA_OIFNAME, FRA_PROTOCOL = 6, 15, 17, 21
_TABLE, _RULE_PRIORITY = 28275, 28275  # "ns"
NLM_F_REQUEST, NLM_F_ACK = 0x1, 0x4
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
IFA_F_NODAD = 0x2
RT_TABLE_MAIN, RTPROT_STATIC, RT_SCOPE_UNIVERSE, RTN_UNICAST = 254, 4, 0, 1
RT_SCOPE_LINK, RT_SCOPE_NOWHERE = 253, 255
RTPROT_NETSTORE = 110
"""Whose the routes to single endpoints are ("n")."""
_METRIC = 28275  # "ns": a route of somebody else's to the same destination wins
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_TABLE, RTA_VIA = 1, 4, 5, 6, 7, 15, 18
_HEADER = struct.Struct("IHHII")

# Stand in a template for what differs from one message to the next, so that it costs a replacement and not an encoding.
_INDEX = struct.pack("I", 0x7B7B7B7B)
_ADDRESS = {socket.AF_INET: bytes(range(0xE0, 0xE4)), socket.AF_INET6: bytes(range(0xE0, 0xF0))}
_BROADCAST = bytes(range(0xD0, 0xD4))


def address_add(
    index: int, address: str, prefix: int, *, tolerate: Collection[int] = (), speaks: bool = True
) -> Request:
    """Give an interface an address: IPv4 with its broadcast address, IPv6 without duplicate address detection.

    An IPv6 address that does not speak answers, and is nobody's choice of a source (RFC 4862: deprecated).
    """
    parsed = ipaddress.ip_address(address)
    family = socket.AF_INET if parsed.version == 4 else socket.AF_INET6
    data = _address_template(family, prefix, speaks).replace(_INDEX, struct.pack("I", index))
    data = data.replace(_ADDRESS[family], parsed.packed)
    if family == socket.AF_INET:
        last = int(parsed) | ((1 << (32 - prefix)) - 1)
        data = data.replace(_BROADCAST, last.to_bytes(4, "big"))
    return Request(data, "adding address", f"{address}/{prefix}", frozenset(tolerate))


def address_delete(index: int, address: str, prefix: int) -> Request:
    """Take an address from an interface; one that is gone is a success."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    fields = {"family": family, "prefixlen": prefix, "index": index}
    data = encode(ifaddrmsg, RTM_DELADDR, 0, fields, [("IFA_LOCAL", address), ("IFA_ADDRESS", address)])
    return Request(data, "removing address", f"{address}/{prefix}", frozenset({errno.EADDRNOTAVAIL}))


@functools.lru_cache(maxsize=64)
def _address_template(family: int, prefix: int, speaks: bool) -> bytes:  # noqa: FBT001
    address = socket.inet_ntop(family, _ADDRESS[socket.AddressFamily(family)])
    attrs: Attributes = [("IFA_LOCAL", address), ("IFA_ADDRESS", address)]
    if family == socket.AF_INET and prefix < 31:
        attrs.append(("IFA_BROADCAST", socket.inet_ntoa(_BROADCAST)))
    fields = {"family": family, "prefixlen": prefix, "index": struct.unpack("I", _INDEX)[0], "scope": RT_SCOPE_UNIVERSE}
    if family == socket.AF_INET6:
        fields["flags"] = IFA_F_NODAD
        if not speaks:
            attrs.append(("IFA_CACHEINFO", {"ifa_preferred": 0, "ifa_valid": 0xFFFFFFFF}))
    return encode(ifaddrmsg, RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, fields, attrs)


@functools.lru_cache(maxsize=256)
def route_replace(gateway: str, index: int, destination: str = "", *, metric: int = 0) -> Request:
    """Make `gateway` on interface `index` the way to a destination (CIDR), "" for everywhere, in place of what is.

    Without a gateway the destination is a neighbour on the interface.
    """
    data = _route(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, gateway, index, destination, metric)
    return Request(data, f"setting the route to {destination or 'everywhere'} via", gateway)


def route_delete(gateway: str, index: int, destination: str) -> Request:
    """Remove a route; one that is gone is a success."""
    data = _route(RTM_DELROUTE, 0, gateway, index, destination)
    return Request(data, f"removing the route to {destination} via", gateway, frozenset({errno.ESRCH}))


def _route(kind: int, flags: int, gateway: str, index: int, destination: str, metric: int = 0) -> bytes:
    fields = {
        "family": socket.AF_INET6 if ":" in (gateway or destination) else socket.AF_INET,
        "table": RT_TABLE_MAIN,
        "proto": RTPROT_STATIC,
        "scope": RT_SCOPE_UNIVERSE if gateway else RT_SCOPE_LINK,
        "type": RTN_UNICAST,
    }
    attrs: Attributes = [*([("RTA_GATEWAY", gateway)] if gateway else []), ("RTA_OIF", index)]
    if destination:
        address, _, length = destination.partition("/")
        attrs.append(("RTA_DST", address))
        fields["dst_len"] = int(length)
    if metric:
        attrs.append(("RTA_PRIORITY", metric))
    return encode(rtmsg, kind, flags, fields, attrs)


def host_route_set(address: str, gateway: str, index: int, source: str) -> Request:
    """Send what is for one address by a gateway on interface `index`, which may be of the other family; the host speaks
    to it from `source`, its own.
    """
    packed, family = ipaddress.ip_address(gateway).packed, socket.AF_INET6 if ":" in gateway else socket.AF_INET
    body = attribute(RTA_OIF, struct.pack("I", index)) + attribute(RTA_PREFSRC, ipaddress.ip_address(source).packed)
    if (":" in address) == (":" in gateway):
        body += attribute(RTA_GATEWAY, packed)
    else:
        body += attribute(RTA_VIA, struct.pack("=H", family) + packed)
    return _host_route(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, address, body)


def host_route_delete(address: str) -> Request:
    """Remove what `host_route_set` made; what is gone is a success."""
    return replace(_host_route(RTM_DELROUTE, 0, address, b""), tolerate=frozenset({errno.ESRCH}))


def _host_route(kind: int, flags: int, address: str, body: bytes) -> Request:
    packed = ipaddress.ip_address(address).packed
    scope, type_ = (RT_SCOPE_UNIVERSE, RTN_UNICAST) if kind == RTM_NEWROUTE else (RT_SCOPE_NOWHERE, 0)
    header = struct.pack(
        "=8BI", _family(packed), len(packed) * 8, 0, 0, RT_TABLE_MAIN, RTPROT_NETSTORE, scope, type_, 0
    )
    body = header + attribute(RTA_DST, packed) + attribute(RTA_PRIORITY, struct.pack("I", _METRIC)) + body
    data = _HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | NLM_F_ACK | flags, 0, 0) + body
    return Request(data, "changing the route to", address)


def routes_by_name(name: str, index: int) -> list[Request]:
    """Let IPv6 that names an interface to go by go there, wherever else the destination is: a rule, and a table."""
    rule = struct.pack("=8BI", socket.AF_INET6, 0, 0, 0, 0, 0, 0, FR_ACT_TO_TBL, 0)
    rule += attribute(FRA_OIFNAME, name.encode() + b"\0") + attribute(FRA_TABLE, struct.pack("I", _TABLE))
    rule += attribute(FRA_PRIORITY, struct.pack("I", _RULE_PRIORITY)) + attribute(
        FRA_PROTOCOL, bytes([RTPROT_NETSTORE])
    )
    header = struct.pack(
        "=8BI", socket.AF_INET6, 0, 0, 0, 0, RTPROT_NETSTORE, RT_SCOPE_UNIVERSE, RTN_UNICAST, 0
    )  # fmt: skip
    body = header + attribute(RTA_OIF, struct.pack("I", index)) + attribute(RTA_TABLE, struct.pack("I", _TABLE))
    found = []
    for kind, flags, data in ((RTM_NEWRULE, NLM_F_EXCL, rule), (RTM_NEWROUTE, NLM_F_REPLACE, body)):
        message = _HEADER.pack(16 + len(data), kind, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | flags, 0, 0) + data
        found.append(Request(message, "routing what names interface", name, frozenset({errno.EEXIST})))
    return found


def neighbour_set(index: int, address: str, mac: str) -> Request:
    """Tell an interface the MAC of a neighbour for good: nothing is asked on the link, and it never counts as clutter.

    The kernel's tables are one for all namespaces, and hold 1,024 neighbours that were asked for (gc_thresh3).
    """
    packed = ipaddress.ip_address(address).packed
    body = attribute(NDA_DST, packed) + attribute(NDA_LLADDR, bytes.fromhex(mac.replace(":", "")))
    data = encode_neighbour(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, _family(packed), index, body)
    return Request(data, "setting the neighbour", address)


def neighbour_delete(index: int, address: str) -> Request:
    """Forget a neighbour; one that is gone, or whose interface is, is a success."""
    packed = ipaddress.ip_address(address).packed
    data = encode_neighbour(RTM_DELNEIGH, 0, _family(packed), index, attribute(NDA_DST, packed))
    return Request(data, "forgetting the neighbour", address, frozenset({errno.ENOENT, errno.ENODEV}))


def forwarding_set(index: int, mac: str, vtep: str, *, via: int = 0) -> Request:
    """Say that a MAC is behind the VXLAN interface of that index, at a VTEP: to the interface and to its bridge.

    Packets go there by the interface of index `via`, by default by the route that there is.

    Static and not permanent: to the bridge, permanent means its own (br_fdb, BR_FDB_LOCAL).
    """
    return _forwarding(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, index, mac, vtep, via)


def forwarding_delete(index: int, mac: str, vtep: str, *, via: int = 0) -> Request:
    """Forget where a MAC is; one that is not known is a success."""
    return replace(_forwarding(RTM_DELNEIGH, 0, index, mac, vtep, via), tolerate=frozenset({errno.ENOENT}))


def _forwarding(kind: int, flags: int, index: int, mac: str, vtep: str, via: int) -> Request:
    packed = ipaddress.ip_address(vtep).packed
    body = attribute(NDA_LLADDR, bytes.fromhex(mac.replace(":", ""))) + attribute(NDA_DST, packed)
    if via:
        body += attribute(NDA_IFINDEX, struct.pack("I", via))
    data = encode_neighbour(
        kind, flags, AF_BRIDGE, index, body, state=NUD_NOARP | NUD_REACHABLE, marks=NTF_SELF | NTF_MASTER
    )
    return Request(data, "saying where is", f"{mac} ({vtep})")


def forwarding_local(bridge: int, mac: str) -> Request:
    """Let a bridge take frames to a MAC, besides its own, as the host's."""
    body = attribute(NDA_LLADDR, bytes.fromhex(mac.replace(":", "")))
    data = encode_neighbour(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, AF_BRIDGE, bridge, body, marks=NTF_SELF)
    return Request(data, "giving a bridge the MAC", mac)


def _family(packed: bytes) -> int:
    return socket.AF_INET if len(packed) == 4 else socket.AF_INET6
