"""Every field of every request, with a bad value: the answer names field and value, and nothing changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from conftest import Node
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from netstore.api.v1 import (
    archive_pb2,
    common_pb2,
    container_pb2,
    endpoint_pb2,
    image_pb2,
    mount_pb2,
    network_pb2,
    node_pb2,
    policy_pb2,
    service_pb2,
    snapshot_pb2,
    system_pb2,
    volume_pb2,
)
from netstore.client import BlockingClient as Client

INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
PRECONDITION, EXISTS = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ALREADY_EXISTS
HTTP = service_pb2.HEALTH_PROTOCOL_HTTP
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
UNIMPLEMENTED, ABORTED = grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.ABORTED


def network(name: str = "n", *, labels=None, pool=None, **spec):
    spec = network_pb2.NetworkSpec(ipam=[network_pb2.IpamConfig(**pool)] if pool else [], **spec)
    return network_pb2.CreateNetworkRequest(network=network_pb2.Network(name=name, labels=labels, spec=spec))


def volume(**spec):
    return volume_pb2.CreateVolumeRequest(volume={"name": "v", "spec": spec})


def attach(**spec):
    spec = {"network": "bridge", "sandbox": endpoint_pb2.SandboxRef(netns_path="/run/netns/c")} | spec
    return endpoint_pb2.AttachEndpointRequest(endpoint=endpoint_pb2.Endpoint(spec=endpoint_pb2.EndpointSpec(**spec)))


def balanced(name: str = "s", **spec):
    spec = service_pb2.ServiceSpec(**{"network": "bridge", "selector": ["a"], **spec})
    return service_pb2.CreateServiceRequest(service=service_pb2.Service(name=name, spec=spec))


def health(**fields):
    return balanced(health={"protocol": HTTP, "port": 80, **fields})


def port(**fields):
    return [common_pb2.PortMapping(**{"container_port": 80, **fields})]


def container(name: str = "c", **spec):
    spec = container_pb2.ContainerSpec(**{"image": "bb", **spec})
    return container_pb2.CreateContainerRequest(container=container_pb2.Container(name=name, spec=spec))


def mount(**fields):
    return container(mounts=[mount_pb2.MountSpec(**{"target": "/t", **fields})])


def joining(**fields):
    return container(networks=[container_pb2.NetworkAttachment(**{"network": "bridge", **fields})])


def policy(name: str = "p", **spec):
    spec = policy_pb2.PolicySpec(**{"network": "bridge", **spec})
    return policy_pb2.CreatePolicyRequest(policy=policy_pb2.Policy(name=name, spec=spec))


def mask(*paths: str) -> FieldMask:
    return FieldMask(paths=paths)


BIND, TMPFS, IMAGE = mount_pb2.MOUNT_TYPE_BIND, mount_pb2.MOUNT_TYPE_TMPFS, mount_pb2.MOUNT_TYPE_IMAGE


def importing(**start: object) -> list[archive_pb2.ImportVolumeRequest]:
    return [archive_pb2.ImportVolumeRequest(start=start), archive_pb2.ImportVolumeRequest(end={})]  # type: ignore[arg-type]


def hot(target: str = "/t", *, ref=None, replace=False, **spec):
    spec = mount_pb2.MountSpec(**{"source": "v", "target": target, **spec})
    return mount_pb2.MountRequest(namespace={"container": "c"} if ref is None else ref, spec=spec, replace=replace)


MOUNTS = [
    ("Mount", hot(ref={}), INVALID, "namespace"),
    ("Mount", hot(ref={"container": "c", "pid": 1}), INVALID, "namespace"),
    ("Mount", hot(ref={"container": "nosuch"}, type=TMPFS, source=""), MISSING, "nosuch"),
    ("Mount", hot(ref={"pid": -1}, type=TMPFS, source=""), INVALID, "namespace.pid"),
    ("Mount", hot(ref={"pid": 2**31 - 1}, type=TMPFS, source=""), INVALID, "namespace.pid"),
    ("Mount", hot(ref={"path": "relative"}, type=TMPFS, source=""), INVALID, "namespace.path"),
    ("Mount", hot(ref={"path": "/dev/zero"}, type=TMPFS, source=""), INVALID, "namespace.path"),
    ("Mount", hot(ref={"path": "/nosuch"}, type=TMPFS, source=""), INVALID, "namespace.path"),
    ("Mount", hot(ref={"path": "/proc/self/ns/net"}, type=TMPFS, source=""), INVALID, "namespace.path"),
    ("Mount", hot(ref={"path": "/proc/self/ns/mnt"}, type=TMPFS, source=""), INVALID, "namespace.path"),
    ("Mount", hot(ref={"pid": 1}, chown=True), INVALID, "spec.chown"),
    ("Mount", hot("relative"), INVALID, "spec.target"),
    ("Mount", hot("/"), INVALID, "spec.target"),
    ("Mount", hot("/a/../../b"), INVALID, "spec.target"),
    ("Mount", hot("/proc/sys"), INVALID, "spec.target"),
    ("Mount", hot(source="nosuch"), MISSING, "nosuch"),
    ("Mount", hot(source=""), INVALID, "spec.source"),
    ("Mount", hot(no_copy=True), INVALID, "spec.no_copy"),
    ("Mount", hot(volume_driver="local"), INVALID, "spec.volume_driver"),
    ("Mount", hot(volume_options={"a": "b"}), INVALID, "spec.volume_options"),
    ("Mount", hot(volume_labels={"a": "b"}), INVALID, "spec.volume_labels"),
    ("Mount", hot(type=BIND, source="/tmp", create_source=True), INVALID, "spec.create_source"),
    ("Mount", hot(subpath="../x"), INVALID, "spec.subpath"),
    ("Unmount", mount_pb2.UnmountRequest(target="/t"), INVALID, "namespace"),
    ("Unmount", mount_pb2.UnmountRequest(namespace={"container": "nosuch"}, target="/t"), MISSING, "nosuch"),
    ("Unmount", mount_pb2.UnmountRequest(namespace={"container": "c"}, target="t"), INVALID, "target"),
    ("ListMounts", mount_pb2.ListMountsRequest(namespace={"container": "nosuch"}), MISSING, "nosuch"),
    ("ListMounts", mount_pb2.ListMountsRequest(namespace={"path": "/dev/null"}), INVALID, "namespace.path"),
    ("ListMounts", mount_pb2.ListMountsRequest(page_size=-1), INVALID, "page_size"),
    ("ListMounts", mount_pb2.ListMountsRequest(page_token="x"), INVALID, "page_token"),
]  # fmt: skip
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
VOLUMES = [
    ("CreateVolume", volume_pb2.CreateVolumeRequest(volume={"name": "../x"}), INVALID, "name"),
    ("CreateVolume", volume_pb2.CreateVolumeRequest(volume={"name": "v", "labels": {"": ""}}), INVALID, "labels"),
    ("CreateVolume", volume_pb2.CreateVolumeRequest(volume={"name": "v", "spec": {"driver": "x"}}), INVALID, "spec.driver"),
    ("CreateVolume", volume_pb2.CreateVolumeRequest(volume={"name": "v", "spec": {"options": {"a": "b"}}}), INVALID, "spec.options"),
    ("CreateVolume", volume_pb2.CreateVolumeRequest(volume={"name": "v", "spec": {"size_bytes": -1}}), INVALID, "spec.size_bytes"),
    ("CreateVolume", volume(driver="local", size_bytes=9), UNIMPLEMENTED, "size_bytes"),
    ("CreateVolume", volume(size_bytes=9), INVALID, "spec.size_bytes"),
    ("CreateVolume", volume(options={"size": "banana"}), INVALID, "spec.options[size]"),
    ("CreateVolume", volume(options={"size": "10M"}, size_bytes=9), INVALID, "spec.options[size]"),
    ("CreateVolume", volume(mode=9), INVALID, "spec.mode"),
    ("CreateVolume", volume(mode="VOLUME_MODE_BLOCK"), INVALID, "spec.mode"),
    ("CreateVolume", volume(driver="image"), INVALID, "spec.size_bytes"),
    ("CreateVolume", volume(driver="image", size_bytes=1 << 50), INVALID, "spec.size_bytes"),
    ("CreateVolume", volume(driver="image", size_bytes=1 << 24, options={"fs": "vfat"}), INVALID, "spec.options[fs]"),
    ("CreateVolume", volume(driver="image", size_bytes=1 << 24, options={"sparse": "x"}), INVALID, "spec.options[sparse]"),
    ("CreateVolume", volume(driver="tmpfs", options={"mode": "9"}), INVALID, "spec.options[mode]"),
    ("CreateVolume", volume(driver="tmpfs", options={"uid": "root"}), INVALID, "spec.options[uid]"),
    ("CreateVolume", volume(driver="tmpfs", size_bytes=1), INVALID, "spec.size_bytes"),
    ("CreateVolume", volume(driver="btrfs"), PRECONDITION, "btrfs-pool"),
    ("CreateVolume", volume(driver="block"), INVALID, "serial, wwn, label, path"),
    ("CreateVolume", volume(driver="block", options={"path": "/etc/passwd"}), INVALID, "spec.options[path]"),
    ("CreateVolume", volume(driver="block", options={"path": "/dev/x", "format": "vfat"}), INVALID, "spec.options[format]"),
    ("CreateVolume", volume(driver="block", options={"path": "/dev/x"}, size_bytes=1 << 30), UNIMPLEMENTED, "spec.size_bytes"),
    ("CreateVolume", volume(driver="image", size_bytes=1 << 24, options={"fs": "xfs"}, mode="VOLUME_MODE_BLOCK"), INVALID, "spec."),
    ("CreateVolume", volume(options={"o": "bind"}), INVALID, "spec.options[type]"),
    ("CreateVolume", volume(options={"type": "x y", "device": "d"}), INVALID, "spec.options[type]"),
    ("CreateVolume", volume(options={"type": "none", "device": "relative", "o": "bind"}), INVALID, "spec.options[device]"),
    ("UpdateVolume", volume_pb2.UpdateVolumeRequest(volume={"name": "v"}, update_mask=mask("spec.driver")), PRECONDITION, "spec.driver"),
    ("StageVolume", volume_pb2.StageVolumeRequest(volume="nosuch", holder="h"), MISSING, "nosuch"),
    ("StageVolume", volume_pb2.StageVolumeRequest(volume="v"), INVALID, "holder"),
    ("TrimVolume", volume_pb2.TrimVolumeRequest(volume="nosuch"), MISSING, "nosuch"),
    ("TrimVolume", volume_pb2.TrimVolumeRequest(), INVALID, "volume"),
    ("CreateVolume", volume(driver="image", size_bytes=1 << 24, options={"o": "discard"}), INVALID, "spec.options[o]"),
    ("CreateVolume", volume(driver="image", size_bytes=1 << 24, options={"mkfs": "-d /dev/x"}), INVALID, "spec.options[mkfs]"),
    ("CreateVolume", volume(driver="image", size_bytes=1 << 24, options={"o": "noexec"}, mode="VOLUME_MODE_BLOCK"), INVALID, "spec.options[o]"),
    ("UnstageVolume", volume_pb2.UnstageVolumeRequest(volume="v", holder="../x"), INVALID, "holder"),
    ("CreateVolume", volume_pb2.CreateVolumeRequest(request_id="x"), INVALID, "request_id"),
    ("GetVolume", volume_pb2.GetVolumeRequest(volume="nosuch"), MISSING, "nosuch"),
    ("ListVolumes", volume_pb2.ListVolumesRequest(page_token="@"), INVALID, "page_token"),
    ("UpdateVolume", volume_pb2.UpdateVolumeRequest(volume={"name": "nosuch"}, update_mask=mask("labels")), MISSING, "nosuch"),
    ("UpdateVolume", volume_pb2.UpdateVolumeRequest(update_mask=mask("name")), PRECONDITION, "name"),
    ("DeleteVolume", volume_pb2.DeleteVolumeRequest(volume="nosuch"), MISSING, "nosuch"),
    ("PruneVolumes", volume_pb2.PruneVolumesRequest(filter=["until=1h"]), INVALID, "filter"),
]  # fmt: skip
VOLUMES += [
    ("CreateVolume", volume_pb2.CreateVolumeRequest(volume={"name": "v", "spec": {"snapshot_schedule": "@often"}}), INVALID, "spec.snapshot_schedule"),
    ("CreateVolume", volume_pb2.CreateVolumeRequest(volume={"name": "v", "spec": {"snapshot_keep": -1}}), INVALID, "spec.snapshot_keep"),
    ("UpdateVolume", volume_pb2.UpdateVolumeRequest(volume={"spec": {"size_bytes": -1}}, update_mask=mask("spec.size_bytes")), INVALID, "spec.size_bytes"),
    ("UpdateVolume", volume_pb2.UpdateVolumeRequest(volume={"name": "nosuch"}, update_mask=mask("spec.driver")), PRECONDITION, "spec.driver"),
    ("DeleteVolume", volume_pb2.DeleteVolumeRequest(volume="nosuch", trash_period={"seconds": -1}), INVALID, "trash_period"),
    ("DeleteVolume", volume_pb2.DeleteVolumeRequest(volume="nosuch", trash_period={"seconds": 10**10}), INVALID, "trash_period"),
    ("PruneVolumes", volume_pb2.PruneVolumesRequest(trash_period={"seconds": -1}), INVALID, "trash_period"),
    ("RenameVolume", volume_pb2.RenameVolumeRequest(volume="nosuch", name="n"), MISSING, "nosuch"),
    ("RenameVolume", volume_pb2.RenameVolumeRequest(volume="nosuch", name="a/b"), INVALID, "name"),
    ("RenameVolume", volume_pb2.RenameVolumeRequest(volume="nosuch"), INVALID, "name"),
    ("ListTrashedVolumes", volume_pb2.ListTrashedVolumesRequest(page_token="@"), INVALID, "page_token"),
    ("ListTrashedVolumes", volume_pb2.ListTrashedVolumesRequest(page_size=-1), INVALID, "page_size"),
    ("RestoreTrashedVolume", volume_pb2.RestoreTrashedVolumeRequest(), INVALID, "volume"),
    ("RestoreTrashedVolume", volume_pb2.RestoreTrashedVolumeRequest(volume="nosuch"), MISSING, "nosuch"),
    ("RestoreTrashedVolume", volume_pb2.RestoreTrashedVolumeRequest(volume="nosuch", name="a/b"), INVALID, "name"),
    ("EmptyTrash", volume_pb2.EmptyTrashRequest(volumes=["nosuch"]), MISSING, "nosuch"),
]  # fmt: skip
SNAPSHOTS = [
    ("CreateSnapshot", snapshot_pb2.CreateSnapshotRequest(), INVALID, "volume"),
    ("CreateSnapshot", snapshot_pb2.CreateSnapshotRequest(snapshot={"spec": {"volume": "nosuch"}}), MISSING, "nosuch"),
    ("CreateSnapshot", snapshot_pb2.CreateSnapshotRequest(snapshot={"name": "a/b", "spec": {"volume": "v"}}), INVALID, "name"),
    ("CreateSnapshot", snapshot_pb2.CreateSnapshotRequest(snapshot={"labels": {"": ""}, "spec": {"volume": "v"}}), INVALID, "labels"),
    ("CreateSnapshot", snapshot_pb2.CreateSnapshotRequest(request_id="x"), INVALID, "request_id"),
    ("GetSnapshot", snapshot_pb2.GetSnapshotRequest(volume="nosuch", snapshot="s"), MISSING, "nosuch"),
    ("ListSnapshots", snapshot_pb2.ListSnapshotsRequest(volume="nosuch"), MISSING, "nosuch"),
    ("ListSnapshots", snapshot_pb2.ListSnapshotsRequest(filter=["x=y"]), INVALID, "filter"),
    ("ListSnapshots", snapshot_pb2.ListSnapshotsRequest(filter=["scheduled=perhaps"]), INVALID, "true or false"),
    ("ListSnapshots", snapshot_pb2.ListSnapshotsRequest(page_size=-1), INVALID, "page_size"),
    ("DeleteSnapshot", snapshot_pb2.DeleteSnapshotRequest(volume="nosuch", snapshot="s"), MISSING, "nosuch"),
    ("RestoreSnapshot", snapshot_pb2.RestoreSnapshotRequest(volume="nosuch", snapshot="s"), MISSING, "nosuch"),
    ("CloneVolume", snapshot_pb2.CloneVolumeRequest(source_volume="nosuch", volume={"name": "n"}), MISSING, "nosuch"),
    ("CloneVolume", snapshot_pb2.CloneVolumeRequest(source_volume="v"), INVALID, "volume.name"),
    ("CloneVolume", snapshot_pb2.CloneVolumeRequest(source_volume="v", volume={"name": "a/b"}), INVALID, "volume.name"),
    ("CloneVolume", snapshot_pb2.CloneVolumeRequest(volume={"name": "n", "spec": {"size_bytes": -1}}), INVALID, "spec.size_bytes"),
    ("CloneVolume", snapshot_pb2.CloneVolumeRequest(volume={"name": "n"}, request_id="x"), INVALID, "request_id"),
]  # fmt: skip
ARCHIVES = [
    ("ExportVolume", archive_pb2.ExportVolumeRequest(volume="nosuch"), MISSING, "nosuch"),
    ("ExportVolume", archive_pb2.ExportVolumeRequest(volume="v", offset=-1), INVALID, "offset"),
    ("ExportVolume", archive_pb2.ExportVolumeRequest(volume="v", level=20), INVALID, "level"),
    ("ExportVolume", archive_pb2.ExportVolumeRequest(volume="v", compression=9), INVALID, "compression"),
    ("ImportVolume", [], INVALID, "start"),
    ("ImportVolume", [archive_pb2.ImportVolumeRequest(chunk=b"x")], INVALID, "start"),
    ("ImportVolume", [archive_pb2.ImportVolumeRequest(start={})], INVALID, "volume.name"),
    ("ImportVolume", importing(volume={"name": "a/b"}), INVALID, "volume.name"),
    ("ImportVolume", importing(volume={"name": "v", "labels": {"": ""}}), INVALID, "volume.labels"),
    ("ImportVolume", importing(volume={"name": "v", "spec": {"size_bytes": -1}}), INVALID, "spec.size_bytes"),
    ("ImportVolume", importing(volume={"name": "v", "spec": {"driver": "x"}}), INVALID, "spec.driver"),
    ("ImportVolume", importing(volume={"name": "v", "spec": {"options": {"type": "tmpfs", "device": "tmpfs"}}}), INVALID, "spec.options[type]"),
    ("ImportVolume", importing(volume={"name": "v"}, upload_id="../../x"), INVALID, "upload_id"),
    ("ImportVolume", importing(volume={"name": "v"}, offset=1), INVALID, "offset"),
    ("ImportVolume", importing(volume={"name": "v"}, offset=-1), INVALID, "offset"),
    ("ImportVolume", [*importing(volume={"name": "v"})[:1], archive_pb2.ImportVolumeRequest(end={"sha256": "x"})], INVALID, "end.sha256"),
    ("GetPath", archive_pb2.GetPathRequest(volume="nosuch", path="/"), MISSING, "nosuch"),
    ("GetPath", archive_pb2.GetPathRequest(volume="nosuch"), INVALID, "path"),
    ("ReadPath", archive_pb2.ReadPathRequest(volume="nosuch", path="/"), MISSING, "nosuch"),
    ("ReadPath", archive_pb2.ReadPathRequest(volume="nosuch"), INVALID, "path"),
    ("WritePath", [], INVALID, "start"),
    ("WritePath", [archive_pb2.WritePathRequest(chunk=b"x")], INVALID, "start"),
    ("WritePath", [archive_pb2.WritePathRequest(start={"volume": "nosuch", "path": "/"})], MISSING, "nosuch"),
    ("WritePath", [archive_pb2.WritePathRequest(start={"volume": "nosuch"})], INVALID, "path"),
    ("VerifyVolume", archive_pb2.VerifyVolumeRequest(volume="nosuch"), MISSING, "nosuch"),
    ("GetUpload", archive_pb2.GetUploadRequest(), INVALID, "upload_id"),
    ("GetUpload", archive_pb2.GetUploadRequest(upload_id="../x"), INVALID, "upload_id"),
    ("GetUpload", archive_pb2.GetUploadRequest(upload_id="0" * 32), MISSING, "upload"),
]  # fmt: skip
CONTAINERS = [
    ("CreateContainer", container("a/b"), INVALID, "name"),
    ("CreateContainer", container(image=""), INVALID, "spec.image"),
    ("CreateContainer", container(image="nosuch"), MISSING, "nosuch"),
    ("CreateContainer", container(entrypoint=["x"]), INVALID, "spec.override_entrypoint"),
    ("CreateContainer", container(env=["=x"]), INVALID, "spec.env[0]"),
    ("CreateContainer", container(working_dir="../x"), INVALID, "spec.working_dir"),
    ("CreateContainer", container(user="nobodyatall"), INVALID, "user"),
    ("CreateContainer", container(hostname="a_b"), INVALID, "spec.hostname"),
    ("CreateContainer", container(stop_signal="SIGNO"), INVALID, "signal"),
    ("CreateContainer", container(stop_timeout={"seconds": -1}), INVALID, "spec.stop_timeout"),
    ("CreateContainer", container(restart_policy={"mode": 99}), INVALID, "spec.restart_policy.mode"),
    ("CreateContainer", container(restart_policy={"mode": 3}, auto_remove=True), INVALID, "spec.restart_policy.mode"),
    ("CreateContainer", container(restart_policy={"max_retries": 1}), INVALID, "spec.restart_policy.max_retries"),
    ("CreateContainer", container(restart_policy={"mode": 2, "max_retries": -1}), INVALID, "spec.restart_policy.max_retries"),
    ("CreateContainer", container(sandbox_container="nosuch"), MISSING, "nosuch"),
    ("CreateContainer", container(ports=port(container_port=0)), INVALID, "spec.ports[0]"),
    ("CreateContainer", joining(network="nosuch"), MISSING, "nosuch"),
    ("CreateContainer", joining(link_local_addresses=["::1"]), INVALID, "spec.networks[0].link_local_addresses[0]"),
    ("CreateContainer", joining(aliases=["x"]), INVALID, "spec.networks[0].aliases"),
    ("CreateContainer", joining(ipv4_address="172.17.0.9"), INVALID, "spec.networks[0].ipv4_address"),
    ("CreateContainer", joining(ipv6_address="172.17.0.9"), INVALID, "spec.networks[0].ipv6_address"),
    ("CreateContainer", joining(options={"x": "y"}), INVALID, "spec.networks[0].options"),
    ("CreateContainer", joining(mac_address="zz"), INVALID, "spec.networks[0].mac_address"),
    ("CreateContainer", joining(network="host", mac_address="02:00:00:00:00:01"), INVALID, "spec.networks[0].mac_address"),
    ("CreateContainer", container(networks=[{"network": "host"}, {"network": "bridge"}]), INVALID, "spec.networks"),
    ("CreateContainer", container(networks=[{"network": "host", "links": ["a"]}]), INVALID, "spec.networks[0].links"),
    ("CreateContainer", container(networks=[{"network": "bridge", "links": [":a"]}]), INVALID, "spec.networks[0].links[0]"),
    ("CreateContainer", container(networks=[{"network": "bridge", "links": ["nosuch:a"]}]), MISSING, "nosuch"),
    ("CreateContainer", container(networks=[{"network": "bridge"}, {"network": "bridge"}]), INVALID, "spec.networks"),
    ("CreateContainer", mount(target="relative"), INVALID, "spec.mounts[0].target"),
    ("CreateContainer", mount(target="/"), INVALID, "spec.mounts[0].target"),
    ("CreateContainer", mount(target="/a/../b"), INVALID, "spec.mounts[0].target"),
    ("CreateContainer", mount(source="../v"), INVALID, "spec.mounts[0].source"),
    ("CreateContainer", mount(volume_driver="nosuch", source="v"), INVALID, "spec.driver"),
    ("CreateContainer", mount(type=BIND, source="relative"), INVALID, "spec.mounts[0].source"),
    ("CreateContainer", mount(type=BIND, source="/nosuch/dir"), PRECONDITION, "/nosuch/dir"),
    ("CreateContainer", mount(type=BIND, source="/tmp", propagation="x"), INVALID, "spec.mounts[0].propagation"),
    ("CreateContainer", mount(type=BIND, source="/tmp", no_copy=True), INVALID, "spec.mounts[0].no_copy"),
    ("CreateContainer", mount(type=TMPFS, source="x"), INVALID, "spec.mounts[0].source"),
    ("CreateContainer", mount(type=TMPFS, tmpfs_mode=0o70000), INVALID, "spec.mounts[0].tmpfs_mode"),
    ("CreateContainer", mount(type=TMPFS, tmpfs_size_bytes=-1), INVALID, "spec.mounts[0].tmpfs_size_bytes"),
    ("CreateContainer", mount(type=TMPFS, tmpfs_options=["evil=1,exec"]), INVALID, "spec.mounts[0].tmpfs_options"),
    ("CreateContainer", mount(source="v", subpath="/abs"), INVALID, "spec.mounts[0].subpath"),
    ("CreateContainer", mount(source="v", subpath="a/../../b"), INVALID, "spec.mounts[0].subpath"),
    ("CreateContainer", mount(subpath="a"), INVALID, "anonymous"),
    ("CreateContainer", mount(type=BIND, source="/tmp", subpath="a"), INVALID, "spec.mounts[0].subpath"),
    ("CreateContainer", mount(source="v", recursive="enabled"), INVALID, "spec.mounts[0].recursive"),
    ("CreateContainer", mount(type=BIND, source="/tmp", recursive="maybe"), INVALID, "spec.mounts[0].recursive"),
    ("CreateContainer", mount(type=BIND, source="/tmp", recursive="writable"), INVALID, "read_only"),
    ("CreateContainer", mount(type=BIND, source="/tmp", recursive="readonly", read_only=True, propagation="rslave"), INVALID, "rprivate"),
    ("CreateContainer", mount(type=TMPFS, no_exec=True), INVALID, "spec.mounts[0].no_exec"),
    ("CreateContainer", mount(type=TMPFS, no_suid=True), INVALID, "spec.mounts[0].no_suid"),
    ("CreateContainer", mount(type=TMPFS, no_dev=True), INVALID, "spec.mounts[0].no_dev"),
    ("CreateContainer", mount(source="v", uid_mappings=[{"stored_id": 0, "mount_id": 1}]), INVALID, "spec.mounts[0].uid_mappings[0]"),
    ("CreateContainer", mount(source="v", gid_mappings=[{"mount_id": 2**32 - 1, "count": 2}]), INVALID, "spec.mounts[0].gid_mappings[0]"),
    ("CreateContainer", mount(source="v", uid_mappings=[{"count": 1}] * 341), INVALID, "340"),
    ("CreateContainer", mount(type=IMAGE, source="bb", uid_mappings=[{"count": 1}]), INVALID, "spec.mounts[0].uid_mappings"),
    ("CreateContainer", mount(source="v", chown=True, read_only=True), INVALID, "spec.mounts[0].chown"),
    ("CreateContainer", mount(type=IMAGE), INVALID, "spec.mounts[0].source"),
    ("CreateContainer", mount(type=IMAGE, source="nosuch"), MISSING, "nosuch"),
    ("CreateContainer", mount(type=77), INVALID, "spec.mounts[0].type"),
    ("CreateContainer", container(volumes_from=["nosuch"]), MISSING, "nosuch"),
    ("CreateContainer", container(volumes_from=["c:rx"]), INVALID, "spec.volumes_from[0]"),
    ("CreateContainer", container(volumes_from=[""]), INVALID, "spec.volumes_from[0]"),
    ("CreateContainer", container(volumes_from=["c"] * 65), INVALID, "spec.volumes_from"),
    ("CreateContainer", container(mounts=[{"target": "/t"}, {"target": "/t/"}]), INVALID, "spec.mounts[1].target"),
    ("GetContainer", container_pb2.GetContainerRequest(), INVALID, "container"),
    ("StartContainer", container_pb2.StartContainerRequest(container="nosuch"), MISSING, "nosuch"),
    ("StopContainer", container_pb2.StopContainerRequest(container="nosuch", signal="x"), INVALID, "signal"),
    ("StopContainer", container_pb2.StopContainerRequest(container="nosuch", timeout={"seconds": -1}), INVALID, "timeout"),
    ("KillContainer", container_pb2.KillContainerRequest(container="nosuch", signal="99"), INVALID, "signal"),
    ("KillContainer", container_pb2.KillContainerRequest(container="nosuch"), MISSING, "nosuch"),
    ("DeleteContainer", container_pb2.DeleteContainerRequest(container="nosuch"), MISSING, "nosuch"),
    ("WaitContainer", container_pb2.WaitContainerRequest(container="nosuch"), MISSING, "nosuch"),
    ("ListContainers", container_pb2.ListContainersRequest(filter=["status=sad"]), INVALID, "status"),
    ("ReadLogs", container_pb2.ReadLogsRequest(container="nosuch"), MISSING, "nosuch"),
    ("ReadLogs", container_pb2.ReadLogsRequest(container="nosuch", tail=-1), INVALID, "tail"),
    ("ExecContainer", [], INVALID, "start"),
    ("ExecContainer", [container_pb2.ExecContainerRequest(stdin=b"x")], INVALID, "start"),
    ("ExecContainer", [container_pb2.ExecContainerRequest(start={"container": "c"})], INVALID, "command"),
    ("ExecContainer", [container_pb2.ExecContainerRequest(start={"container": "nosuch", "command": ["x"]})], MISSING, "nosuch"),
    ("ExecContainer", [container_pb2.ExecContainerRequest(start={"container": "c", "command": ["x"], "tty": True, "size": {"rows": 70000, "columns": 80}})], INVALID, "size"),
    ("ExecContainer", [container_pb2.ExecContainerRequest(start={"container": "c", "command": ["x"], "size": {"rows": 24, "columns": 80}})], INVALID, "size"),
    ("AttachContainer", [], INVALID, "start"),
    ("AttachContainer", [container_pb2.AttachContainerRequest(start={"container": "nosuch"})], MISSING, "nosuch"),
    ("AttachContainer", [container_pb2.AttachContainerRequest(start={"container": "nosuch", "size": {"rows": 24}})], INVALID, "size"),
]  # fmt: skip
IMAGES = [
    ("GetImage", image_pb2.GetImageRequest(image="nosuch"), MISSING, "nosuch"),
    ("DeleteImage", image_pb2.DeleteImageRequest(image="nosuch"), MISSING, "nosuch"),
    ("ListImages", image_pb2.ListImagesRequest(filter=["a"]), INVALID, "filter"),
    ("PullImage", image_pb2.PullImageRequest(), INVALID, "image"),
    ("PullImage", image_pb2.PullImageRequest(image="UPPER"), INVALID, "image"),
    ("PullImage", image_pb2.PullImageRequest(image="x", password="p"), INVALID, "username"),
    ("ImportImage", [], INVALID, "start"),
    ("ImportImage", [image_pb2.ImportImageRequest(start={"name": "UPPER"})], INVALID, "name"),
    ("ImportImage", [image_pb2.ImportImageRequest(start={"name": "x", "format": 9})], INVALID, "format"),
    ("ImportImage", [image_pb2.ImportImageRequest(start={"name": "x", "config": {"working_dir": "x"}})], INVALID, "config.working_dir"),
    ("ImportImage", [image_pb2.ImportImageRequest(start={"name": "x"}), image_pb2.ImportImageRequest(chunk=b"x" * 700)], INVALID, "archive"),
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


def call(stub: object, method: str, request: object) -> None:
    rpc = getattr(stub, method)
    answer = rpc(iter(request)) if isinstance(request, list) else rpc(request)
    if isinstance(answer, Iterator):
        list(answer)


def state(node: Node) -> str:
    """Everything that a refused request must not change."""
    kernel = node.host.sh("ip -o link | sed 's/ <.*//; s/^[0-9]*//; s/@.*//'; nft list ruleset; ls -R /run/netns")
    files = [
        str(path)
        for name in ("state/volumes", "state/uploads", "state/containers", "run/netns")
        for path in (node.place / name).rglob("*")
    ]
    newest = node.out("system", "info", "-f", "{{.Revision}}")
    return "\n".join([kernel, *sorted(files), newest])


@pytest.mark.parametrize(
    ("service", "table"),
    [("networks", NETWORKS), ("nodes", NODES), ("endpoints", ENDPOINTS), ("policies", POLICIES), ("services", SERVICES),
     ("volumes", VOLUMES), ("snapshots", SNAPSHOTS), ("archives", ARCHIVES), ("mounts", MOUNTS), ("containers", CONTAINERS),
     ("images", IMAGES), ("system", SYSTEM)],
)  # fmt: skip
def test_bad_values_are_named_and_change_nothing(
    node: Node, client: Client, image: str, service: str, table: list
) -> None:
    node.host.netns("c")
    before = state(node)
    stub = getattr(client, service)
    problems = []
    for method, request, code, named in table:
        try:
            call(stub, method, request)
            problems.append(f"{method} {request}: accepted")
            continue
        except grpc.RpcError as error:
            status = rpc_status.from_call(error)
            info = error_details_pb2.ErrorInfo()
            if error.code() is not code or status is None or not status.details[0].Unpack(info):
                problems.append(f"{method} {request}: {error.code()} {error.details()}")
            elif named not in f"{error.details()} {dict(info.metadata)}" or info.domain != "netstore":
                problems.append(f"{method} {request}: does not name {named}: {error.details()}")
    assert problems == []
    assert state(node) == before


def test_damaged_and_hostile_archives_leave_nothing(node: Node, client: Client, busybox_tar: Path) -> None:
    whole = busybox_tar.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"\x1f\x8b" + whole[:100]):
        requests = [
            image_pb2.ImportImageRequest(start={"name": "x"}),
            image_pb2.ImportImageRequest(chunk=data[: 1 << 20]),
        ]
        with pytest.raises(grpc.RpcError) as caught:
            client.images.ImportImage(iter(requests))
        assert caught.value.code() is INVALID
    assert list((node.place / "state/images/layers").iterdir()) == []
    assert list((node.place / "state/images/tmp").iterdir()) == []


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


def test_health_and_reflection(client: Client) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    health = health_pb2_grpc.HealthStub(client.channel)
    request = health_pb2.HealthCheckRequest(service="netstore.v1.NetworkService")
    assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    answer = next(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")])))
    names = {service.name for service in answer.list_services_response.service}
    assert {
        f"netstore.v1.{name}Service"
        for name in ("Network", "Endpoint", "Policy", "Volume", "Mount", "Container", "Image", "System")
    } <= names
