"""Run inside a host's namespace: makes one node's side of an overlay network, as the control plane would; prints what it sees."""

from __future__ import annotations

import json
import os
import sys

from netstore.drivers.base import Host
from netstore.drivers.overlay import OverlayDriver
from netstore.kernel.firewall import Firewall
from netstore.kernel.links import Deletions
from netstore.model import Address, Endpoint, EndpointSpec, Network, NetworkSpec, Node, NodeLink, Pool, RemoteEndpoint

NETWORK = "5e" * 32


def main(wanted: dict[str, str]) -> None:
    firewall = Firewall()
    firewall.ensure()
    driver = OverlayDriver(Host(firewall, Deletions(), vtep=wanted["vtep"]))
    link = NodeLink(**json.loads(wanted.get("peer_link", "{}")))
    peer = Node(id="peer", name="peer", address=wanted["peer"], link=link, public_key=wanted.get("peer_key", ""))
    driver.apply_peers({wanted["peer"]: peer})
    if "key" in wanted:
        public = driver.apply_key(wanted["key"])
        if "peer_key" not in wanted:
            print(json.dumps(public))
            return
    network = driver.validate(
        Network(
            id=NETWORK, name="o", spec=NetworkSpec(driver="overlay", enable_ipv6=True, options={key: wanted.get(key, "false") for key in ("direct", "encrypted")}), mtu=1500, vni=4097,
            pools=(Pool(subnet="10.77.0.0/16", gateway="10.77.0.1"), Pool(subnet="fd00:77::/64", gateway="fd00:77::1")),
            host_addresses=(Address(address=wanted["host"], prefix=16), Address(address=wanted["host6"], prefix=64)),
            host_mac_address=wanted["host_mac"],
        )
    )  # fmt: skip
    endpoint = Endpoint(
        id=wanted["id"] * 64, network_id=NETWORK, sandbox_id="s", spec=EndpointSpec(), mac_address=wanted["mac"],
        interface_name="eth0", default_route=True,
        addresses=(Address(address=wanted["address"], prefix=16, gateway="10.77.0.1"),
                   Address(address=wanted["address6"], prefix=64, gateway="fd00:77::1")),
    )  # fmt: skip
    remotes = [
        RemoteEndpoint(
            endpoint_id=name, network_id=NETWORK, node_id="n", vtep=wanted["peer"], mac=mac, addresses=tuple(addresses)
        )
        for name, mac, addresses in json.loads(wanted["remotes"])
    ]
    if wanted.get("remove"):
        driver.apply_remote(network, add=(), remove=remotes)
        driver.remove_endpoint(network, endpoint)
        driver.remove_network(network)
        firewall.delete()
        return
    driver.apply_network(network)
    driver.apply_network(network)
    namespace = os.open(f"/run/netns/{wanted['netns']}", os.O_RDONLY)
    driver.apply_endpoint(network, endpoint, namespace)
    driver.apply_remote(network, add=remotes, remove=())
    driver.apply_remote(network, add=remotes, remove=())
    seen = driver.observe(network)
    elements = driver.elements(network, [endpoint]) | driver.node_elements()
    print(
        json.dumps(
            {
                "mtu": network.mtu, "interface": network.interface, "remotes": sorted(seen.remotes),
                "endpoints": sorted(seen.endpoints), "neighbours": sorted(seen.neighbours),
                "elements": sorted(elements - (firewall.elements() or set())),
            }
        )
    )  # fmt: skip


main(json.loads(sys.argv[1]))
