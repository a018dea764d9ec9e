"""The static part of the firewall: tables, sets, chains and rules, as nft writes them; see `firewall`."""

from __future__ import annotations

from typing import TypeAlias

from netstore.kernel.policing import BRIDGED, ROUTED
from netstore.model import PAIR_PREFIX, TUNNEL_PREFIX, WIREGUARD_LINK

__all__ = ["EXPIRING", "FIRST_SLOT", "GUARD_SETS", "SLOTS", "TABLES", "Chains", "Sets"]

Sets: TypeAlias = dict[str, tuple[str, str]]
Chains: TypeAlias = dict[str, tuple[str, tuple[str, ...]]]

WELL_KNOWN = "inet_proto . inet_service"
SLOTS = 127
"""Among so many slots the endpoints of a service are spread, and each connection takes one at random. A prime."""
FIRST_SLOT = 0x6E730000
"""A slot is carried by the first packet's mark: in a concatenation numgen itself has no type (nft 1.0.6 crashes as it
lists such a map). These digits are "ns": no mark that a routing rule would look for.
"""

_SETS: Sets = {
    "bridges": ("set", "type ifname;"),
    "internal": ("set", "type ifname;"),
    "same": ("set", "type ifname . ifname;"),
    "own": ("set", "type ifname . ifname;"),
    # Nothing between these and other bridges of ours.
    "strict": ("set", "type ifname;"),
    # Bridges of networks that have policies, and the chains of those.
    "policed": ("map", "type ifname : verdict;"),
    # May be reached from outside without having published anything (gateway mode nat-unprotected).
    "open": ("set", "type ifname;"),
    "open6": ("set", "type ifname;"),
    # Published ports may be reached at the container's own address: from everywhere, or from one interface.
    "routed": ("set", "type ifname;"),
    "routed6": ("set", "type ifname;"),
    "trusted": ("set", "type ifname . ifname;"),
    # Ports served on ::1, and where the relay listens that serves them.
    "relayed": ("set", "type inet_service;"),
    "relayed_ranges": ("set", "type inet_service; flags interval;"),
    "relay": ("map", "type inet_proto : inet_service;"),
    # UDP ports of our tunnels, and the nodes whose tunnels are heard. Nobody else's are, whichever way they come: a
    # container's would otherwise be masqueraded into a trusted node's.
    "tunnels": ("set", "type inet_service;"),
    # Those of encrypted networks, which come and go through WireGuard alone.
    "sealed": ("set", "type inet_service;"),
    "service_ports": ("set", f"type {WELL_KNOWN};"),
    # By the interface that leads to them, MACs of the nodes that share a link with this one.
    "near_nodes": ("set", "type ifname . ether_addr;"),
    "vteps": ("set", "type ipv4_addr;"),
    "vteps6": ("set", "type ipv6_addr;"),
}
for _six, _addr in (("", "ipv4_addr"), ("6", "ipv6_addr")):
    _SETS |= {
        f"masqueraded{_six}": ("set", "type ifname;"),
        f"sources{_six}": ("map", f"type ifname : {_addr};"),
        f"subnets{_six}": ("set", f"type ifname . {_addr}; flags interval;"),
        f"ports{_six}": ("map", f"type {WELL_KNOWN} : {_addr} . inet_service;"),
        f"ports_at{_six}": ("map", f"type {_addr} . {WELL_KNOWN} : {_addr} . inet_service;"),
        f"ranges{_six}": ("map", f"type {WELL_KNOWN} : {_addr}; flags interval;"),
        f"ranges_at{_six}": ("map", f"type {_addr} . {WELL_KNOWN} : {_addr}; flags interval;"),
        f"direct{_six}": ("set", f"type {_addr} . {WELL_KNOWN};"),
        # Virtual addresses of services, ports that lead to services, and the endpoint of each slot; remote ones answer
        # through the node that asked them.
        f"services{_six}": ("set", f"type {_addr};"),
        f"slots{_six}": ("map", f"type {_addr} . mark : {_addr};"),
        f"port_slots{_six}": ("map", f"type {WELL_KNOWN} . mark : {_addr} . inet_service;"),
        f"elsewhere{_six}": ("set", f"type ifname . {_addr};"),
        # By the bridge, endpoints that see its address instead of a client's who came by a published port, as answers
        # would go elsewhere: those of other nodes, whose ports every node publishes, and those of this one whose way
        # out is another network.
        f"masked{_six}": ("set", f"type ifname . {_addr};"),
        # Networks whose packets go to near nodes by plain routes: bridge and subnet, subnet alone, and the node's own
        # address there.
        f"near{_six}": ("set", f"type ifname . {_addr}; flags interval;"),
        f"near_sources{_six}": ("set", f"type {_addr}; flags interval;"),
        f"near_hosts{_six}": ("map", f"type {_addr} : {_addr}; flags interval;"),
        # By the bridge, other nodes' own addresses: their probes are answered, whatever the policies.
        f"probers{_six}": ("set", f"type ifname . {_addr};"),
        # Who may reach a published port, where that was limited: the port, and the port with its sources.
        f"limited{_six}": ("set", f"type {_addr} . {WELL_KNOWN};"),
        f"allowed{_six}": ("set", f"type {_addr} . {_addr} . {WELL_KNOWN}; flags interval;"),
    }


def _both(*rules: str) -> tuple[str, ...]:
    """Return rules for both families: IP and SIX stand for what differs."""
    return tuple(
        rule.replace("IP", ip).replace("SIX", six).replace("NFPROTO", nfproto)
        for rule in rules
        for ip, six, nfproto in (("ip", "", "ipv4"), ("ip6", "6", "ipv6"))
    )


_PORT = "meta l4proto . th dport"
# Who has an address, and who listens to a group: what a link needs to work, whatever the policies.
_LINK_CONTROL = (
    "nd-neighbor-solicit, nd-neighbor-advert, mld-listener-query, mld-listener-report, mld-listener-done,"
    " mld2-listener-report"
)
_SLOT = f"meta mark set numgen random mod {SLOTS} offset {FIRST_SLOT} dnat IP to"
_CHAINS: Chains = {
    # Ordered by cost: what passes within one network, which br_netfilter shows to us, is decided after few looks.
    "forward": (
        "type filter hook forward priority filter; policy accept;",
        (
            "iifname != @bridges oifname != @bridges accept",
            "tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu",
            "iifname . oifname @own goto within",
            "iifname @strict oifname @bridges drop",
            "iifname @bridges oifname @strict drop",
            *_both("iifname @strict IP daddr @near_sourcesSIX iifname . IP daddr != @nearSIX drop"),
            "iifname vmap @policed",
            "oifname vmap @policed",
            "ct state established,related accept",
            *_both(
                "oifname != @bridges iifname . IP daddr @nearSIX accept",
                "iifname != @bridges oifname . IP saddr @nearSIX accept",
            ),
            "goto between",
        ),
    ),
    "within": (
        "",
        (
            "iifname vmap @policed",
            "ct state established,related accept",
            "iifname . oifname @same accept",
            "goto between",
        ),
    ),
    "between": (
        "",
        (
            "iifname @internal drop",
            "oifname @internal drop",
            *_both(
                f"IP daddr . {_PORT} @limitedSIX IP saddr . IP daddr . {_PORT} != @allowedSIX drop",
                "meta nfproto NFPROTO oifname @openSIX accept",
                f"oifname @routedSIX IP daddr . {_PORT} @directSIX accept",
                f"iifname . oifname @trusted IP daddr . {_PORT} @directSIX accept",
            ),
            "oifname @routed meta l4proto icmp accept",
            "oifname @routed6 meta l4proto icmpv6 accept",
            "oifname @bridges ct status dnat accept",
            "oifname @bridges drop",
            *_both("IP daddr @near_sourcesSIX ct status ! dnat drop"),
        ),
    ),
    # What endpoints say to the node itself, where a policy has a word in it; what the node began is its own affair.
    "input": (
        "type filter hook input priority filter; policy accept;",
        (
            *_both("IP daddr @servicesSIX jump unserved"),
            "iifname != @bridges accept",
            "ct direction reply accept",
            f"icmpv6 type {{ {_LINK_CONTROL}, nd-router-solicit }} accept",
            "ip protocol igmp accept",
            "icmp type echo-request iifname . ip saddr @probers accept",
            "icmpv6 type echo-request iifname . ip6 saddr @probers6 accept",
            "iifname vmap @policed",
        ),
    ),
    # Services without an endpoint that works refuse: what listens on the host is not theirs.
    "unserved": (
        "",
        (
            "ct state new meta l4proto tcp reject with tcp reset",
            "ct state new meta l4proto { udp, sctp } reject",
        ),
    ),
    # Containers must not reach what listens on the host's loopback, which route_localnet would let them.
    "raw": (
        "type filter hook prerouting priority raw; policy accept;",
        (
            "ip daddr 127.0.0.0/8 iifname @bridges drop",
            "udp dport @tunnels jump tunnelled",
            # Nobody but near nodes speaks as an endpoint of a network that has plain routes.
            *_both('IP saddr @near_sourcesSIX iifname != @bridges iifname != "lo" goto arrival'),
        ),
    ),
    # A tunnel's packets go one way, from a port of their own for each flow inside: tracked, they would be an entry for
    # each of those, never established.
    "tunnelled": (
        "",
        (
            "iifname @bridges drop",
            f'udp dport @sealed iifname != "{WIREGUARD_LINK}" drop',
            "ip saddr @vteps notrack accept",
            "ip6 saddr @vteps6 notrack accept",
            "fib daddr type local drop",
        ),
    ),
    "arrival": ("", ("iifname . ether saddr @near_nodes accept", "drop")),
    "sealing": (
        "type filter hook output priority raw; policy accept;",
        (
            f'udp dport @sealed oifname != "{WIREGUARD_LINK}" drop',
            "udp dport @tunnels ip daddr @vteps notrack",
            "udp dport @tunnels ip6 daddr @vteps6 notrack",
        ),
    ),
    "publish": (
        "",
        _both(
            f"IP daddr @servicesSIX meta l4proto {{ tcp, udp, sctp }} {_SLOT} IP daddr . meta mark map @slotsSIX",
            "IP daddr @servicesSIX accept",
            f"meta nfproto NFPROTO {_PORT} @service_ports {_SLOT} {_PORT} . meta mark map @port_slotsSIX",
            f"dnat IP to IP daddr . {_PORT} map @ports_atSIX",
            f"dnat IP to {_PORT} map @portsSIX",
            f"dnat IP to IP daddr . {_PORT} map @ranges_atSIX",
            f"dnat IP to {_PORT} map @rangesSIX",
        ),
    ),
    # 127/8 from outside is not served: what is bound to loopback stays there, whoever is on the link.
    "prerouting": (
        "type nat hook prerouting priority dstnat; policy accept;",
        ("ip daddr 127.0.0.0/8 accept", "fib daddr type local jump publish"),
    ),
    "output": (
        "type nat hook output priority -100; policy accept;",
        (
            "ip6 daddr ::1 tcp dport @relayed redirect to :meta l4proto map @relay",
            "ip6 daddr ::1 tcp dport @relayed_ranges redirect to :meta l4proto map @relay",
            "ip6 daddr ::1 accept",
            "fib daddr type local jump publish",
        ),
    ),
    "postrouting": (
        "type nat hook postrouting priority srcnat; policy accept;",
        (
            "oifname @bridges ip saddr 127.0.0.0/8 masquerade",
            *_both(
                "oifname != @bridges ct status dnat snat IP to IP daddr map @near_hostsSIX",
                "oifname != @bridges iifname . IP daddr @nearSIX accept",
                "ct status dnat oifname . IP saddr @subnetsSIX masquerade",
                "ct status dnat oifname . IP daddr @elsewhereSIX masquerade",
                "ct status dnat oifname . IP daddr @maskedSIX masquerade",
                "oifname != @bridges snat IP to iifname map @sourcesSIX",
                "meta nfproto NFPROTO iifname @masqueradedSIX oifname != @bridges masquerade",
            ),
        ),
    ),
}


def _flows(key: str) -> tuple[str, ...]:
    """Return rules that remember who began to speak to whom; KEY is the direction."""
    one, other = key.split()
    ported, rest = "meta l4proto { tcp, udp, sctp }", "meta l4proto != { tcp, udp, sctp }"
    ends = f"IP {one}addr . IP {other}addr . meta l4proto"
    return (
        *_both(
            f"{ported} update @flowsSIX {{ {ends} . th {one}port . th {other}port }}",
            f"{rest} update @talksSIX {{ {ends} }}",
        ),
        "accept",
    )


# Whatever leaves one of our pairs is looked at, unless the pair is in `unguarded`; so an endpoint costs one element for
# each of its addresses, and one for its MAC.
GUARD_SETS: Sets = {
    "unguarded": ("set", "type ifname;"),
    "macs": ("set", "type ifname . ether_addr;"),
    "senders": ("set", "type ifname . ether_addr . ipv4_addr;"),
    "senders6": ("set", "type ifname . ether_addr . ipv6_addr;"),
    # By the tunnel that they come through, MACs that are the host's besides its bridge's own.
    "ours": ("set", "type ifname . ether_addr;"),
    # Endpoints of networks that have policies, and the chains of those.
    "members": ("map", "type ifname : verdict;"),
    # Addresses of endpoints on near nodes; and the bridge's MAC by the interface of an endpoint that may speak to them:
    # what it sends them is the host's, to route.
    "near_ends": ("set", "type ipv4_addr;"),
    "near_ends6": ("set", "type ipv6_addr;"),
    "detours": ("map", "type ifname : ether_addr;"),
}
EXPIRING: Sets = {}
for _six, _addr in (("", "ipv4_addr"), ("6", "ipv6_addr")):
    _expiring = "flags dynamic,timeout; size 65536; timeout"
    EXPIRING |= {
        f"flows{_six}": ("set", f"type {_addr} . {_addr} . {WELL_KNOWN} . inet_service; {_expiring} 5m;"),
        f"talks{_six}": ("set", f"type {_addr} . {_addr} . inet_proto; {_expiring} 1m;"),
    }
_GUARD_CHAINS: Chains = {
    "arrive": (
        "type filter hook prerouting priority -301; policy accept;",
        (
            f'iifname "{TUNNEL_PREFIX}*" iifname . ether daddr @ours meta pkttype set host',
            *_both("IP daddr @near_endsSIX ether daddr set iifname map @detours meta pkttype set host"),
        ),
    ),
    "guard": (
        "type filter hook prerouting priority -300; policy accept;",
        (
            f'iifname != "{PAIR_PREFIX}*" accept',
            "iifname . ether saddr . ip saddr @senders accept",  # nearly all
            "iifname @unguarded accept",
            "icmpv6 type nd-router-advert drop",
            "iifname . ether saddr . arp saddr ip @senders accept",
            "iifname . ether saddr . ip6 saddr @senders6 accept",
            # Who has no address yet speaks as itself, too: of whatever passes the bridge learns where a MAC is.
            "iifname . ether saddr @macs ether type ip ip saddr 0.0.0.0 udp dport 67 accept",
            "iifname . ether saddr @macs arp saddr ip 0.0.0.0 accept",
            "iifname . ether saddr @macs ip6 saddr :: accept",
            "drop",
        ),
    ),
    "remember": ("", _flows("s d")),
    "refresh": ("", _flows("d s")),
    "policies": (
        "type filter hook forward priority -200; policy accept;",
        (
            "ether type arp accept",
            f"icmpv6 type {{ {_LINK_CONTROL} }} accept",
            "ip protocol igmp accept",
            "iifname vmap @members",
            "oifname vmap @members",
        ),
    ),
}
TABLES: dict[str, tuple[Sets, Chains]] = {
    ROUTED: (_SETS, _CHAINS),
    BRIDGED: (GUARD_SETS | EXPIRING, _GUARD_CHAINS),
}
