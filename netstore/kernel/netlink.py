"""The messages of route netlink (rtnetlink(7)) for interfaces, encoded by pyroute2's classes; `route` sends them.

`addressing` has those for what interfaces hold. Kernel constants keep their C names.
"""

from __future__ import annotations

import errno
import functools
import struct
from typing import Any

from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg, macvx_data

from netstore.kernel.attributes import attribute, nested
from netstore.kernel.route import Attributes, Request, encode

__all__ = [
    "bridge_add",
    "ipvlan_add",
    "link_delete",
    "link_delete_group",
    "link_set",
    "link_up",
    "macvlan_add",
    "port_set",
    "rate_limit",
    "tunnel_port_set",
    "veth_add",
    "veth_pair",
    "vlan_add",
    "vxlan_add",
    "wireguard_add",
]

RTM_NEWLINK, RTM_DELLINK = 16, 17
RTM_NEWQDISC, RTM_DELQDISC = 36, 37
TC_H_ROOT, TC_LINKLAYER_ETHERNET = 0xFFFFFFFF, 1
TCA_KIND, TCA_OPTIONS = 1, 2
TCA_TBF_PARMS, TCA_TBF_RATE64, TCA_TBF_BURST = 1, 4, 6
NLM_F_REQUEST, NLM_F_ACK = 0x1, 0x4
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
IFF_UP = 0x1
IFLA_LINKINFO, IFLA_INFO_KIND, IFLA_INFO_DATA = 18, 1, 2
IFLA_IPVLAN_MODE, IFLA_IPVLAN_FLAGS = 1, 2
IN6_ADDR_GEN_MODE_NONE = 1
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
_NAMESPACE = struct.pack("I", 0x7A7A7A7A)
# if_link.h has more than pyroute2's map, which leaves out what it does not know without a word.
_MORE = (
    ("IFLA_MACVLAN_BC_QUEUE_LEN", "uint32"), ("IFLA_MACVLAN_BC_QUEUE_LEN_USED", "uint32"),
    ("IFLA_MACVLAN_BC_CUTOFF", "int32"),
)  # fmt: skip
if _MORE[0] not in macvx_data.nla_map:
    macvx_data.nla_map = (*macvx_data.nla_map, *_MORE)


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
