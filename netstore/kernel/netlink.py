"""The messages of route netlink (rtnetlink(7)) that drivers need, encoded by pyroute2's classes; `route` sends them.

Kernel constants keep their C names.
"""

from __future__ import annotations

import errno
import functools
import ipaddress
import socket
import struct
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg, macvx_data
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from netstore.kernel.attributes import attribute, nested
from netstore.kernel.route import AF_BRIDGE, NTF_MASTER, NTF_SELF, Attributes, Request, encode, encode_neighbour

__all__ = [
    "RTPROT_NETSTORE",
    "address_add",
    "address_delete",
    "bridge_add",
    "forwarding_delete",
    "forwarding_local",
    "forwarding_set",
    "host_route_delete",
    "host_route_set",
    "ipvlan_add",
    "link_delete",
    "link_delete_group",
    "link_set",
    "link_up",
    "macvlan_add",
    "neighbour_delete",
    "neighbour_set",
    "port_set",
    "rate_limit",
    "route_delete",
    "route_replace",
    "routes_by_name",
    "tunnel_port_set",
    "veth_add",
    "veth_pair",
    "vlan_add",
    "vxlan_add",
    "wireguard_add",
]

RTM_NEWLINK, RTM_DELLINK = 16, 17
RTM_NEWADDR, RTM_DELADDR = 20, 21
RTM_NEWNEIGH, RTM_DELNEIGH = 28, 29
NDA_DST, NDA_LLADDR, NDA_IFINDEX = 1, 2, 8
NUD_REACHABLE, NUD_NOARP = 0x02, 0x40
NUD_PERMANENT = 0x80
RTM_NEWROUTE, RTM_DELROUTE = 24, 25
RTM_NEWRULE, FR_ACT_TO_TBL = 32, 1
FRA_PRIORITY, FRA_TABLE, FRA_OIFNAME, FRA_PROTOCOL = 6, 15, 17, 21
_TABLE, _RULE_PRIORITY = 28275, 28275  # "ns"
RTM_NEWQDISC, RTM_DELQDISC = 36, 37
TC_H_ROOT, TC_LINKLAYER_ETHERNET = 0xFFFFFFFF, 1
TCA_KIND, TCA_OPTIONS = 1, 2
TCA_TBF_PARMS, TCA_TBF_RATE64, TCA_TBF_BURST = 1, 4, 6
NLM_F_REQUEST, NLM_F_ACK = 0x1, 0x4
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
IFF_UP = 0x1
IFLA_LINKINFO, IFLA_INFO_KIND, IFLA_INFO_DATA = 18, 1, 2
IFLA_IPVLAN_MODE, IFLA_IPVLAN_FLAGS = 1, 2
IFA_F_NODAD = 0x2
IN6_ADDR_GEN_MODE_NONE = 1
RT_TABLE_MAIN, RTPROT_STATIC, RT_SCOPE_UNIVERSE, RTN_UNICAST = 254, 4, 0, 1
RT_SCOPE_LINK, RT_SCOPE_NOWHERE = 253, 255
RTPROT_NETSTORE = 110
"""Whose the routes to single endpoints are ("n")."""
_METRIC = 28275  # "ns": a route of somebody else's to the same destination wins
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_TABLE, RTA_VIA = 1, 4, 5, 6, 7, 15, 18

_HEADER = struct.Struct("IHHII")


def _no_ipv6_addresses() -> tuple[str, Any]:
    mode = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", IN6_ADDR_GEN_MODE_NONE)]}
    return ("IFLA_AF_SPEC", {"attrs": [("AF_INET6", mode)]})


def bridge_add(name: str, *, mac: str) -> Request:
    """Make a bridge without spanning tree, IPv6 addresses or multicast snooping, down.

    Its MTU is to be set afterwards: one given here is forgotten when its ports change (br_mtu_auto_adjust).
    """
    data = {"attrs": [("IFLA_BR_STP_STATE", 0), ("IFLA_BR_FORWARD_DELAY", 0), ("IFLA_BR_MCAST_SNOOPING", 0)]}
    attrs: Attributes = [
        ("IFLA_IFNAME", name),
        ("IFLA_ADDRESS", mac),
        ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "bridge"), ("IFLA_INFO_DATA", data)]}),
    ]
    return Request(encode(ifinfmsg, RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, {}, attrs), "making bridge", name)


# Stand in templates for what differs from one message to the next, so that it costs a replacement and not an encoding.
_NAME, _MAC, _ALIAS = b"\1" * 15, b"\2\3\4\5\6\7", b"\x08" * 120
_NAMESPACE, _INDEX = struct.pack("I", 0x7A7A7A7A), struct.pack("I", 0x7B7B7B7B)
_ADDRESS = {socket.AF_INET: bytes(range(0xE0, 0xE4)), socket.AF_INET6: bytes(range(0xE0, 0xF0))}
# if_link.h has more than pyroute2's map, which leaves out what it does not know without a word.
_MORE = (
    ("IFLA_MACVLAN_BC_QUEUE_LEN", "uint32"), ("IFLA_MACVLAN_BC_QUEUE_LEN_USED", "uint32"),
    ("IFLA_MACVLAN_BC_CUTOFF", "int32"),
)  # fmt: skip
if _MORE[0] not in macvx_data.nla_map:
    macvx_data.nla_map = (*macvx_data.nla_map, *_MORE)
_BROADCAST = bytes(range(0xD0, 0xD4))


def veth_add(name: str, *, master: int, mtu: int, peer: str, peer_mac: str, peer_namespace: int | None) -> Request:
    """Make a veth pair, down: `name` here, a port of the bridge `master`; `peer` in the namespace of that descriptor.

    Without a namespace the peer stays here (Docker's plugin protocol moves it itself).
    """
    data = _veth_template(len(name), master, mtu, peer, peer_namespace is not None)
    data = data.replace(_NAME[: len(name)], name.encode()).replace(_MAC, bytes.fromhex(peer_mac.replace(":", "")))
    if peer_namespace is not None:
        data = data.replace(_NAMESPACE, struct.pack("I", peer_namespace))
    return Request(data, "making interface", name)


def veth_pair(name: str, peer: str, *, mtu: int) -> Request:
    """Make a veth pair whose ends both stay here, down."""
    peer_attrs: Attributes = [("IFLA_IFNAME", peer), ("IFLA_MTU", mtu)]
    data = {"attrs": [("VETH_INFO_PEER", {"attrs": peer_attrs})]}
    return _link_add("veth", name, data, [("IFLA_MTU", mtu)])


def vlan_add(name: str, below: int, vlan_id: int) -> Request:
    """Make an 802.1q link of a VLAN on the interface of index `below`, down."""
    return _link_add("vlan", name, {"attrs": [("IFLA_VLAN_ID", vlan_id)]}, [("IFLA_LINK", below)])


def wireguard_add(name: str) -> Request:
    """Make a WireGuard interface, down."""
    return _link_add("wireguard", name, None, [])


def vxlan_add(name: str, *, vni: int, local: str, port: int, master: int, mtu: int, link: int = 0) -> Request:
    """Make a VXLAN interface (RFC 7348) that learns nothing, down, as a port of the bridge `master`.

    It ends with the interface of index `link`, where it is on one.
    """
    source = "IFLA_VXLAN_LOCAL6" if ":" in local else "IFLA_VXLAN_LOCAL"
    values: Attributes = [("IFLA_VXLAN_ID", vni), (source, local), ("IFLA_VXLAN_PORT", port)]
    if link:
        values.append(("IFLA_VXLAN_LINK", link))
    data: dict[str, Attributes] = {"attrs": [*values, ("IFLA_VXLAN_LEARNING", 0)]}
    return _link_add("vxlan", name, data, [("IFLA_MTU", mtu), ("IFLA_MASTER", master)])


def tunnel_port_set(name: str, *, alias: str, isolated: bool) -> Request:
    """Set a VXLAN interface's alias, and its bridge port to neither flood nor learn, and to answer for neighbours."""
    off = ("LEARNING", "UNICAST_FLOOD", "MCAST_FLOOD", "BCAST_FLOOD")
    flags: Attributes = [(f"IFLA_BRPORT_{each}", 0) for each in off]
    flags += [("IFLA_BRPORT_NEIGH_SUPPRESS", 1), ("IFLA_BRPORT_ISOLATED", int(isolated))]
    slave = {"attrs": [("IFLA_INFO_SLAVE_KIND", "bridge"), ("IFLA_INFO_SLAVE_DATA", {"attrs": flags})]}
    attrs: Attributes = [("IFLA_IFNAME", name), ("IFLA_IFALIAS", alias), ("IFLA_LINKINFO", slave)]
    return Request(encode(ifinfmsg, RTM_NEWLINK, 0, {}, attrs), "setting bridge port", name)


def macvlan_add(
    name: str,
    parent: int,
    *,
    mode: str,
    mac: str,
    namespace: int | None = None,
    mtu: int = 0,
    broadcast_cutoff: int = 1,
) -> Request:
    """Make a macvlan interface on the one of index `parent`, down, here or in the namespace of that descriptor."""
    data: dict[str, Attributes] = {"attrs": [("IFLA_MACVLAN_MODE", mode)]}
    attrs: Attributes = [("IFLA_LINK", parent), ("IFLA_ADDRESS", mac), *([("IFLA_MTU", mtu)] if mtu else [])]
    if namespace is not None:
        attrs.append(("IFLA_NET_NS_FD", namespace))
    if broadcast_cutoff != 1:
        data["attrs"].append(("IFLA_MACVLAN_BC_CUTOFF", broadcast_cutoff))
    return _link_add("macvlan", name, data, attrs)


def ipvlan_add(name: str, parent: int, *, mode: str, flag: str, namespace: int, mtu: int = 0) -> Request:
    """Make an ipvlan interface on the one of index `parent`, down, in the namespace of that descriptor."""
    modes, flags = {"l2": 0, "l3": 1, "l3s": 2}, {"bridge": 0, "private": 1, "vepa": 2}
    attrs: Attributes = [("IFLA_LINK", parent), ("IFLA_NET_NS_FD", namespace), *([("IFLA_MTU", mtu)] if mtu else [])]
    flags_, first = NLM_F_CREATE | NLM_F_EXCL, ("IFLA_IFNAME", name)
    message = bytearray(encode(ifinfmsg, RTM_NEWLINK, flags_, {}, [first, *attrs]))
    data = attribute(IFLA_IPVLAN_MODE, struct.pack("=H", modes[mode]))  # pyroute2 does not know the flags
    data += attribute(IFLA_IPVLAN_FLAGS, struct.pack("=H", flags[flag]))
    message += nested(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, b"ipvlan\0") + nested(IFLA_INFO_DATA, data))
    struct.pack_into("=I", message, 0, len(message))
    return Request(bytes(message), "making ipvlan interface", name)


def _link_add(kind: str, name: str, data: dict[str, Attributes] | None, attrs: Attributes) -> Request:
    own = [] if data is None else [("IFLA_INFO_DATA", data)]
    info = ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", kind), *own]})
    message = encode(ifinfmsg, RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, {}, [("IFLA_IFNAME", name), *attrs, info])
    return Request(message, f"making {kind} interface", name)


@functools.lru_cache(maxsize=256)
def _veth_template(name_length: int, master: int, mtu: int, peer: str, inside: bool) -> bytes:  # noqa: FBT001
    inner: Attributes = [("IFLA_IFNAME", peer), ("IFLA_ADDRESS", _MAC.hex(":")), ("IFLA_MTU", mtu)]
    if inside:
        inner.append(("IFLA_NET_NS_FD", *struct.unpack("I", _NAMESPACE)))
    data = {"attrs": [("VETH_INFO_PEER", {"attrs": inner})]}
    attrs: Attributes = [
        ("IFLA_IFNAME", _NAME[:name_length].decode()),
        ("IFLA_MTU", mtu),
        ("IFLA_MASTER", master),
        ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", data)]}),
    ]
    return encode(ifinfmsg, RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, {}, attrs)


@functools.lru_cache(maxsize=256)
def link_set(
    to: str | int,
    *,
    up: bool = False,
    name: str = "",
    alias: str = "",
    ipv6_addresses: bool = True,
    mtu: int = 0,
    group: int | None = None,
    tolerate: frozenset[int] = frozenset(),
) -> Request:
    """Change an interface, given by name or index, only in what is named; one given by index may get another name.

    The alias is set here and not where an interface is made: the kernel ignores it there (rtnl_create_link).
    """
    attrs: Attributes = []
    if isinstance(to, str):
        attrs.append(("IFLA_IFNAME", to))
    elif name:
        attrs.append(("IFLA_IFNAME", name))
    if alias:
        attrs.append(("IFLA_IFALIAS", alias))
    if mtu:
        attrs.append(("IFLA_MTU", mtu))
    if group is not None:
        attrs.append(("IFLA_GROUP", group))
    if not ipv6_addresses:
        attrs.append(_no_ipv6_addresses())
    fields: dict[str, Any] = {"index": to if isinstance(to, int) else 0}
    if up:
        fields |= {"flags": IFF_UP, "change": IFF_UP}
    data = encode(ifinfmsg, RTM_NEWLINK, 0, fields, attrs)
    return Request(data, "changing interface", name or str(to), tolerate)


def port_set(name: str, *, alias: str, hairpin: bool, isolated: bool, ipv6_addresses: bool = False) -> Request:
    """Set a bridge port's alias and flags: hairpin (may send back), isolated (not to others)."""
    data = _port_template(len(name), len(alias), hairpin, isolated, ipv6_addresses)
    data = data.replace(_NAME[: len(name)], name.encode()).replace(_ALIAS[: len(alias)], alias.encode())
    return Request(data, "setting bridge port", name)


@functools.lru_cache(maxsize=64)
def _port_template(name_length: int, alias_length: int, hairpin: bool, isolated: bool, ipv6: bool) -> bytes:  # noqa: FBT001
    slave = {"attrs": [("IFLA_BRPORT_MODE", int(hairpin)), ("IFLA_BRPORT_ISOLATED", int(isolated))]}
    info = {"attrs": [("IFLA_INFO_SLAVE_KIND", "bridge"), ("IFLA_INFO_SLAVE_DATA", slave)]}
    attrs: Attributes = [
        ("IFLA_IFNAME", _NAME[:name_length].decode()),
        ("IFLA_IFALIAS", _ALIAS[:alias_length].decode()),
        ("IFLA_LINKINFO", info),
        *([] if ipv6 else [_no_ipv6_addresses()]),
    ]
    return encode(ifinfmsg, RTM_NEWLINK, 0, {}, attrs)


def link_up(name: str) -> Request:
    """Set an interface up."""
    data = _up_template(len(name)).replace(_NAME[: len(name)], name.encode())
    return Request(data, "setting up interface", name)


@functools.lru_cache(maxsize=16)
def _up_template(name_length: int) -> bytes:
    name: Attributes = [("IFLA_IFNAME", _NAME[:name_length].decode())]
    return encode(ifinfmsg, RTM_NEWLINK, 0, {"flags": IFF_UP, "change": IFF_UP}, name)


def link_delete(name: str) -> Request:
    """Delete an interface; one that is gone is a success."""
    return Request(
        encode(ifinfmsg, RTM_DELLINK, 0, {}, [("IFLA_IFNAME", name)]),
        "deleting interface",
        name,
        frozenset({errno.ENODEV}),
    )


def link_delete_group(group: int) -> Request:
    """Delete every interface of a group in one go: they share one RCU grace period."""
    return Request(
        encode(ifinfmsg, RTM_DELLINK, 0, {}, [("IFLA_GROUP", group)]),
        "deleting interface group",
        str(group),
        frozenset({errno.ENODEV}),
    )


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


def rate_limit(index: int, bytes_per_second: int) -> Request:
    """Limit what an interface sends (tc-tbf(8)), in place of the limit that it has; 0 takes the limit away.

    The bucket holds 10 ms of the rate, at least 64 KiB for the largest packets before segmentation; 50 ms may wait.
    """
    if not bytes_per_second:
        header = struct.pack("=BxHiIII", 0, 0, index, 0, TC_H_ROOT, 0)
        data = _HEADER.pack(16 + len(header), RTM_DELQDISC, NLM_F_REQUEST | NLM_F_ACK, 0, 0) + header
        return Request(
            data, "taking the rate limit from interface", str(index), frozenset({errno.ENOENT, errno.EINVAL})
        )
    burst = max(bytes_per_second // 100, 1 << 16)
    limit = min(burst + bytes_per_second // 20, 0xFFFFFFFF)
    rate = struct.pack("=BBHhHI", 0, TC_LINKLAYER_ETHERNET, 0, 0, 0, min(bytes_per_second, 0xFFFFFFFF))
    options = attribute(TCA_TBF_PARMS, rate + bytes(len(rate)) + struct.pack("=III", limit, 0, 0))
    options += attribute(TCA_TBF_RATE64, struct.pack("=Q", bytes_per_second))
    options += attribute(TCA_TBF_BURST, struct.pack("=I", burst))
    body = struct.pack("=BxHiIII", 0, 0, index, 1 << 16, TC_H_ROOT, 0)
    body += attribute(TCA_KIND, b"tbf\0") + nested(TCA_OPTIONS, options)
    flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE
    data = _HEADER.pack(16 + len(body), RTM_NEWQDISC, flags, 0, 0) + body
    return Request(data, "limiting the rate of interface", str(index))
