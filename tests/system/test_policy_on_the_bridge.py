"""Between the ports of one bridge: strict isolation, no traffic between containers, nobody who pretends to be another."""

from __future__ import annotations

import json
import subprocess

import pytest
from policy_lab import Lab, app, lab

__all__ = ["lab"]  # a fixture


def test_isolate_strict(lab: Lab) -> None:
    """Nothing to or from other networks of the node, by published ports neither; the rest of the world stays."""
    node = lab.node
    node.host.sh(
        "ip -6 addr add 2001:db8::1/64 dev uplink nodad; ip -n neighbour -6 addr add 2001:db8::2/64 dev eth0 nodad"
    )
    node.cli("network", "create", "--ipv6", "-o", "isolate=strict", "alone")
    node.cli("network", "create", "--ipv6", "-o", "com.docker.network.bridge.gateway_mode_ipv4=nat-unprotected",
             "-o", "com.docker.network.bridge.gateway_mode_ipv6=nat-unprotected", "open")  # fmt: skip
    lab.attach("a", "alone", publish="8001:80")
    lab.attach("peer", "alone")
    lab.attach("b", "open", publish="8002:80")
    for name in ("a", "b"):
        lab.serve(name, 80)
    lab.serve("neighbour", 7000)

    def reached(family: str) -> list[bool]:
        host, machine = {"4": ("203.0.113.1", "203.0.113.2"), "6": ("2001:db8::1", "2001:db8::2")}[family]
        return [
            lab.tcp("a", lab.address("b", family), 80),
            lab.tcp("b", lab.address("a", family), 80),
            lab.tcp("a", host, 8002),
            lab.tcp("b", host, 8001),
            lab.tcp("peer", lab.address("a", family), 80),
            lab.tcp("peer", host, 8001),
            lab.tcp("neighbour", host, 8001),
            lab.tcp("a", machine, 7000),
        ]

    others, rest = [False] * 4, [True] * 4
    for family in ("4", "6"):
        assert reached(family) == others + rest
    assert lab.tcp("", "127.0.0.1", 8001)
    node.cli("network", "update", "-o", "isolate=false", "alone")
    for family in ("4", "6"):
        assert reached(family) == [True, False, True, True, *rest]
    node.cli("network", "update", "-o", "isolate=strict", "alone")
    assert reached("4") == others + rest
    assert "isolate" in node.cli("network", "create", "-o", "isolate=maybe", "x", check=False).stderr


@pytest.mark.parametrize("family", ["4", "6"])
def test_enable_icc_false_holds_on_the_bridge(lab: Lab, family: str) -> None:
    """Endpoints do not reach each other at their addresses, of either family, link-local neither, live."""
    node, icc = lab.node, "com.docker.network.bridge.enable_icc"
    # With br_netfilter what is published is not reached from isolated ports of the same bridge: see driver-bridge.md.
    node.host.sh(
        "echo 0 | tee /proc/sys/net/bridge/bridge-nf-call-iptables /proc/sys/net/bridge/bridge-nf-call-ip6tables"
    )
    node.cli("network", "create", "--ipv6", "-o", f"{icc}=false", "app")
    lab.attach("a", "app", publish="8001:80")
    lab.attach("b", "app")
    lab.serve("a", 80)
    target = lab.address("a", family)
    local = lab.run("a", "sh", "-c", "ip -6 -o addr show scope link | awk '{print $4}' | cut -d/ -f1")
    assert local.startswith("fe80::")
    for allowed in (False, True, False):
        node.cli("network", "update", "-o", f"{icc}={str(allowed).lower()}", "app")
        lab.run("b", "ip", "neigh", "flush", "all")  # that nobody answered is remembered
        assert lab.tcp("b", target, 80) is allowed
        assert lab.ping("b", target) is allowed
        assert lab.ping("b", f"{local}%eth0") is allowed
        assert lab.tcp("b", "203.0.113.1", 8001)  # what is published is for everybody
        assert lab.tcp("", target, 80)
    flags = json.loads(node.host.sh("ip -d -j link show type veth"))
    ports = [each["linkinfo"]["info_slave_data"]["isolated"] for each in flags if each["ifname"].startswith("nsv-")]
    assert ports == [True, True]


# Sends frames that lie about who sends them, then one that does not; all but ARP carry what they are.
LIES = """
import socket, struct, sys
from ipaddress import ip_address as ip
mine, victims, target = (dict(zip(("mac", "4", "6", "l"), part.split(","))) for part in sys.argv[1:4])
mac = lambda text: bytes.fromhex(text.replace(":", ""))
def udp4(source, target, text):
    body = struct.pack("!HHHH", 1, 6000, 8 + len(text), 0) + text
    header = [0x45, 0, 20 + len(body), 0, 0, 64, 17, 0, ip(source).packed, ip(target).packed]
    total = sum(struct.unpack("!10H", struct.pack("!BBHHHBBH4s4s", *header)))
    header[7] = ~(total + (total >> 16)) & 0xffff
    return struct.pack("!BBHHHBBH4s4s", *header) + body
def six(source, target, number, body):
    return struct.pack("!IHBB16s16s", 6 << 28, len(body), number, 255, ip(source).packed, ip(target).packed) + body
def udp6(source, target, text):
    return six(source, target, 17, struct.pack("!HHHH", 1, 6000, 8 + len(text), 0) + text)
def arp(sender_mac, sender, text):
    return struct.pack("!HHBBH6s4s6s4s", 1, 0x800, 6, 4, 2, sender_mac, ip(sender).packed, mac(target["mac"]), ip(target["4"]).packed) + text
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
raw.bind(("eth0", 0))
def send(source, kind, packet):
    raw.send(mac(target["mac"]) + mac(source) + struct.pack("!H", kind) + packet)
send(victims["mac"], 0x800, udp4(mine["4"], target["4"], b"LIE mac"))
send(mine["mac"], 0x800, udp4(victims["4"], target["4"], b"LIE address"))
send(victims["mac"], 0x800, udp4(victims["4"], target["4"], b"LIE both"))
send(mine["mac"], 0x800, udp4("0.0.0.0", target["4"], b"LIE nobody"))
send(victims["mac"], 0x86dd, udp6(mine["6"], target["6"], b"LIE mac 6"))
send(mine["mac"], 0x86dd, udp6(victims["6"], target["6"], b"LIE address 6"))
send(mine["mac"], 0x86dd, udp6(victims["l"], target["l"], b"LIE link-local"))
send(victims["mac"], 0x86dd, udp6(victims["6"], target["6"], b"LIE both 6"))
send(mine["mac"], 0x806, arp(mac(mine["mac"]), victims["4"], b"LIE arp"))
send(mine["mac"], 0x86dd, six(mine["l"], "ff02::1", 58, struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0) + b"LIE router"))
send(mine["mac"], 0x9999, b"LIE no protocol of ours")
send(mine["mac"], 0x8100, b"\\0\\1" + struct.pack("!H", 0x800) + udp4(victims["4"], target["4"], b"LIE tagged"))
send(mine["mac"], 0x800, udp4(mine["4"], target["4"], b"TRUE"))
send(mine["mac"], 0x86dd, udp6(mine["6"], target["6"], b"TRUE 6"))
"""
HEARD = """
import socket
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
raw.bind(("eth0", 3))
raw.settimeout(10)
print("ready", flush=True)
heard, answer = b"", False
while b"TRUE 6" not in heard or answer:
    heard, (_, _, kind, *_) = raw.recvfrom(4096)
    # To the truth: an echo, or that nobody listens, perhaps of the round before.
    answer = kind == socket.PACKET_OUTGOING or b"TRUE" in heard and (heard[23] == 1 or heard[20] == 58)
    for word in (b"LIE", b"TRUE"):
        if word in heard and not answer:
            print(heard[heard.index(word):].decode(), flush=True)
"""


def test_nobody_pretends_to_be_another(lab: Lab) -> None:
    """MAC and source address of every endpoint are its own, on networks with policies and without."""
    app(lab)
    names = ("web", "db", "other")
    who = {}
    for name in names:
        found = json.loads(lab.run(name, "ip", "-j", "addr", "show", "eth0"))[0]
        addresses = {each["scope"][0] + each["family"][4:]: each["local"] for each in found["addr_info"]}
        who[name] = ",".join([found["address"], addresses["g"], addresses["g6"], addresses["l6"]])
    for policed in (False, True):
        if policed:
            lab.node.cli("policy", "create", "web", "--network", "app", "--from", "label=tier=web")
        for liar, victim, target in (names, names[1:] + names[:1], names[2:] + names[:2]):
            command = lab.node.host.command("ip", "netns", "exec", target, "python3", "-c", HEARD)
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listener:
                assert listener.stdout
                assert listener.stdout.readline() == "ready\n"
                lab.node.host.run(
                    "ip", "netns", "exec", liar, "python3", "-c", LIES, who[liar], who[victim], who[target]
                )
                assert listener.communicate(timeout=20)[0].split("\n") == ["TRUE", "TRUE 6", ""]
