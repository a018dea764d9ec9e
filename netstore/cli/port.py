"""netstore port: ls, publish, unpublish; and docker's `port CONTAINER`."""

from __future__ import annotations

from collections.abc import Iterator

import click

from netstore.api.v1 import common_pb2, endpoint_pb2
from netstore.cli.client import Client, pages, pass_client
from netstore.cli.commands import Command, Group
from netstore.cli.completion import names
from netstore.cli.format import listing, shapes
from netstore.cli.grammar import parse_port

__all__ = ["group", "show", "shown"]

_CONTAINER = names("container")


class _Ports(Group):
    """`netstore port CONTAINER` is `netstore container port CONTAINER`, as docker's."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            return "show", show, args
        return super().resolve_command(ctx, args)


@click.group("port", cls=_Ports)
def group() -> None:
    """Published ports of running containers."""


def shown(port: common_pb2.PortMapping) -> tuple[str, str]:
    """Return a published port as docker shows it: `0.0.0.0:8080`, `80/tcp`; ranges as `8000-8010`."""
    last = max(port.count, 1) - 1
    ends = [f"{number}-{number + last}" if last else str(number) for number in (port.host_port, port.container_port)]
    host = f"[{port.host_ip}]" if ":" in port.host_ip else port.host_ip
    protocol = common_pb2.Protocol.Name(port.protocol).removeprefix("PROTOCOL_").lower()
    return f"{host}:{ends[0]}", f"{ends[1]}/{protocol}"


def _reach(port: common_pb2.PortMapping) -> str:
    """Say who can reach a published port: the widest first, with the address where it is not the one that is shown."""
    shown_ = {shown(port)[0], shown(port)[0].replace("0.0.0.0:", "*:")}
    places: list[str] = []
    for place in port.reach:
        who = "anyone" if "anyone" in place.sources else ", ".join(place.sources).replace("node", "this host")
        if place.address not in shown_ and who != "this host":
            who += f" at {place.address}"
        if who not in places and (who != "this host" or not places):
            places.append(who)
    return "; ".join([*places, *(["on every node"] if port.mesh else [])]) or "nobody"


def _endpoints(client: Client, container: str) -> Iterator[endpoint_pb2.Endpoint]:
    """Yield endpoints with an interface, of one container or of all."""
    if container:
        from netstore.api.v1 import container_pb2

        request = container_pb2.GetContainerRequest(container=container)
        found = [*client.containers.GetContainer(request).container.status.endpoints]
    else:
        found = pages(client.endpoints.ListEndpoints, endpoint_pb2.ListEndpointsRequest(), "endpoints")
    yield from (endpoint for endpoint in found if endpoint.status.addresses)


def _one(client: Client, container: str, network: str) -> endpoint_pb2.Endpoint:
    for endpoint in _endpoints(client, container):
        if network in ("", endpoint.status.network_name):
            return endpoint
    where = f" on network {network}" if network else ""
    raise click.UsageError(f"container {container} has no interface{where} to publish on")


@click.command("port", cls=Command)
@click.argument("container", shell_complete=_CONTAINER)
@click.argument("private", required=False, default="")
@pass_client
def show(client: Client, container: str, private: str) -> None:
    """Show a container's published ports, or those of one PRIVATE port (PORT[/PROTOCOL])."""
    found = [shown(port) for endpoint in _endpoints(client, container) for port in endpoint.status.ports]
    wanted = private if "/" in private or not private else f"{private}/tcp"
    if wanted and wanted not in [inner for _, inner in found]:
        raise click.ClickException(f"no public port {wanted!r} published for {container}")
    for outer, inner in found:
        if wanted in ("", inner):
            click.echo(outer if wanted else f"{inner} -> {outer}")


@group.command("ls")
@click.argument("container", required=False, default="", shell_complete=_CONTAINER)
@shapes
@pass_client
def ls(client: Client, container: str, template: str | None, quiet: bool, no_trunc: bool) -> None:
    """List published ports: who listens where, and who can reach it."""
    found = [(endpoint, port) for endpoint in _endpoints(client, container) for port in endpoint.status.ports]
    rows = [(*shown(port), endpoint.name, endpoint.status.network_name, _reach(port)) for endpoint, port in found]
    headers = ("HOST", "PORT", "NAME", "NETWORK", "REACHABLE FROM")
    listing([port for _, port in found], headers, rows, template, quiet=quiet, ids=[row[0] for row in rows])


@group.command("publish")
@click.argument("container", shell_complete=_CONTAINER)
@click.argument("ports", nargs=-1, required=True)
@click.option("--network", default="", help="Which of its networks; the first by default.")
@click.option("--from", "sources", multiple=True, help="Only these may come (CIDR).")
@click.option("--mesh", is_flag=True, help="Every node of the cluster publishes them.")
@pass_client
def publish(
    client: Client, container: str, ports: tuple[str, ...], network: str, sources: tuple[str, ...], mesh: bool
) -> None:
    """Publish ports of a running container until it stops: [[IP:][HOSTPORT]:]PORT[/tcp|udp|sctp]."""
    endpoint = _one(client, container, network)
    wanted = [port for text in ports for port in parse_port(text, sources, mesh=mesh)]
    before = [port.SerializeToString() for port in endpoint.status.ports]
    request = endpoint_pb2.PublishPortsRequest(endpoint=endpoint.id, ports=wanted)
    for port in client.endpoints.PublishPorts(request).endpoint.status.ports:
        if port.SerializeToString() not in before:
            click.echo(shown(port)[0])


@group.command("unpublish")
@click.argument("container", shell_complete=_CONTAINER)
@click.argument("ports", nargs=-1, required=True)
@pass_client
def unpublish(client: Client, container: str, ports: tuple[str, ...]) -> None:
    """Take published ports of a running container back."""
    wanted = [port for text in ports for port in parse_port(text)]
    for endpoint in _endpoints(client, container):
        client.endpoints.UnpublishPorts(endpoint_pb2.UnpublishPortsRequest(endpoint=endpoint.id, ports=wanted))
