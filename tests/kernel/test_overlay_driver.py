"""The overlay's data plane between two hosts: what passes, what does not, and what is never on the wire."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Host, wait_until

from netstore.kernel.wireguard import new_key

WORKER = Path(__file__).with_name("overlay_worker.py")
_NODES = {
    "a": {"vtep": "203.0.113.1", "peer": "203.0.113.2", "host": "10.77.255.1", "host6": "fd00:77::ff01",
          "host_mac": "02:77:00:00:ff:01", "id": "a", "mac": "02:77:00:00:00:0a", "address": "10.77.0.10",
          "address6": "fd00:77::10", "netns": "ca"},
    "b": {"vtep": "203.0.113.2", "peer": "203.0.113.1", "host": "10.77.255.2", "host6": "fd00:77::ff02",
          "host_mac": "02:77:00:00:ff:02", "id": "b", "mac": "02:77:00:00:00:0b", "address": "10.77.0.11",
          "address6": "fd00:77::11", "netns": "cb"},
}  # fmt: skip


def node(host: Host, name: str, **more: str) -> Any:
    other = _NODES["b" if name == "a" else "a"]
    remotes = [(other["id"], other["mac"], [other["address"], other["address6"]]),
               ("host", other["host_mac"], [other["host"], other["host6"]])]  # fmt: skip
    wanted = json.dumps({**_NODES[name], "remotes": json.dumps(remotes), **more})
    inside = () if name == "a" else ("ip", "netns", "exec", "neighbour")
    done = host.run(*inside, sys.executable, str(WORKER), wanted)
    return json.loads(done.stdout) if done.stdout else None


def pings(host: Host, netns: str, *args: str) -> bool:
    where = ("ip", "netns", "exec", netns) if netns else ()
    return not host.run(*where, "ping", "-c1", "-W1", *args, check=False).returncode


def test_between_two_hosts(host: Host) -> None:
    for name in ("ca", "cb"):
        host.netns(name)
    seen = node(host, "a")
    node(host, "b")
    assert seen["mtu"] == 1450
    assert seen["elements"] == []
    assert seen["neighbours"] == ["10.77.0.10", "fd00:77::10"]
    assert ["10.77.0.11", "02:77:00:00:00:0b", "203.0.113.2"] in seen["remotes"]
    assert ["10.77.255.2", "02:77:00:00:ff:02", "203.0.113.2"] in seen["remotes"]
    assert len(seen["endpoints"]) == 1

    # Count every encapsulated packet that leaves, by what is inside: nothing may be broadcast.
    host.sh("nft 'add table netdev w; add chain netdev w c { type filter hook egress device uplink priority 0; };"
            " add rule netdev w c udp dport 4789 @th,128,48 0xffffffffffff counter'")  # fmt: skip
    assert pings(host, "ca", "10.77.0.11")
    assert pings(host, "ca", "fd00:77::11")
    assert pings(host, "ca", "-M", "do", "-s", "1422", "10.77.0.11")
    assert not pings(host, "ca", "-M", "do", "-s", "1423", "10.77.0.11")
    assert pings(host, "ca", "10.77.0.1")  # the gateway, on its own node
    assert not pings(host, "ca", "10.77.0.99")  # nobody knows it
    assert "packets 0 " in host.sh("nft list table netdev w")

    # From the nodes themselves to containers of the other one, and back.
    assert pings(host, "", "10.77.0.11")
    assert pings(host, "neighbour", "10.77.0.10")
    assert pings(host, "", "fd00:77::11")
    assert pings(host, "cb", "10.77.255.1")

    # Out of the cluster, behind the node's address.
    assert pings(host, "ca", "203.0.113.2")

    node(host, "a", remove="yes")
    left = host.sh("ip -o link; nft list tables")
    assert "nsvx" not in left
    assert "nsbr" not in left


def test_only_peers_are_heard(host: Host) -> None:
    for name in ("ca", "cb"):
        host.netns(name)
    node(host, "a")
    node(host, "b", peer="203.0.113.77")  # which knows node a for somebody else
    assert not pings(host, "ca", "10.77.0.11")
    host.sh("ip netns exec neighbour nft add element inet netstore vteps '{ 203.0.113.1 }'")
    host.sh("ip -n neighbour link; ip netns exec neighbour bridge fdb replace 02:77:00:00:00:0a dev $(ip -n neighbour"
            " -o link | grep -o 'nsvx-[0-9a-f]*') dst 203.0.113.1 self static")  # fmt: skip
    assert pings(host, "ca", "10.77.0.11")

    # A container that speaks VXLAN to the other node would come from its own node's address: it is not let out.
    host.sh("nft 'add table inet w; add chain inet w c { type filter hook postrouting priority 300; };"
            " add rule inet w c udp dport 4789 ip daddr 203.0.113.2 @th,64,32 0xdeadbeef counter'")  # fmt: skip
    send = (
        "import socket; s = socket.socket(2, 2); s.sendto(bytes.fromhex('deadbeef') + bytes(60), ('203.0.113.2', 4789))"
    )
    host.run("ip", "netns", "exec", "ca", sys.executable, "-c", send)
    assert "packets 0 " in host.sh("nft list table inet w")
    host.sh("nft delete element inet netstore tunnels '{ 4789 }'")
    host.run("ip", "netns", "exec", "ca", sys.executable, "-c", send)
    assert "packets 1 " in host.sh("nft list table inet w")  # so it was ours that stopped it


def test_plain_routes_over_ipv6(host: Host) -> None:
    """Routes of both families lead by the other node's IPv6 address."""
    for name in ("ca", "cb"):
        host.netns(name)
    host.sh("ip addr add fd00:203::1/64 dev uplink nodad; ip -n neighbour addr add fd00:203::2/64 dev eth0 nodad")
    links = {
        name: {"mac": re.findall("link/ether ([0-9a-f:]+)", host.sh(shown))[0], "subnet": "fd00:203::/64"}
        for name, shown in (("a", "ip link show uplink"), ("b", "ip -n neighbour link show eth0"))
    }
    vteps, given = {"a": "fd00:203::1", "b": "fd00:203::2"}, dict[str, dict[str, str]]()
    for name, other in (("a", "b"), ("b", "a")):
        told = {"vtep": vteps[name], "peer": vteps[other], "peer_link": json.dumps(links[other]), "direct": "true"}
        seen = node(host, name, **told)
        assert seen["elements"] == []
        assert [entry[2] for entry in seen["remotes"]] == [vteps[other]] * 4
        given[name] = told
    host.sh("nft 'add table netdev w; add chain netdev w c { type filter hook egress device uplink priority 0; };"
            " add rule netdev w c udp dport 4789 counter'")  # fmt: skip
    assert "via inet6 fd00:203::2" in host.sh("ip route show proto 110")
    wait_until(lambda: pings(host, "ca", "10.77.0.11"), what="link-local addresses that are no longer tentative")
    for target in ("10.77.0.11", "fd00:77::11"):
        assert pings(host, "ca", target)
        assert pings(host, "", target)
    assert pings(host, "ca", "10.77.255.2"), "the other node itself"
    assert "packets 0 " in host.sh("nft list table netdev w")
    for name in ("a", "b"):
        node(host, name, remove="yes", **given[name])
    assert host.sh("ip route show proto 110; ip -6 route show proto 110") == ""


def test_encrypted_over_ipv6(host: Host) -> None:
    """Tunnels go through WireGuard to the other node's IPv6 address, and nothing beside it."""
    vteps = {"a": "fd00:203::1", "b": "fd00:203::2"}
    host.sh("ip addr add fd00:203::1/64 dev uplink nodad; ip -n neighbour addr add fd00:203::2/64 dev eth0 nodad")
    told = {
        name: {"vtep": vteps[name], "peer": vteps[other], "key": new_key()} for name, other in (("a", "b"), ("b", "a"))
    }
    keys = {name: node(host, name, **told[name]) for name in ("a", "b")}
    if not keys["a"]:
        pytest.skip("this kernel has no WireGuard: proven in the lab (scripts/lab)")
    for name, other in (("a", "b"), ("b", "a")):
        host.netns(f"c{name}")
        told[name] |= {"peer_key": keys[other], "encrypted": "true"}
        seen = node(host, name, **told[name])
        assert seen["elements"] == []
        assert seen["mtu"] == 1338
    host.sh("nft 'add table netdev w; add chain netdev w c { type filter hook egress device uplink priority 0; };"
            " add rule netdev w c udp dport { 4789, 4790 } counter; add rule netdev w c udp dport 51820 counter'")  # fmt: skip
    for target in ("10.77.0.11", "fd00:77::11"):
        assert pings(host, "ca", "-c3", target)
    assert pings(host, "ca", "-M", "do", "-s", "1310", "10.77.0.11")
    assert not pings(host, "ca", "-M", "do", "-s", "1311", "10.77.0.11")
    assert pings(host, "", "fd00:203::2"), "the way between the nodes themselves stays"
    plain, sealed = re.findall(r"packets (\d+)", host.sh("nft list table netdev w"))
    assert (int(plain), int(sealed) >= 7) == (0, True)
    for name in ("a", "b"):
        node(host, name, remove="yes", **told[name])
