"""Everything of a network that may change while it is used, read back from the kernel; and what may not."""

from __future__ import annotations

import json

import grpc
import pytest
from conftest import Node
from google.protobuf.field_mask_pb2 import FieldMask

from netstore.api.v1 import network_pb2
from netstore.client import BlockingClient as Client

BRIDGE = "com.docker.network.bridge."
BANDWIDTH = "netstore.endpoint.bandwidth"


def inside(node: Node, command: str, netns: str = "a") -> list[dict]:
    return json.loads(node.host.sh(f"{command.replace('ip ', f'ip -n {netns} ').replace('tc ', f'tc -n {netns} ')}"))


def elements(node: Node, name: str) -> str:
    return json.dumps(json.loads(node.host.sh(f"nft -j list set inet netstore {name}"))["nftables"][1])


def rates(node: Node, host_end: str) -> tuple[int, int]:
    """Return what the endpoint of namespace a may receive and send, bytes a second."""

    def rate(found: list[dict]) -> int:
        return found[0].get("options", {}).get("rate", 0)

    return rate(json.loads(node.host.sh(f"tc -j qdisc show dev {host_end}"))), rate(
        inside(node, "tc -j qdisc show dev eth0")
    )


def test_all_that_is_live(node: Node) -> None:
    node.cli("network", "create", "--subnet", "10.8.0.0/24", "app")
    for name in ("a", "b"):
        node.host.netns(name)
    node.cli("network", "connect", "--netns", "/run/netns/a", "--name", "a", "app")
    own = ("--bandwidth-in", "80mbit")
    node.cli("network", "connect", "--netns", "/run/netns/b", "--name", "b", *own, "app")
    ends = {
        each["name"]: each["status"]["host_interface_name"]
        for each in json.loads(node.out("endpoint", "ls", "--format", "json"))
    }
    bridge = json.loads(node.out("network", "inspect", "app"))[0]["status"]["interface"]
    # Routes come and go in every sandbox; others' routes stay.
    node.host.sh("ip -n a route add 192.0.2.0/24 via 10.8.0.7")
    add = ("--route-add", "198.51.100.0/24,10.8.0.9", "--route-add", "198.18.0.0/15,10.8.0.9")
    node.cli("network", "update", *add, "app")
    node.cli("network", "update", "--route-rm", "198.18.0.0/15", "app")
    for name in ("a", "b"):
        found = {each["dst"]: each.get("gateway") for each in inside(node, "ip -j route", name)}
        assert found["198.51.100.0/24"] == "10.8.0.9"
        assert "198.18.0.0/15" not in found
        assert name == "b" or found["192.0.2.0/24"] == "10.8.0.7"
    # The network's bandwidth is for those that have none of their own.
    node.cli("network", "update", "-o", f"{BANDWIDTH}_in=40mbit", "-o", f"{BANDWIDTH}_out=16mbit", "app")
    assert rates(node, ends["a"]) == (5_000_000, 2_000_000)
    assert json.loads(node.host.sh(f"tc -j qdisc show dev {ends['b']}"))[0]["options"]["rate"] == 10_000_000
    node.cli("network", "update", "-o", f"{BANDWIDTH}_in=0", "-o", f"{BANDWIDTH}_out=0", "app")
    assert rates(node, ends["a"]) == (0, 0)
    # MTU on both ends and the bridge; talk among endpoints; source NAT; a further subnet; labels; name servers.
    assert bridge in elements(node, "masqueraded")
    node.cli("network", "update", "-o", "com.docker.network.driver.mtu=1400", "-o", f"{BRIDGE}enable_icc=false", "-o",
             f"{BRIDGE}enable_ip_masquerade=false", "--subnet-add", "10.8.1.0/24", "--label-add", "tier=web",
             "--label-add", "x=y", "--dns-add", "203.0.113.2", "app")  # fmt: skip
    links = [inside(node, "ip -j link show eth0")[0]]
    links += [json.loads(node.host.sh(f"ip -j -d link show {name}"))[0] for name in (bridge, *ends.values())]
    assert {link["mtu"] for link in links} == {1400}
    assert all(link["linkinfo"]["info_slave_data"]["isolated"] for link in links[2:])
    assert bridge not in elements(node, "same")
    assert bridge not in elements(node, "masqueraded")
    held = [each["local"] for each in json.loads(node.host.sh(f"ip -j -4 addr show {bridge}"))[0]["addr_info"]]
    assert held == ["10.8.0.1", "10.8.1.1"]
    node.cli("network", "update", "--label-rm", "x", "--dns-drop", "203.0.113.2", "--dns-add", "203.0.113.9", "app")
    network = json.loads(node.out("network", "inspect", "app"))[0]
    assert network["labels"] == {"tier": "web"}
    assert network["spec"]["dns_servers"] == ["203.0.113.9"]
    assert node.out("system", "check") == "kernel and store agree"
    # It is the store's: a daemon that starts anew finds nothing to repair.
    node.kill()
    node.start()
    assert node.out("system", "check") == "kernel and store agree"


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("name", {}), ("spec.driver", {}), ("spec.internal", {}), ("spec.enable_ipv4", {}), ("spec.enable_ipv6", {}),
        ("spec.ipam_driver", {}),
        ("spec.options", {"options": {f"{BRIDGE}name": "other"}}),
        ("spec.options", {"options": {f"{BRIDGE}inhibit_ipv4": "true"}}),
        ("spec.options", {"options": {"com.docker.network.container_iface_prefix": "net"}}),
        ("spec.ipam", {"ipam": [{"subnet": "10.9.0.0/24"}]}),
        ("spec.ipam", {"ipam": [{"subnet": "10.8.0.0/24", "gateway": "10.8.0.7"}]}),
    ],
)  # fmt: skip
def test_what_cannot_change_says_so(node: Node, client: Client, path: str, spec: dict) -> None:
    node.cli("network", "create", "--subnet", "10.8.0.0/24", "app")
    before = node.out("network", "inspect", "app")
    request = network_pb2.UpdateNetworkRequest(
        network={"name": "app", "spec": spec}, update_mask=FieldMask(paths=[path])
    )
    with pytest.raises(grpc.RpcError) as caught:
        client.networks.UpdateNetwork(request)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert f"{path}" in caught.value.details()
    for key in spec.get("options", {}):
        assert key in caught.value.details()
    assert node.out("network", "inspect", "app") == before


def test_a_refused_update_changes_nothing(node: Node) -> None:
    node.cli("network", "create", "--subnet", "10.8.0.0/24", "app")
    node.host.netns("a")
    node.cli("network", "connect", "--netns", "/run/netns/a", "app")

    def state() -> tuple[str, str]:
        """What is asked of the kernel: its own states of links (carrier, link-local addresses) come and go."""
        links = "ip -o link | sed 's/<.*>//; s/state .*//'; ip -o addr show scope global"
        return node.out("network", "inspect", "app"), node.host.sh(f"ip -n a route; {links}; nft list ruleset")

    before = state()
    for flags, named in (
        (("--route-add", "198.51.100.0/24,10.9.0.1"), "spec.routes[0].gateway"),
        (("--route-add", "198.51.100.0/24,10.8.0.9", "--route-add", "198.51.100.0/24,10.8.0.8"), "spec.routes[1]"),
        (("--subnet-add", "10.8.0.128/25", "--route-add", "198.51.100.0/24,10.8.0.9"), "overlaps"),
        (("-o", f"{BANDWIDTH}_in=fast", "--label-add", "a=b"), f"{BANDWIDTH}_in"),
        (("--route-add", "203.0.113.0/24,10.8.0.9", "-o", "com.docker.network.driver.mtu=70000"), "driver.mtu"),
    ):
        refused = node.cli("network", "update", *flags, "app", check=False)
        assert (refused.returncode, named in refused.stderr) == (1, True), refused.stderr
        assert state() == before
