"""netstore network: create, ls, inspect, connect, disconnect, update, rm, prune."""

from __future__ import annotations

import ipaddress
import sys
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

import click
from google.protobuf.field_mask_pb2 import FieldMask

from netstore.api.v1 import endpoint_pb2, network_pb2
from netstore.cli.client import FAILED, Client, pages, pass_client, tolerant
from netstore.cli.commands import Group
from netstore.cli.completion import names
from netstore.cli.format import by_name, listing, name_of, shapes, short_id, show_objects, to_dict
from netstore.cli.grammar import INT32, bandwidth, key_values, parse_port

__all__ = ["group"]

_NETWORK = names("network")
_CONTAINER = names("container")
_DIRECTIONS = ("ingress", "egress")
_ACTIONS = {"allow": network_pb2.POLICY_ACTION_ALLOW, "deny": network_pb2.POLICY_ACTION_DENY}
_DEFAULT = "What happens to traffic that no policy describes: allow, deny, or ingress=…,egress=…."


@click.group("network", cls=Group)
def group() -> None:
    """Networks."""


@group.command()
@click.argument("name")
@click.option("-d", "--driver", default="", help="Driver [default: bridge].")
@click.option("--subnet", multiple=True, help="Subnet (CIDR).")
@click.option("--gateway", multiple=True, help="Gateway inside one of the subnets.")
@click.option("--ip-range", multiple=True, help="Dynamic addresses come from this part of a subnet (CIDR).")
@click.option("--aux-address", multiple=True, help="NAME=ADDRESS that no endpoint gets.")
@click.option("--ipam-opt", multiple=True, help="Option KEY=VALUE of the address management.")
@click.option("--config-only", is_flag=True, help="Only hold a configuration, for --config-from of others.")
@click.option("--config-from", default="", help="Take everything but the driver from a network of --config-only.")
@click.option("--scope", default="local", show_default=True, help="local: of this node.")
@click.option("--ingress", is_flag=True, help="Refused: `-p … --mesh` has ports published on every node.")
@click.option("--internal", is_flag=True, help="No way to other networks or the outside.")
@click.option("--ipv4", is_flag=True, flag_value=True, default=True, help="Give IPv4 addresses; --ipv4=false does not.")
@click.option("--ipv6", is_flag=True, help="Give IPv6 addresses too.")
@click.option("--strict", is_flag=True, help="Refuse a subnet that overlaps one of the host's routes.")
@click.option("--attachable", is_flag=True, help="Every network is: no effect.")
@click.option("--ipam-driver", default="", help="Address management: default, null or dhcp.")
@click.option("--route", multiple=True, help="A further route of its endpoints: DESTINATION,GATEWAY.")
@click.option("--dns", multiple=True, help="Name server of its endpoints: [DOMAIN=]ADDRESS[:PORT].")
@click.option("--policy-default", multiple=True, help=_DEFAULT)
@click.option("--label", multiple=True, help="KEY=VALUE.")
@click.option("-o", "--opt", multiple=True, help="Driver option KEY=VALUE.")
@pass_client
def create(client: Client, name: str, driver: str, internal: bool, ipv4: bool, ipv6: bool, strict: bool,
           ipam_opt: tuple[str, ...], config_only: bool, config_from: str, scope: str, ingress: bool,
           attachable: bool, ipam_driver: str, route: tuple[str, ...], dns: tuple[str, ...], label: tuple[str, ...],
           opt: tuple[str, ...], subnet: tuple[str, ...], gateway: tuple[str, ...], ip_range: tuple[str, ...],
           aux_address: tuple[str, ...], policy_default: tuple[str, ...]) -> None:  # fmt: skip
    """Create a network."""
    if ingress or scope != "local":
        wanted = "--ingress" if ingress else f"--scope: {scope!r}"
        raise click.UsageError(f"{wanted} is not accepted: networks are the node's own; publish ports instead (-p)")
    spec = network_pb2.NetworkSpec(
        driver=driver, internal=internal, enable_ipv4=None if ipv4 else False, enable_ipv6=ipv6,
        ipam_driver=ipam_driver, ipam_options=key_values(ipam_opt, "--ipam-opt"),
        config_only=config_only, config_from=config_from,
        options=key_values(opt, "--opt"), ipam=_pools(subnet, gateway, ip_range, aux_address),
        dns_servers=dns, routes=[_route(text) for text in route],
    )  # fmt: skip
    for direction, action in _defaults(policy_default).items():
        setattr(spec, f"policy_{direction}", action)
    network = network_pb2.Network(name=name, labels=key_values(label, "--label"), spec=spec)
    request = network_pb2.CreateNetworkRequest(network=network, request_id=str(uuid.uuid4()), strict=strict)
    response = client.networks.CreateNetwork(request)
    for warning in response.warnings:
        click.echo(f"WARNING: {warning}", err=True)
    click.echo(response.network.id)


def _defaults(texts: Sequence[str]) -> dict[str, network_pb2.PolicyAction.ValueType]:
    """Return an action for each direction that is named, both where none is."""
    found: dict[str, network_pb2.PolicyAction.ValueType] = {}
    for term in (term for text in texts for term in text.split(",")):
        direction, separator, action = term.rpartition("=")
        if action not in _ACTIONS or (separator and direction not in _DIRECTIONS):
            raise click.UsageError(f"--policy-default: {term!r}: [ingress=|egress=]allow or deny")
        found |= dict.fromkeys([direction] if direction else _DIRECTIONS, _ACTIONS[action])
    return found


def _route(text: str) -> network_pb2.Route:
    destination, _, gateway = text.partition(",")
    return network_pb2.Route(destination=destination, gateway=gateway)


def _pools(
    subnets: Sequence[str], gateways: Sequence[str], ranges: Sequence[str], aux_addresses: Sequence[str]
) -> list[network_pb2.IpamConfig]:
    """Match gateways, ranges and auxiliary addresses with the subnet that holds them, as docker does."""
    pools = [network_pb2.IpamConfig(subnet=subnet) for subnet in subnets]
    for value in gateways:
        _holder(pools, value, "--gateway").gateway = value
    for value in ranges:
        _holder(pools, value, "--ip-range").ip_range = value
    for item in aux_addresses:
        name, _, value = item.partition("=")
        _holder(pools, value, "--aux-address").aux_addresses[name] = value
    return pools


def _holder(pools: list[network_pb2.IpamConfig], value: str, flag: str) -> network_pb2.IpamConfig:
    for pool in pools:
        try:
            if ipaddress.ip_interface(value).ip in ipaddress.ip_network(pool.subnet, strict=False):
                return pool
        except ValueError:
            continue
    if len(pools) == 1:  # let netstored say what is wrong with it
        return pools[0]
    raise click.UsageError(f"{flag}: {value!r} is in none of the subnets given with --subnet")


@group.command("ls")
@click.option("-f", "--filter", "filters", multiple=True, help="driver=, id=, name=, label=, type=, scope=, dangling=.")
@shapes
@pass_client
def ls(client: Client, filters: tuple[str, ...], template: str | None, quiet: bool, no_trunc: bool) -> None:
    """List networks."""
    request = network_pb2.ListNetworksRequest(filter=filters)
    found = by_name(pages(client.networks.ListNetworks, request, "networks"))
    ids = [short_id(network.id, full=no_trunc) for network in found]
    rows = [
        (shown, n.name, n.spec.driver, name_of(network_pb2.NetworkScope, n.status.scope, "NETWORK_SCOPE"))
        for shown, n in zip(ids, found, strict=True)
    ]
    listing(found, ("NETWORK ID", "NAME", "DRIVER", "SCOPE"), rows, template, quiet=quiet, ids=ids)


@group.command()
@click.argument("networks", nargs=-1, required=True, shell_complete=_NETWORK)
@click.option("-f", "--format", "template", default="json", help="'json' (default), or a template.")
@click.option("-v", "--verbose", is_flag=True, help="With what is attached, as .Endpoints.")
@pass_client
def inspect(client: Client, networks: tuple[str, ...], template: str, verbose: bool) -> None:
    """Show networks in full."""
    with tolerant(client) as attempt:
        found: list[network_pb2.Network] = []
        for name in networks:
            request = network_pb2.GetNetworkRequest(network=name)
            attempt(lambda r=request: found.append(client.networks.GetNetwork(r).network))  # type: ignore[misc]
        show_objects(found, template, more=partial(_attached, client) if verbose else None)


def _attached(client: Client, network: network_pb2.Network) -> dict[str, Any]:
    """Return the endpoints of a network, as they are shown in full."""
    request = endpoint_pb2.ListEndpointsRequest(filter=[f"network={network.name}"])
    return {"endpoints": [to_dict(each) for each in pages(client.endpoints.ListEndpoints, request, "endpoints")]}


def _sandbox(container: str | None, netns: str | None, pid: int | None) -> endpoint_pb2.SandboxRef:
    if sum(each is not None for each in (container, netns, pid)) != 1:
        raise click.UsageError("name one of: CONTAINER, --netns PATH, --pid PID")
    if netns is not None:
        return endpoint_pb2.SandboxRef(netns_path=netns)
    return endpoint_pb2.SandboxRef(pid=pid) if pid is not None else endpoint_pb2.SandboxRef(container=container or "")


@group.command()
@click.argument("network", shell_complete=_NETWORK)
@click.argument("container", required=False, shell_complete=_CONTAINER)
@click.option("--netns", help="A network namespace instead of a container.")
@click.option("--pid", type=INT32, help="The network namespace of a process instead of a container.")
@click.option("--name", help="Name that others resolve; a container's own by default.")
@click.option("--alias", multiple=True, help="A further name on this network.")
@click.option("--link", multiple=True, help="CONTAINER[:ALIAS]: a name of its own for another.")
@click.option("--ip", help="Static IPv4 address.")
@click.option("--ip6", help="Static IPv6 address.")
@click.option("--mac-address", help="MAC address.")
@click.option("--ifname", help="Name of the interface inside.")
@click.option("--link-local-ip", multiple=True, help="A further address of 169.254.0.0/16 or fe80::/10.")
@click.option("--driver-opt", multiple=True, help="KEY=VALUE.")
@click.option("--label", multiple=True, help="KEY=VALUE; a container's own labels are there already.")
@click.option("--bandwidth-in", help="Most that it receives, such as 50mbit.")
@click.option("--bandwidth-out", help="Most that it sends.")
@click.option("--gw-priority", type=INT32, default=0, help="The highest gives the default route.")
@click.option("-p", "--publish", multiple=True, help="Publish a port: [[IP:]HOSTPORT:]PORT[/tcp|udp|sctp].")
@click.option("--mesh", is_flag=True, help="Every node of the cluster publishes the ports of -p.")
@pass_client
def connect(client: Client, network: str, container: str | None, netns: str | None, pid: int | None,
            name: str | None, alias: tuple[str, ...], link: tuple[str, ...], ip: str | None,
            ip6: str | None, mac_address: str | None, ifname: str | None, driver_opt: tuple[str, ...],
            link_local_ip: tuple[str, ...], bandwidth_in: str | None, bandwidth_out: str | None, gw_priority: int,
            publish: tuple[str, ...], mesh: bool, label: tuple[str, ...]) -> None:  # fmt: skip
    """Connect a container, or any network namespace, to a network."""
    spec = endpoint_pb2.EndpointSpec(
        network=network, sandbox=_sandbox(container, netns, pid), name=name or "", aliases=alias, links=link,
        ipv4_address=ip or "", ipv6_address=ip6 or "", mac_address=mac_address or "", interface_name=ifname or "",
        options=key_values(driver_opt, "--driver-opt") | bandwidth(bandwidth_in, bandwidth_out),
        gateway_priority=gw_priority, link_local_addresses=link_local_ip,
        ports=[port for each in publish for port in parse_port(each, mesh=mesh)],
    )  # fmt: skip
    endpoint = endpoint_pb2.Endpoint(spec=spec, labels=key_values(label, "--label"))
    client.endpoints.AttachEndpoint(endpoint_pb2.AttachEndpointRequest(endpoint=endpoint))


@group.command()
@click.argument("network", shell_complete=_NETWORK)
@click.option("--format", "template", help="'json' (one object a node), or a template.")
@pass_client
def check(client: Client, network: str, template: str | None) -> None:
    """Compare kernel and store on every node that has a network, and probe each pair of them.

    Exit status 1 when something is not as it should be.
    """
    nodes = client.networks.CheckNetwork(network_pb2.CheckNetworkRequest(network=network)).nodes
    if template:
        show_objects(nodes, template)
    else:
        held = [row for each in nodes for row in _holding(each)]
        listing(nodes, ("NODE", "HOLDS"), held, None, quiet=False, ids=())
        probes = [
            (node.node, each.node, each.address, _passage(each, node.mtu), f"{each.received}/{each.sent}",
             *((str(each.mtu), f"{each.latency.ToNanoseconds() / 1e6:.2f} ms") if each.received else ("", "")))
            for node in nodes for each in node.probes
        ]  # fmt: skip
        if probes:
            click.echo()
            listing(
                (), ("FROM", "TO", "ADDRESS", "STATUS", "ANSWERED", "MTU", "LATENCY"), probes, None, quiet=False, ids=()
            )
    if any(
        node.error or node.findings or any(_passage(each, node.mtu) != "ok" for each in node.probes) for node in nodes
    ):
        sys.exit(FAILED)


def _holding(node: network_pb2.NodeCheck) -> list[tuple[str, str]]:
    """Return a node's lines: one for each finding."""
    told = [node.error] if node.error else list(node.findings)
    told = told or ["what the store says" if node.used else "nothing: it has no endpoint there"]
    return list(zip((node.node, *[""] * len(told)), told, strict=False))


def _passage(probe: network_pb2.NodeProbe, mtu: int) -> str:
    if probe.received < probe.sent:
        return "loses packets" if probe.received else "unreachable"
    return "ok" if probe.mtu == mtu else "large packets are lost"


@group.command()
@click.argument("network", shell_complete=_NETWORK)
@click.argument("container", required=False, shell_complete=_CONTAINER)
@click.option("--netns", help="A network namespace instead of a container.")
@click.option("--pid", type=INT32, help="The network namespace of a process instead of a container.")
@click.option("-f", "--force", is_flag=True, help="Not connected is a success.")
@pass_client
def disconnect(client: Client, network: str, container: str | None, netns: str | None, pid: int | None,
               force: bool) -> None:  # fmt: skip
    """Disconnect a container, or a network namespace, from a network."""
    client.endpoints.DetachEndpoint(
        endpoint_pb2.DetachEndpointRequest(
            network=network, sandbox=_sandbox(container, netns, pid), allow_missing=force
        )
    )


@group.command()
@click.argument("network", shell_complete=_NETWORK)
@click.option("--label-add", multiple=True, help="KEY=VALUE to set.")
@click.option("--label-rm", multiple=True, help="KEY to remove.")
@click.option("-o", "--opt", multiple=True, help="Driver option KEY=VALUE to change.")
@click.option("--subnet-add", multiple=True, help="A further subnet (CIDR).")
@click.option("--route-add", multiple=True, help="A further route of its endpoints: DESTINATION,GATEWAY.")
@click.option("--route-rm", multiple=True, help="DESTINATION of a route to take away.")
@click.option("--dns-add", multiple=True, help="A name server: [DOMAIN=]ADDRESS[:PORT].")
@click.option("--dns-drop", multiple=True, help="A name server to take away.")
@click.option("--policy-default", multiple=True, help=_DEFAULT)
@pass_client
def update(client: Client, network: str, label_add: tuple[str, ...], label_rm: tuple[str, ...], opt: tuple[str, ...],
           subnet_add: tuple[str, ...], route_add: tuple[str, ...], route_rm: tuple[str, ...],
           dns_add: tuple[str, ...], dns_drop: tuple[str, ...],
           policy_default: tuple[str, ...]) -> None:  # fmt: skip
    """Change a network while it is used."""
    found = client.networks.GetNetwork(network_pb2.GetNetworkRequest(network=network)).network
    labels = {key: value for key, value in found.labels.items() if key not in label_rm}
    spec = network_pb2.NetworkSpec(
        options={**found.spec.options, **key_values(opt, "--opt")},
        ipam=[*found.status.ipam, *(network_pb2.IpamConfig(subnet=subnet) for subnet in subnet_add)],
        dns_servers=[*(server for server in found.spec.dns_servers if server not in dns_drop), *dns_add],
        routes=[*(each for each in found.spec.routes if each.destination not in route_rm), *map(_route, route_add)],
    )
    asked = {"labels": label_add or label_rm, "spec.options": opt, "spec.ipam": subnet_add,
             "spec.dns_servers": dns_add or dns_drop, "spec.routes": route_add or route_rm}  # fmt: skip
    for direction, action in _defaults(policy_default).items():
        setattr(spec, f"policy_{direction}", action)
        asked[f"spec.policy_{direction}"] = policy_default
    mask = FieldMask(paths=[path for path, given in asked.items() if given])
    if not mask.paths:
        raise click.UsageError("nothing to change: give --label-add, --opt, --subnet-add, --dns-add or the like")
    changed = network_pb2.Network(
        id=found.id, etag=found.etag, labels=labels | key_values(label_add, "--label-add"), spec=spec
    )
    client.networks.UpdateNetwork(network_pb2.UpdateNetworkRequest(network=changed, update_mask=mask))
    click.echo(network)


@group.command("rm")
@click.argument("networks", nargs=-1, required=True, shell_complete=_NETWORK)
@click.option("-f", "--force", is_flag=True, help="A missing one is a success.")
@pass_client
def rm(client: Client, networks: tuple[str, ...], force: bool) -> None:
    """Remove networks."""
    with tolerant(client) as attempt:
        for name in networks:
            request = network_pb2.DeleteNetworkRequest(network=name, allow_missing=force)
            if attempt(lambda r=request: client.networks.DeleteNetwork(r)):  # type: ignore[misc]
                click.echo(name)


@group.command()
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.option("--filter", "filters", multiple=True, help="until=, label=, label!=.")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@pass_client
def prune(client: Client, force: bool, filters: tuple[str, ...], dry_run: bool) -> None:
    """Remove networks that nothing is connected to."""
    request = network_pb2.PruneNetworksRequest(filter=filters, dry_run=True)
    unused = list(client.networks.PruneNetworks(request).networks)
    for name in unused:
        click.echo(name)
    if dry_run or not unused or not (force or click.confirm("Remove these networks?", default=False)):
        return
    request.dry_run = False
    removed = client.networks.PruneNetworks(request).networks
    click.echo(f"Removed {len(removed)} network(s)")
