"""Every field of every request about networks, endpoints, policies, services and nodes, with a bad value."""

from __future__ import annotations

import grpc
import pytest
from bad_input import ABORTED, EXHAUSTED, EXISTS, INVALID, MISSING, PRECONDITION, mask, port, refused, state
from conftest import Node

from netstore.api.v1 import endpoint_pb2, network_pb2, node_pb2, policy_pb2, service_pb2, system_pb2
from netstore.client import BlockingClient as Client

HTTP = service_pb2.HEALTH_PROTOCOL_HTTP


def network(name: str = "n", *, labels=None, pool=None, **spec):
    spec = network_pb2.NetworkSpec(ipam=[network_pb2.IpamConfig(**pool)] if pool else [], **spec)
    return network_pb2.CreateNetworkRequest(network=network_pb2.Network(name=name, labels=labels, spec=spec))


def attach(**spec):
    spec = {"network": "bridge", "sandbox": endpoint_pb2.SandboxRef(netns_path="/run/netns/c")} | spec
    return endpoint_pb2.AttachEndpointRequest(endpoint=endpoint_pb2.Endpoint(spec=endpoint_pb2.EndpointSpec(**spec)))


def balanced(name: str = "s", **spec):
    spec = service_pb2.ServiceSpec(**{"network": "bridge", "selector": ["a"], **spec})
    return service_pb2.CreateServiceRequest(service=service_pb2.Service(name=name, spec=spec))


def health(**fields):
    return balanced(health={"protocol": HTTP, "port": 80, **fields})


def policy(name: str = "p", **spec):
    spec = policy_pb2.PolicySpec(**{"network": "bridge", **spec})
    return policy_pb2.CreatePolicyRequest(policy=policy_pb2.Policy(name=name, spec=spec))


NETWORKS = [
    ("CreateNetwork", network(""), INVALID, "name"),
    ("CreateNetwork", network("-x"), INVALID, "name"),
    ("CreateNetwork", network("n" * 129), INVALID, "name"),
    ("CreateNetwork", network(labels={"": "v"}), INVALID, "labels"),
    ("CreateNetwork", network(labels={f"k{i}": "" for i in range(65)}), INVALID, "labels"),
    ("CreateNetwork", network(labels={"k": "v" * 4097}), INVALID, "labels"),
    ("CreateNetwork", network(driver="nosuch"), INVALID, "spec.driver"),
    ("CreateNetwork", network(driver="host"), INVALID, "spec.driver"),
    ("CreateNetwork", network(enable_ipv4=False), INVALID, "spec.enable_ipv4"),
    ("CreateNetwork", network(pool={"subnet": "fd00:9::/64"}), INVALID, "spec.ipam[0].subnet"),
    ("CreateNetwork", network(pool={"subnet": "ff00::/64"}, enable_ipv6=True), INVALID, "spec.ipam[0].subnet"),
    ("CreateNetwork", network(pool={"subnet": "fd00:9::/64", "gateway": "10.0.0.1"}, enable_ipv6=True), INVALID, "spec.ipam[0].gateway"),
    ("CreateNetwork", network(pool={"subnet": "10.9.0.0/24"}, ipam_driver="null"), INVALID, "spec.ipam[0].subnet"),
    ("CreateNetwork", network(enable_ipv6=True, options={"com.docker.network.driver.mtu": "1000"}), INVALID, "1280"),
    ("CreateNetwork", network(options={"com.docker.network.bridge.gateway_mode_ipv4": "isolated"}), INVALID, "internal"),
    ("CreateNetwork", network(options={"com.docker.network.bridge.gateway_mode_ipv6": "x"}), INVALID, "routed"),
    ("CreateNetwork", network(options={"com.docker.network.bridge.trusted_host_interfaces": "a b"}), INVALID, "spec.options"),
    ("CreateNetwork", network(options={"com.docker.network.host_ipv4": "fd00::1"}), INVALID, "spec.options"),
    ("CreateNetwork", network_pb2.CreateNetworkRequest(network=network(pool={"subnet": "203.0.113.0/25"}).network, strict=True), PRECONDITION, "203.0.113.0/24"),
    ("CreateNetwork", network(ipam_driver="other"), INVALID, "spec.ipam_driver"),
    ("CreateNetwork", network(ipam_driver="dhcp"), INVALID, "spec.ipam_driver"),
    ("CreateNetwork", network(driver="macvlan", ipam_driver="dhcp", pool={"subnet": "10.9.0.0/24"}), INVALID, "spec.ipam[0].subnet"),
    ("CreateNetwork", network(driver="macvlan", ipam_driver="dhcp", enable_ipv6=True), INVALID, "spec.enable_ipv6"),
    ("CreateNetwork", network(driver="macvlan", ipam_driver="dhcp", options={"host_access": "true"}), INVALID, "host_access"),
    ("CreateNetwork", network(driver="macvlan", ipam_driver="dhcp", routes=[{"destination": "10.9.0.0/24", "gateway": "10.0.0.1"}]), INVALID, "spec.routes"),
    ("CreateNetwork", network(driver="ipvlan", ipam_driver="dhcp", options={"ipvlan_mode": "l3"}), INVALID, "spec.ipam_driver"),
    ("CreateNetwork", network(options={"colour": "red"}), INVALID, "spec.options"),
    ("CreateNetwork", network(options={"com.docker.network.driver.mtu": "12"}), INVALID, "spec.options"),
    ("CreateNetwork", network(options={"com.docker.network.bridge.name": "a b"}), INVALID, "spec.options"),
    ("CreateNetwork", network(options={"com.docker.network.bridge.enable_icc": "maybe"}), INVALID, "spec.options"),
    ("CreateNetwork", network(pool={"subnet": "10.0.0.1/24"}), INVALID, "spec.ipam[0].subnet"),
    ("CreateNetwork", network(pool={"subnet": "10.0.0.0/24", "gateway": "10.0.1.1"}), INVALID, "spec.ipam[0].gateway"),
    ("CreateNetwork", network(pool={"subnet": "10.0.0.0/24", "ip_range": "10.9.0.0/25"}), INVALID, "spec.ipam[0].ip_range"),
    ("CreateNetwork", network(pool={"subnet": "10.0.0.0/24", "aux_addresses": {"r": "x"}}), INVALID, "spec.ipam[0].aux"),
    ("CreateNetwork", network(pool={"subnet": "172.17.9.0/24"}), PRECONDITION, "overlaps"),
    ("CreateNetwork", network("bridge", internal=True), EXISTS, "internal"),
    ("CreateNetwork", network_pb2.CreateNetworkRequest(network=network("n").network, request_id="1"), INVALID, "request_id"),
    ("CreateNetwork", network(config_only=True, driver="bridge"), INVALID, "spec.driver"),
    ("CreateNetwork", network(config_only=True, config_from="x"), INVALID, "spec.config_from"),
    ("CreateNetwork", network(config_from="nosuch"), INVALID, "spec.config_from"),
    ("CreateNetwork", network(config_from="bridge"), INVALID, "spec.config_from"),
    ("CreateNetwork", network(ipam_options={"a": "b"}), INVALID, "spec.ipam_options"),
    ("CreateNetwork", network(options={"com.docker.network.enable_ipv6": "perhaps"}), INVALID, "enable_ipv6"),
    ("CreateNetwork", network(options={"com.docker.network.enable_ipv4": "false"}), INVALID, "spec.enable_ipv4"),
    ("CreateNetwork", network(pool={"subnet": "0.0.0.0/24", "gateway": "10.0.0.1"}), INVALID, "spec.ipam[0].subnet"),
    ("CreateNetwork", network(pool={"subnet": "0.0.0.0/3"}), INVALID, "spec.ipam[0].subnet"),
    ("CreateNetwork", network(pool={"subnet": "0.0.0.0/8"}), EXHAUSTED, "/8"),
    ("CreateNetwork", network(options={"netstore.endpoint.bandwidth_in": "fast"}), INVALID, "bandwidth_in"),
    ("CreateNetwork", network(routes=[{"destination": "x", "gateway": "10.0.0.1"}]), INVALID, "spec.routes[0].destination"),
    ("UpdateNetwork", network_pb2.UpdateNetworkRequest(network={"name": "bridge", "spec": {"ipam": [{"subnet": ""}]}}, update_mask=mask("spec.ipam")), INVALID, "spec.ipam[0].subnet"),
    ("GetNetwork", network_pb2.GetNetworkRequest(), INVALID, "network"),
    ("GetNetwork", network_pb2.GetNetworkRequest(network="nosuch"), MISSING, "nosuch"),
    ("ListNetworks", network_pb2.ListNetworksRequest(page_size=-1), INVALID, "page_size"),
    ("ListNetworks", network_pb2.ListNetworksRequest(page_token="x"), INVALID, "page_token"),
    ("ListNetworks", network_pb2.ListNetworksRequest(filter=["colour=red"]), INVALID, "filter"),
    ("ListNetworks", network_pb2.ListNetworksRequest(filter=["dangling=maybe"]), INVALID, "filter"),
    ("UpdateNetwork", network_pb2.UpdateNetworkRequest(network={"name": "bridge"}), INVALID, "update_mask"),
    ("UpdateNetwork", network_pb2.UpdateNetworkRequest(network={"name": "bridge"}, update_mask=mask("nosuch")), INVALID, "update_mask"),
    ("UpdateNetwork", network_pb2.UpdateNetworkRequest(network={"name": "bridge"}, update_mask=mask("spec.driver")), PRECONDITION, "spec.driver"),
    ("UpdateNetwork", network_pb2.UpdateNetworkRequest(network={"name": "bridge", "etag": "0"}, update_mask=mask("labels")), ABORTED, "changed"),
    ("DeleteNetwork", network_pb2.DeleteNetworkRequest(network="bridge"), PRECONDITION, "predefined"),
    ("DeleteNetwork", network_pb2.DeleteNetworkRequest(network="nosuch"), MISSING, "nosuch"),
    ("CreateNetwork", network(policy_ingress=9), INVALID, "spec.policy_ingress"),
    ("CreateNetwork", network(policy_egress=9), INVALID, "spec.policy_egress"),
    ("CreateNetwork", network(policy_egress=2, ipam_driver="null"), PRECONDITION, "ipam_driver"),
    ("UpdateNetwork", network_pb2.UpdateNetworkRequest(network={"name": "host", "spec": {"policy_ingress": 2}}, update_mask=mask("spec.policy_ingress")), PRECONDITION, "host"),
    ("PruneNetworks", network_pb2.PruneNetworksRequest(filter=["until=soon"]), INVALID, "until"),
    ("CheckNetwork", network_pb2.CheckNetworkRequest(), INVALID, "network"),
    ("CheckNetwork", network_pb2.CheckNetworkRequest(network="nosuch"), MISSING, "nosuch"),
]  # fmt: skip

ENDPOINTS = [
    ("AttachEndpoint", attach(network=""), INVALID, "spec.network"),
    ("AttachEndpoint", attach(network="nosuch"), MISSING, "nosuch"),
    ("AttachEndpoint", attach(network="host"), PRECONDITION, "host"),
    ("AttachEndpoint", attach(sandbox=None), INVALID, "spec.sandbox"),
    ("AttachEndpoint", attach(sandbox={"netns_path": "/run/netns/nosuch"}), INVALID, "netns_path"),
    ("AttachEndpoint", attach(sandbox={"netns_path": "/etc/passwd"}), INVALID, "netns_path"),
    ("AttachEndpoint", attach(sandbox={"netns_path": "relative"}), INVALID, "netns_path"),
    ("AttachEndpoint", attach(sandbox={"netns_path": "/proc/self/ns/mnt"}), INVALID, "netns_path"),
    ("AttachEndpoint", attach(sandbox={"netns_path": "/proc/self/ns/net"}), INVALID, "host's own"),
    ("AttachEndpoint", attach(sandbox={"pid": -4}), INVALID, "pid"),
    ("AttachEndpoint", attach(sandbox={"pid": 2**31 - 1}), INVALID, "pid"),
    ("AttachEndpoint", attach(sandbox={"container": "nosuch"}), MISSING, "nosuch"),
    ("AttachEndpoint", attach(name="a b"), INVALID, "spec.name"),
    ("AttachEndpoint", attach(aliases=["ok", "a/b"]), INVALID, "spec.aliases[1]"),
    ("AttachEndpoint", attach(ipv4_address="10.0.0"), INVALID, "spec.ipv4_address"),
    ("AttachEndpoint", attach(ipv4_address="10.0.0.9"), INVALID, "spec.ipv4_address"),
    ("AttachEndpoint", attach(ipv4_address="172.17.0.1"), PRECONDITION, "taken by the network"),
    ("AttachEndpoint", attach(ipv6_address="fd00::1"), INVALID, "spec.ipv6_address"),
    ("AttachEndpoint", attach(aliases=["ok"]), INVALID, "spec.aliases"),
    ("AttachEndpoint", attach(links=["web:"]), INVALID, "spec.links[0]"),
    ("AttachEndpoint", attach(links=["web", "a b"]), INVALID, "spec.links[1]"),
    ("AttachEndpoint", attach(links=["web:a:b"]), INVALID, "spec.links[0]"),
    ("AttachEndpoint", attach(links=["web"] * 65), INVALID, "spec.links"),
    ("AttachEndpoint", attach(links=["nosuch"]), MISSING, "nosuch"),
    ("AttachEndpoint", attach(mac_address="01:00:00:00:00:01"), INVALID, "spec.mac_address"),
    ("AttachEndpoint", attach(interface_name="lo"), INVALID, "spec.interface_name"),
    ("AttachEndpoint", attach(interface_name="x" * 16), INVALID, "spec.interface_name"),
    ("AttachEndpoint", attach(options={"a": "b"}), INVALID, "spec.options"),
    ("AttachEndpoint", attach(link_local_addresses=["10.0.0.1"]), INVALID, "spec.link_local_addresses[0]"),
    ("AttachEndpoint", attach(link_local_addresses=["fe80::1"]), INVALID, "spec.link_local_addresses[0]"),
    ("AttachEndpoint", attach(link_local_addresses=["169.254.0.1"] * 2), PRECONDITION, "spec.link_local_addresses[1]"),
    ("AttachEndpoint", attach(link_local_addresses=["169.254.0.1"] * 17), INVALID, "at most 16"),
    ("AttachEndpoint", attach(options={"com.docker.network.endpoint.ifname": "lo"}), INVALID, "endpoint.ifname"),
    ("AttachEndpoint", attach(options={"com.docker.network.endpoint.ifname": "x"}, interface_name="y"), INVALID, "endpoint.ifname"),
    ("AttachEndpoint", attach(options={"com.docker.network.endpoint.macaddress": "01:00:00:00:00:01"}), INVALID, "endpoint.macaddress"),
    ("AttachEndpoint", attach(ports=port(container_port=0)), INVALID, "spec.ports[0].container_port"),
    ("AttachEndpoint", attach(ports=port(host_port=65536)), INVALID, "spec.ports[0].host_port"),
    ("AttachEndpoint", attach(ports=port(host_ip="x")), INVALID, "spec.ports[0].host_ip"),
    ("AttachEndpoint", attach(ports=port(host_port=9, host_port_last=8)), INVALID, "spec.ports[0].host_port_last"),
    ("AttachEndpoint", attach(ports=port(host_port=65000, count=1000)), INVALID, "spec.ports[0].count"),
    ("AttachEndpoint", attach(ports=port(sources=["10.0.0.1/8"])), INVALID, "spec.ports[0].sources[0]"),
    ("AttachEndpoint", attach(ports=[*port(host_port=700, count=10), *port(host_port=709)]), PRECONDITION, "709"),
    ("AttachEndpoint", attach(options={"com.docker.network.endpoint.sysctls": "kernel.x=1"}), INVALID, "spec.options"),
    ("AttachEndpoint", attach(ports=port(host_ip="9.9.9.9", host_port=5)), PRECONDITION, "9.9.9.9"),
    ("AttachEndpoint", attach(ports=port(host_ip="::1", host_port=5, protocol=2)), INVALID, "spec.ports[0].host_ip"),
    ("AttachEndpoint", attach(ports=port(host_ip="::2", host_port=5)), PRECONDITION, "::2"),
    ("AttachEndpoint", attach(ports=port(protocol=4)), INVALID, "spec.ports[0].protocol"),
    ("AttachEndpoint", attach(ports=[*port(host_port=80), *port(host_port=80)]), PRECONDITION, "80"),
    ("AttachEndpoints", endpoint_pb2.AttachEndpointsRequest(), INVALID, "endpoints"),
    ("AttachEndpoints", endpoint_pb2.AttachEndpointsRequest(endpoints=[attach().endpoint, attach(network="x").endpoint]), MISSING, "x"),
    ("GetEndpoint", endpoint_pb2.GetEndpointRequest(endpoint="zzz"), MISSING, "zzz"),
    ("ListEndpoints", endpoint_pb2.ListEndpointsRequest(filter=["x=y"]), INVALID, "filter"),
    ("DetachEndpoint", endpoint_pb2.DetachEndpointRequest(endpoint="ffff"), MISSING, "ffff"),
    ("DetachEndpoint", endpoint_pb2.DetachEndpointRequest(network="bridge"), INVALID, "sandbox"),
    ("UpdateEndpoint", endpoint_pb2.UpdateEndpointRequest(endpoint={"id": "f"}, update_mask=mask("spec.network")), PRECONDITION, "spec.network"),
    ("PublishPorts", endpoint_pb2.PublishPortsRequest(endpoint="ffff", ports=port()), MISSING, "ffff"),
    ("PublishPorts", endpoint_pb2.PublishPortsRequest(endpoint="ffff"), INVALID, "ports"),
    ("UnpublishPorts", endpoint_pb2.UnpublishPortsRequest(endpoint="ffff"), INVALID, "ports"),
]  # fmt: skip

TCP, ICMP = policy_pb2.POLICY_PROTOCOL_TCP, policy_pb2.POLICY_PROTOCOL_ICMP

POLICIES = [
    ("CreatePolicy", policy("a b"), INVALID, "name"),
    ("CreatePolicy", policy(network=""), INVALID, "network"),
    ("CreatePolicy", policy(network="nosuch"), MISSING, "nosuch"),
    ("CreatePolicy", policy(network="none"), PRECONDITION, "none"),
    ("CreatePolicy", policy(action=9), INVALID, "spec.action"),
    ("CreatePolicy", policy(sources=[{}]), INVALID, "spec.sources[0]"),
    ("CreatePolicy", policy(sources=[{"labels": ["a"], "cidr": "10.0.0.0/8"}]), INVALID, "spec.sources[0]"),
    ("CreatePolicy", policy(sources=[{"cidr": "10.0.0.1/8"}]), INVALID, "spec.sources[0].cidr"),
    ("CreatePolicy", policy(sources=[{"labels": ["a"]}, {"labels": ["=x"]}]), INVALID, "spec.sources[1].labels[0]"),
    ("CreatePolicy", policy(sources=[{"labels": ["k=" + "v" * 4097]}]), INVALID, "spec.sources[0].labels[0]"),
    ("CreatePolicy", policy(sources=[{"labels": [f"k{i}" for i in range(17)]}]), INVALID, "spec.sources[0].labels"),
    ("CreatePolicy", policy(sources=[{"labels": ["a"]}] * 65), INVALID, "spec.sources"),
    ("CreatePolicy", policy(destinations=[{"cidr": "x"}]), INVALID, "spec.destinations[0].cidr"),
    ("CreatePolicy", policy(ports=[{}]), INVALID, "spec.ports[0].protocol"),
    ("CreatePolicy", policy(ports=[{"protocol": 9}]), INVALID, "spec.ports[0].protocol"),
    ("CreatePolicy", policy(ports=[{"protocol": ICMP, "first_port": 1}]), INVALID, "spec.ports[0].first_port"),
    ("CreatePolicy", policy(ports=[{"protocol": TCP, "first_port": 65536}]), INVALID, "spec.ports[0].first_port"),
    ("CreatePolicy", policy(ports=[{"protocol": TCP, "first_port": 9, "last_port": 8}]), INVALID, "spec.ports[0].last_port"),
    ("CreatePolicy", policy(ports=[{"protocol": TCP, "last_port": 8}]), INVALID, "spec.ports[0].last_port"),
    ("CreatePolicy", policy(ports=[{"protocol": TCP, "first_port": 9, "last_port": 65536}]), INVALID, "spec.ports[0].last_port"),
    ("CreatePolicy", policy(ports=[{"protocol": TCP}] * 65), INVALID, "spec.ports"),
    ("CreatePolicy", policy_pb2.CreatePolicyRequest(policy=policy().policy, request_id="x"), INVALID, "request_id"),
    ("CreatePolicy", policy_pb2.CreatePolicyRequest(policy={"name": "p", "labels": {"": "v"}, "spec": {"network": "bridge"}}), INVALID, "labels"),
    ("GetPolicy", policy_pb2.GetPolicyRequest(), INVALID, "policy"),
    ("GetPolicy", policy_pb2.GetPolicyRequest(policy="nosuch"), MISSING, "nosuch"),
    ("ListPolicies", policy_pb2.ListPoliciesRequest(filter=["x=y"]), INVALID, "filter"),
    ("ListPolicies", policy_pb2.ListPoliciesRequest(page_token="x"), INVALID, "page_token"),
    ("UpdatePolicy", policy_pb2.UpdatePolicyRequest(policy={"name": "p"}), INVALID, "update_mask"),
    ("UpdatePolicy", policy_pb2.UpdatePolicyRequest(policy={"name": "p"}, update_mask=mask("spec.network")), PRECONDITION, "spec.network"),
    ("UpdatePolicy", policy_pb2.UpdatePolicyRequest(policy={"name": "nosuch"}, update_mask=mask("labels")), MISSING, "nosuch"),
    ("UpdatePolicy", policy_pb2.UpdatePolicyRequest(policy={"name": "p", "spec": {"ports": [{}]}}, update_mask=mask("spec.ports")), INVALID, "spec.ports[0].protocol"),
    ("DeletePolicy", policy_pb2.DeletePolicyRequest(policy="nosuch"), MISSING, "nosuch"),
]  # fmt: skip

NODES = [  # with a cluster: tests/cluster/test_nodes.py
    ("GetNode", node_pb2.GetNodeRequest(node="self"), PRECONDITION, "no cluster"),
    ("ListNodes", node_pb2.ListNodesRequest(), PRECONDITION, "no cluster"),
    ("DeleteNode", node_pb2.DeleteNodeRequest(node="n"), PRECONDITION, "no cluster"),
    ("DrainNode", node_pb2.DrainNodeRequest(node="n"), PRECONDITION, "no cluster"),
    ("UndrainNode", node_pb2.UndrainNodeRequest(node="n"), PRECONDITION, "no cluster"),
]  # fmt: skip

SERVICES = [
    ("CreateService", balanced("a b"), INVALID, "name"),
    ("CreateService", balanced(network=""), INVALID, "network"),
    ("CreateService", balanced(network="nosuch"), MISSING, "nosuch"),
    ("CreateService", balanced(), PRECONDITION, "bridge"),
    ("CreateService", balanced(network="none"), PRECONDITION, "none"),
    ("CreateService", balanced(selector=[]), INVALID, "spec.selector"),
    ("CreateService", balanced(selector=["=x"]), INVALID, "spec.selector[0]"),
    ("CreateService", balanced(selector=["k=" + "v" * 4097]), INVALID, "spec.selector[0]"),
    ("CreateService", balanced(selector=[f"k{i}" for i in range(17)]), INVALID, "spec.selector"),
    ("CreateService", balanced(mode=9), INVALID, "spec.mode"),
    ("CreateService", balanced(ports=[{"target_port": 1}]), INVALID, "spec.ports[0].published_port"),
    ("CreateService", balanced(ports=[{"published_port": 65536, "target_port": 1}]), INVALID, "spec.ports[0].published_port"),
    ("CreateService", balanced(ports=[{"published_port": 1}]), INVALID, "spec.ports[0].target_port"),
    ("CreateService", balanced(ports=[{"published_port": 1, "target_port": 1, "protocol": 9}]), INVALID, "spec.ports[0].protocol"),
    ("CreateService", balanced(ports=[{"published_port": 1, "target_port": 1}] * 2), INVALID, "spec.ports[1].published_port"),
    ("CreateService", balanced(ports=[{"published_port": 1, "target_port": 1}] * 65), INVALID, "spec.ports"),
    ("CreateService", health(protocol=0), INVALID, "spec.health.protocol"),
    ("CreateService", health(protocol=9), INVALID, "spec.health.protocol"),
    ("CreateService", health(port=0), INVALID, "spec.health.port"),
    ("CreateService", health(port=65536), INVALID, "spec.health.port"),
    ("CreateService", health(protocol=1, path="/"), INVALID, "spec.health.path"),
    ("CreateService", health(path="x"), INVALID, "spec.health.path"),
    ("CreateService", health(path="/ HTTP/1.0\r\n"), INVALID, "spec.health.path"),
    ("CreateService", health(path="/" + "x" * 1024), INVALID, "spec.health.path"),
    ("CreateService", health(interval={"nanos": 1}), INVALID, "spec.health.interval"),
    ("CreateService", health(interval={"seconds": 86401}), INVALID, "spec.health.interval"),
    ("CreateService", health(timeout={"seconds": -1}), INVALID, "spec.health.timeout"),
    ("CreateService", health(timeout={"seconds": 3601}), INVALID, "spec.health.timeout"),
    ("CreateService", health(retries=1001), INVALID, "spec.health.retries"),
    ("CreateService", service_pb2.CreateServiceRequest(service=balanced().service, request_id="x"), INVALID, "request_id"),
    ("CreateService", service_pb2.CreateServiceRequest(service={"name": "s", "labels": {"": "v"}, "spec": {"network": "bridge", "selector": ["a"]}}), INVALID, "labels"),
    ("GetService", service_pb2.GetServiceRequest(), INVALID, "service"),
    ("GetService", service_pb2.GetServiceRequest(service="nosuch"), MISSING, "nosuch"),
    ("ListServices", service_pb2.ListServicesRequest(filter=["x=y"]), INVALID, "filter"),
    ("ListServices", service_pb2.ListServicesRequest(page_token="x"), INVALID, "page_token"),
    ("UpdateService", service_pb2.UpdateServiceRequest(service={"name": "s"}), INVALID, "update_mask"),
    ("UpdateService", service_pb2.UpdateServiceRequest(service={"name": "s"}, update_mask=mask("spec.mode")), PRECONDITION, "spec.mode"),
    ("UpdateService", service_pb2.UpdateServiceRequest(service={"name": "s"}, update_mask=mask("nosuch")), INVALID, "nosuch"),
    ("UpdateService", service_pb2.UpdateServiceRequest(service={"name": "nosuch"}, update_mask=mask("labels")), MISSING, "nosuch"),
    ("DeleteService", service_pb2.DeleteServiceRequest(service="nosuch"), MISSING, "nosuch"),
]  # fmt: skip

SYSTEM = [
    ("WatchEvents", system_pb2.WatchEventsRequest(revision=-1), INVALID, "revision"),
    ("WatchEvents", system_pb2.WatchEventsRequest(filter=["x=y"]), INVALID, "filter"),
]


@pytest.mark.parametrize(
    ("service", "table"),
    [("networks", NETWORKS), ("nodes", NODES), ("endpoints", ENDPOINTS), ("policies", POLICIES), ("services", SERVICES), ("system", SYSTEM)],
)  # fmt: skip
def test_bad_values_are_named_and_change_nothing(
    node: Node, client: Client, image: str, service: str, table: list
) -> None:
    refused(node, client, service, table)


def test_repeats_are_answered_as_the_first(node: Node, client: Client) -> None:
    first = client.networks.CreateNetwork(network("app")).network
    assert client.networks.CreateNetwork(network("app")).network.id == first.id
    node.host.netns("c")
    one = client.endpoints.AttachEndpoint(attach(network="app")).endpoint
    assert client.endpoints.AttachEndpoint(attach(network="app")).endpoint.id == one.id
    with pytest.raises(grpc.RpcError) as caught:
        client.endpoints.AttachEndpoint(attach(network="app", name="other"))
    assert caught.value.code() is EXISTS
    client.networks.DeleteNetwork(network_pb2.DeleteNetworkRequest(network="nosuch", allow_missing=True))


def test_a_batch_is_all_or_none(node: Node, client: Client) -> None:
    for name in ("c", "d"):
        node.host.netns(name)
    pair = [attach().endpoint, attach(sandbox={"netns_path": "/run/netns/d"}).endpoint]
    made = client.endpoints.AttachEndpoints(endpoint_pb2.AttachEndpointsRequest(endpoints=pair)).endpoints
    assert [each.status.addresses[0] for each in made] == ["172.17.0.2/16", "172.17.0.3/16"]
    for each in made:
        client.endpoints.DetachEndpoint(endpoint_pb2.DetachEndpointRequest(endpoint=each.id))
    before = state(node)
    pair[1].spec.ipv4_address = "172.17.0.1"
    with pytest.raises(grpc.RpcError):
        client.endpoints.AttachEndpoints(endpoint_pb2.AttachEndpointsRequest(endpoints=pair))
    assert state(node) == before
