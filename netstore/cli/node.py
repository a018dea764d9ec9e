"""netstore node: ls, inspect, rm, drain, undrain."""

from __future__ import annotations

import click

from netstore.api.v1 import node_pb2
from netstore.cli.client import Client, pages, pass_client, tolerant
from netstore.cli.commands import Group
from netstore.cli.completion import names
from netstore.cli.format import by_name, listing, name_of, shapes, short_id, show_objects

__all__ = ["group"]

_NODE = names("node")


@click.group("node", cls=Group)
def group() -> None:
    """The machines of the cluster."""


@group.command("ls")
@click.option("-f", "--filter", "filters", multiple=True, help="id=, name=, state=up|down|unknown.")
@shapes
@pass_client
def ls(client: Client, filters: tuple[str, ...], template: str | None, quiet: bool, no_trunc: bool) -> None:
    """List nodes; the one that answers has a star."""
    found = by_name(pages(client.nodes.ListNodes, node_pb2.ListNodesRequest(filter=filters), "nodes"))
    ids = [short_id(node.id, full=no_trunc) for node in found]
    rows = [
        (f"{shown} *" if node.status.self else shown, node.name,
         name_of(node_pb2.NodeState, node.status.state, "NODE_STATE").capitalize(),
         name_of(node_pb2.NodeAvailability, node.status.availability, "NODE_AVAILABILITY").capitalize(),
         node.status.address, str(node.status.endpoint_count), node.status.version)
        for shown, node in zip(ids, found, strict=True)
    ]  # fmt: skip
    headers = ("ID", "NAME", "STATUS", "AVAILABILITY", "ADDRESS", "ENDPOINTS", "VERSION")
    listing(found, headers, rows, template, quiet=quiet, ids=ids)


@group.command()
@click.argument("nodes", nargs=-1, required=True, shell_complete=_NODE)
@click.option("-f", "--format", "template", default="json", help="'json' (default), or a template.")
@pass_client
def inspect(client: Client, nodes: tuple[str, ...], template: str) -> None:
    """Show nodes in full; `self` is the one that answers."""
    with tolerant(client) as attempt:
        found: list[node_pb2.Node] = []
        for name in nodes:
            request = node_pb2.GetNodeRequest(node=name)
            attempt(lambda r=request: found.append(client.nodes.GetNode(r).node))  # type: ignore[misc]
        show_objects(found, template)


@group.command("rm")
@click.argument("nodes", nargs=-1, required=True, shell_complete=_NODE)
@click.option("-f", "--force", is_flag=True, help="Also one that is up; a missing one is a success.")
@pass_client
def rm(client: Client, nodes: tuple[str, ...], force: bool) -> None:
    """Remove nodes that are no more: their names and addresses are free again."""
    with tolerant(client) as attempt:
        for name in nodes:
            request = node_pb2.DeleteNodeRequest(node=name, force=force, allow_missing=force)
            if attempt(lambda r=request: client.nodes.DeleteNode(r)):  # type: ignore[misc]
                click.echo(name)


@group.command()
@click.argument("nodes", nargs=-1, required=True, shell_complete=_NODE)
@pass_client
def drain(client: Client, nodes: tuple[str, ...]) -> None:
    """Let nodes take no new endpoints of networks that span nodes; what is there stays."""
    with tolerant(client) as attempt:
        for name in nodes:
            request = node_pb2.DrainNodeRequest(node=name)
            if attempt(lambda r=request: client.nodes.DrainNode(r)):  # type: ignore[misc]
                click.echo(name)


@group.command()
@click.argument("nodes", nargs=-1, required=True, shell_complete=_NODE)
@pass_client
def undrain(client: Client, nodes: tuple[str, ...]) -> None:
    """Let nodes take new endpoints again."""
    with tolerant(client) as attempt:
        for name in nodes:
            request = node_pb2.UndrainNodeRequest(node=name)
            if attempt(lambda r=request: client.nodes.UndrainNode(r)):  # type: ignore[misc]
                click.echo(name)
