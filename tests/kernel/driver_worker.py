"""Run inside a private namespace by the conformance suite: plays the verbs of one network driver, prints what it saw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

from netstore.drivers.base import Driver, Host, load_drivers
from netstore.errors import FailedPrecondition, NetstoreError
from netstore.kernel.firewall import Firewall
from netstore.kernel.links import Deletions
from netstore.model import (
    Address,
    Endpoint,
    EndpointSpec,
    Network,
    NetworkSpec,
    Pool,
    PortMapping,
    Scope,
    new_id,
    stable_mac,
)


def shell(command: str) -> str:
    return subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout


def state() -> str:
    host = (
        "ip -o link | sed 's/^[0-9]*: //; s/<.*>//; s/state .*//'; ip -o addr | sed 's/ tentative//'; nft list ruleset"
    )
    return shell(f"{host}; ip -n c -o link | sed 's/<.*>//; s/state .*//' | grep -v ' lo:' || true")


OPTIONS = {"macvlan": {"parent": "uplink"}, "ipvlan": {"parent": "uplink"}}
NOT_IN_KERNEL = 77


def asked(driver: Driver) -> tuple[Network, Endpoint]:
    """Return a network and an endpoint with all that the driver takes."""
    pools = (Pool(subnet="10.66.0.0/24", gateway="10.66.0.1"), Pool(subnet="fd00:66::/64", gateway="fd00:66::1"))
    spec = NetworkSpec(driver=driver.name, enable_ipv6=True, options=OPTIONS.get(driver.name, {}))
    network = driver.validate(
        Network(id=new_id(), name="n", spec=spec, mtu=1400, pools=pools if driver.has_interfaces else ())
    )
    if driver.scope is Scope.GLOBAL:  # what the cluster would have chosen
        own = (Address(address="10.66.0.250", prefix=24), Address(address="fd00:66::250", prefix=64))
        network = replace(network, vni=4097, host_addresses=own, host_mac_address=stable_mac("host"))
    endpoint = Endpoint(
        id=new_id(), network_id=network.id, sandbox_id="s", spec=EndpointSpec(), mac_address=stable_mac("x"),
        interface_name="eth0" if driver.has_interfaces else "", default_route=True,
        ports=(PortMapping(container_port=80, host_port=8080),) if driver.publishes_ports else (),
        addresses=(Address(address="10.66.0.2", prefix=24, gateway="10.66.0.1"),
                   Address(address="fd00:66::2", prefix=64, gateway="fd00:66::1")) if driver.has_interfaces else (),
    )  # fmt: skip
    return network, endpoint


def main(name: str) -> None:
    firewall = Firewall()
    firewall.ensure()
    driver = load_drivers(Host(firewall, Deletions(), vtep="203.0.113.1"))[name]
    network, endpoint = asked(driver)
    namespace = os.open("/run/netns/c", os.O_RDONLY)
    descriptors = len(os.listdir("/proc/self/fd"))
    before = state()
    driver.remove_endpoint(network, endpoint)  # what is not there is a success
    driver.remove_network(network)
    seen: dict[str, object] = {"untouched": state() == before}
    driver.apply_network(network)
    first = state()
    driver.apply_network(network)
    seen["network is idempotent"] = state() == first
    seen["network is observed"] = driver.observe(network).interface
    seen |= attach(driver, firewall, network, endpoint, namespace)
    driver.remove_endpoint(network, endpoint, namespace)
    driver.remove_endpoint(network, endpoint, namespace)
    seen["endpoint is gone"] = state() == first
    if not driver.ends_inside:
        waiting = replace(endpoint, id=new_id())
        driver.apply_endpoint(network, waiting, None)  # without a namespace it waits in the host's
        driver.remove_endpoint(network, waiting)
        seen["waiting endpoint is gone"] = state() == first
    if driver.has_interfaces:
        seen |= be_refused(driver, network, endpoint, namespace)
    driver.remove_network(network)
    driver.remove_network(network)
    seen["network is gone"] = state() == before
    kept = 2  # the thread's own socket, and the way home
    seen["no descriptor leaks"] = len(os.listdir("/proc/self/fd")) <= descriptors + kept
    firewall.delete()
    print(json.dumps({"options": [asdict(replace(o, parse=str)) for o in driver.options], **seen}, default=str))


def attach(
    driver: Driver, firewall: Firewall, network: Network, endpoint: Endpoint, namespace: int
) -> dict[str, object]:
    """Apply an endpoint twice."""
    driver.apply_endpoint(network, endpoint, namespace)
    attached = state()
    driver.apply_endpoint(network, endpoint, namespace)
    wanted = {endpoint.host_interface} if driver.has_interfaces and not driver.ends_inside else set()
    return {
        "endpoint is idempotent": state() == attached,
        "endpoint is observed": driver.observe(network).endpoints == wanted,
        "endpoint is inside": driver.is_inside(network, endpoint, namespace),
        "elements are there": driver.elements(network, [endpoint]) <= (firewall.elements() or set()),
        "inside": shell("ip -n c -j addr; ip -n c -4 route; ip -n c -6 route") if driver.has_interfaces else "",
    }


def be_refused(driver: Driver, network: Network, endpoint: Endpoint, namespace: int) -> dict[str, object]:
    """Apply an endpoint that is refused half-way: the interface's name is taken inside."""
    shell("ip -n c link add eth0 type veth peer name other")
    taken = state()
    seen: dict[str, object] = {}
    try:
        driver.apply_endpoint(network, endpoint, namespace)
        seen["refusal leaves nothing"] = False
    except NetstoreError as error:
        seen = {"refusal leaves nothing": state() == taken, "refusal": str(error)}
    shell("ip -n c link del eth0")
    return seen


try:
    main(sys.argv[1])
except FailedPrecondition as error:
    if "this kernel has no" not in str(error):
        raise
    print(error)
    sys.exit(NOT_IN_KERNEL)
