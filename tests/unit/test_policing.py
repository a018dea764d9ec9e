"""Policies as rules, and packets from the kernel's log; without a kernel."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from netstore.kernel import nflog
from netstore.kernel.attributes import attribute, message
from netstore.kernel.policing import BRIDGED, ROUTED, Policing
from netstore.model import (
    Address,
    Endpoint,
    EndpointSpec,
    Network,
    NetworkSpec,
    Policy,
    PolicyAction,
    PolicyPort,
    PolicySpec,
    Selector,
)

NETWORK = Network(id="a" * 64, name="n", spec=NetworkSpec(), interface="nsbr-a")
ENDPOINT = Endpoint(
    id="e" * 64, network_id=NETWORK.id, sandbox_id="s", spec=EndpointSpec(), labels={"tier": "web"},
    addresses=(Address(address="10.0.0.2", prefix=24), Address(address="fd00::2", prefix=64)),
)  # fmt: skip


def policed(*specs: PolicySpec, logs: bool = True) -> Policing:
    policing = Policing()
    policing.logs = logs
    policing.put(NETWORK, [Policy(id=f"{n}" * 64, name=f"p{n}", spec=spec) for n, spec in enumerate(specs)])
    return policing


def test_nothing_is_policed_without_a_policy_or_a_denying_default() -> None:
    policing = policed()
    assert policing.network_elements(NETWORK) == policing.endpoint_elements(NETWORK, ENDPOINT) == []
    assert policing.skeleton()[ROUTED].chains == policing.skeleton()[BRIDGED].chains == {}


def test_an_endpoint_is_an_element_of_what_selects_it() -> None:
    web, db = Selector(labels=("tier=web",)), Selector(labels=("tier=db",))
    policing = policed(PolicySpec(network_id=NETWORK.id, sources=(web,), destinations=(db,)))
    assert policing.endpoint_elements(NETWORK, ENDPOINT) == [
        ("members", f"nsv-{'e' * 11} : jump n_{'a' * 16}"),
        (f"ends_{'0' * 16}_from", f"nsv-{'e' * 11}"),
        (f"addrs_{'0' * 16}_from", "10.0.0.2"),
        (f"addrs_{'0' * 16}_from6", "fd00::2"),
    ]


def test_families_and_ports_are_combined() -> None:
    cidrs = tuple(Selector(cidr=each) for each in ("10.0.0.0/9", "10.128.0.0/9", "fd00::/8"))
    ports = (PolicyPort(protocol="icmp"), PolicyPort(protocol="tcp", first=80, last=90), PolicyPort(protocol="udp"))
    spec = PolicySpec(network_id=NETWORK.id, sources=cidrs, ports=ports, action=PolicyAction.DENY)
    rules = policed(spec).skeleton()[ROUTED].chains[f"n_{'a' * 16}_reply"]
    drop = f"goto d_{'0' * 16}"
    assert rules == (
        f"ip daddr {{ 10.0.0.0/8 }} meta l4proto . th sport {{ tcp . 80-90, udp . 0-65535 }} {drop}",
        f"ip daddr {{ 10.0.0.0/8 }} meta l4proto {{ icmp, ipv6-icmp }} {drop}",
        f"ip6 daddr {{ fd00::/8 }} meta l4proto . th sport {{ tcp . 80-90, udp . 0-65535 }} {drop}",
        f"ip6 daddr {{ fd00::/8 }} meta l4proto {{ icmp, ipv6-icmp }} {drop}",
    )


def test_rules_do_not_log_where_the_kernel_cannot() -> None:
    spec = PolicySpec(network_id=NETWORK.id, action=PolicyAction.DENY)
    for logs in (True, False):
        skeleton = policed(spec, logs=logs).skeleton()
        text = str([skeleton[ROUTED].chains, skeleton[BRIDGED].chains])
        assert ("log prefix" in text) is logs


def logged(payload: bytes) -> bytes:
    body = attribute(nflog.NFULA_PREFIX, b"netstore-x\0") + attribute(nflog.NFULA_PAYLOAD, payload)
    return message(nflog.NFNL_SUBSYS_ULOG << 8 | nflog.NFULNL_MSG_PACKET, 0, body, family=7)


def test_packets_of_the_log_are_read() -> None:
    four = bytes([0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]) + struct.pack("!HH", 1234, 80)
    (packet,) = nflog.parse(logged(four))
    assert (packet.prefix, packet.source, packet.destination) == ("netstore-x", "10.0.0.1", "10.0.0.2")
    assert (packet.protocol, packet.source_port, packet.destination_port) == ("tcp", 1234, 80)
    six = bytes([0x60, 0, 0, 0, 0, 24, 0, 64]) + bytes(15) + b"\1" + bytes(15) + b"\2"
    extended = six + bytes([17, 0, 0, 0, 0, 0, 0, 0]) + struct.pack("!HH", 53, 5353)  # hop-by-hop options first
    (packet,) = nflog.parse(logged(extended))
    assert (packet.source, packet.destination, packet.protocol) == ("::1", "::2", "udp")
    assert (packet.source_port, packet.destination_port) == (53, 5353)


@given(st.binary(max_size=200))
def test_hostile_packets_are_read_or_left(payload: bytes) -> None:
    nflog.parse(logged(payload))
    nflog.parse(payload)


@given(st.sampled_from([0x45, 0x4F, 0x60, 0x6F]), st.binary(min_size=19, max_size=128))
def test_hostile_headers_are_read_or_left(first: int, rest: bytes) -> None:
    for packet in nflog.parse(logged(bytes([first]) + rest)):
        assert 0 <= packet.destination_port <= 65535
