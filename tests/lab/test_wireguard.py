"""`-o encrypted`: WireGuard between two nodes of a cluster, each a host namespace of this machine."""

from __future__ import annotations

import ast
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from cluster.lab import (
    Etcd3,
    Underlay,
    connect,
    joined,
    known,
    make_certificates,
    pair_of_ipv6,
    pings,
    restart,
    start_etcd,
    start_node,
    stop_nodes,
)
from conftest import Node, new_place, wait_until

CAPTURE = """
import select, socket, sys
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
wire.bind((sys.argv[1], 0))
print("ready", flush=True)
seen = {"plain": 0}
while sys.stdin not in select.select([wire, sys.stdin], [], [])[0]:
    packet = wire.recv(65536)
    # Where the header of UDP begins, by the family, and where the number of its protocol is.
    udp, protocol = {b"\\x08\\x00": (34, 23), b"\\x86\\xdd": (54, 20)}.get(packet[12:14], (0, 0))
    if udp and packet[protocol] == 17:
        port = int.from_bytes(packet[udp + 2 : udp + 4], "big")
        seen[port] = seen.get(port, 0) + 1
    seen["plain"] += b"plaintext" in packet
print(seen)
"""
KEY = """
from pyroute2 import WireGuard
print(WireGuard().info("nswg")[0].get_attr("WGDEVICE_A_PUBLIC_KEY"))
"""
WIREGUARD, VXLAN = 51820, 4789


@pytest.fixture
def etcd() -> Iterator[Etcd3]:
    """An etcd of three, whose nodes use a key for four seconds."""
    with new_place() as place:
        certificates = place / "certificates"
        certificates.mkdir()
        underlay = Underlay(place)
        etcd = start_etcd(underlay, make_certificates(certificates))
        etcd.more = 'key-rotation = "4s"\n'
        yield etcd
        etcd.close()
        underlay.close()


@contextmanager
def captured(etcd: Etcd3) -> Iterator[dict[object, int]]:
    """Count what passes between the second node and the wire: packets by UDP port, and those with the word `plaintext`."""
    command = etcd.underlay.host.command(sys.executable, "-c", CAPTURE, "m2")
    found: dict[object, int] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield found
        found.update(ast.literal_eval(process.communicate("end\n")[0]))


def public_key(node: Node) -> str:
    return node.host.run(sys.executable, "-c", KEY).stdout


@contextmanager
def pair(etcd: Etcd3, version: int) -> Iterator[list[Node]]:
    """Two nodes that tell others their IPv4, or IPv6, addresses."""
    if version == 4:
        nodes = [start_node(etcd, number) for number in (2, 3)]
        joined(nodes)
        yield nodes
        stop_nodes(nodes)
        return
    first = start_node(etcd, 1)
    with pair_of_ipv6(etcd, [first], (2, 3)) as nodes:
        yield nodes
    stop_nodes([first])


@pytest.mark.parametrize("version", [4, 6])
def test_nothing_is_read_on_the_wire_and_keys_change_without_loss(etcd: Etcd3, version: int) -> None:
    with pair(etcd, version) as (one, two):
        _sealed(etcd, one, two, {4: 1500 - 60 - 50, 6: 1500 - 80 - 70 - 12}[version])


def _sealed(etcd: Etcd3, one: Node, two: Node, largest: int) -> None:
    """`largest` is the MTU that is left to the containers: a packet is filled up to a multiple of 16 bytes."""
    nodes, addresses = [one, two], {}
    for name, flag in (("sealed", "true"), ("open", "false")):
        one.cli("network", "create", "-d", "overlay", "-o", f"encrypted={flag}", name)
        known(nodes, name)
        connect(one, f"a-{name}", name)
        addresses[name] = connect(two, f"b-{name}", name)
        wait_until(lambda of=name: pings(one, f"a-{of}", addresses[of]), what=f"network {name}", seconds=30)

    filled = ("-p", b"plaintext".hex(), "-c", "100", "-i", "0.2", "-q")
    with captured(etcd) as seen:
        before = public_key(one), public_key(two)
        ping = one.host.run("ip", "netns", "exec", "a-sealed", "ping", *filled, addresses["sealed"], timeout=60)
        after = public_key(one), public_key(two)
    assert " 0% packet loss" in ping.stdout
    assert before[0] != after[0], "keys changed meanwhile"
    assert before[1] != after[1]
    assert seen[WIREGUARD] >= 200
    assert seen["plain"] == seen.get(VXLAN, 0) == seen.get(VXLAN + 1, 0) == 0
    with captured(etcd) as seen:
        assert pings(one, "a-open", addresses["open"], "-p", b"plaintext".hex())
    assert seen["plain"] >= 2, "encrypted=false means not"

    # The largest packet fits whole; a node that is restarted, and one whose interface is lost, are back by themselves.
    mtu = int(one.host.sh("ip -n a-sealed -o link show eth0 | grep -o 'mtu [0-9]*' | cut -d' ' -f2"))
    assert mtu == largest
    assert pings(one, "a-sealed", addresses["sealed"], "-M", "do", "-s", str(mtu - 28))
    one.kill()
    restart(one)
    assert pings(one, "a-sealed", addresses["sealed"])
    one.host.sh("ip link del nswg")
    wait_until(lambda: pings(one, "a-sealed", addresses["sealed"]), what="the repair", seconds=30)
    key = one.place / "state" / "wireguard.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_text().strip() not in etcd.ctl("get", "--prefix", "/")


def test_killed_in_the_middle_of_a_rotation(etcd: Etcd3) -> None:
    """kill -9 when the new key is on the disk, and nobody, or somebody, was told: the next start is heard by its key."""
    nodes = one, two = [start_node(etcd, number) for number in (1, 2)]
    joined(nodes)
    one.cli("network", "create", "-d", "overlay", "-o", "encrypted=true", "sealed")
    known(nodes, "sealed")
    first, second = connect(one, "a", "sealed"), connect(two, "b", "sealed")
    wait_until(lambda: pings(one, "a", second), what="the network", seconds=30)
    file = one.place / "state" / "wireguard.key"
    for cut in (True, False):
        before = file.read_text()
        if cut:  # what it says is not heard: the kernel has a key of which nobody knows
            etcd.underlay.cut_between([1], [21, 22, 23])
        wait_until(lambda before=before: file.read_text() != before, seconds=15, what="a rotation")
        one.kill()
        assert file.read_text() != before
        etcd.underlay.heal()
        restart(one)
        wait_until(lambda: pings(one, "a", second) and pings(two, "b", first), what="both ways", seconds=30)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    stop_nodes(list(nodes))
