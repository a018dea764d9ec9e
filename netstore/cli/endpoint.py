"""netstore endpoint: ls, inspect, publish, unpublish, update."""

from __future__ import annotations

import click
from google.protobuf.field_mask_pb2 import FieldMask

from netstore.api.v1 import endpoint_pb2
from netstore.cli.client import Client, pages, pass_client
from netstore.cli.commands import Group
from netstore.cli.format import listing, shapes, short_id, show_objects
from netstore.cli.grammar import bandwidth, key_values, parse_port

__all__ = ["group"]


@click.group("endpoint", cls=Group)
def group() -> None:
    """Attachments of sandboxes to networks."""


@group.command("ls")
@click.option("-f", "--filter", "filters", multiple=True, help="network=, container=, sandbox=, id=, name=, label=.")
@shapes
@pass_client
def ls(client: Client, filters: tuple[str, ...], template: str | None, quiet: bool, no_trunc: bool) -> None:
    """List endpoints."""
    request = endpoint_pb2.ListEndpointsRequest(filter=filters)
    found = pages(client.endpoints.ListEndpoints, request, "endpoints")
    ids = [short_id(endpoint.id, full=no_trunc) for endpoint in found]
    rows = [
        (shown, e.name, e.status.network_name, ", ".join(e.status.addresses), e.status.interface_name,
         e.spec.sandbox.container[:12] or e.spec.sandbox.netns_path)
        for shown, e in zip(ids, found, strict=True)
    ]  # fmt: skip
    headers = ("ENDPOINT ID", "NAME", "NETWORK", "ADDRESSES", "INTERFACE", "SANDBOX")
    listing(found, headers, rows, template, quiet=quiet, ids=ids)


@group.command()
@click.argument("endpoints", nargs=-1, required=True)
@click.option("-f", "--format", "template", default="json", help="'json' (default), or a template.")
@pass_client
def inspect(client: Client, endpoints: tuple[str, ...], template: str) -> None:
    """Show endpoints in full."""
    requests = [endpoint_pb2.GetEndpointRequest(endpoint=each) for each in endpoints]
    show_objects([client.endpoints.GetEndpoint(request).endpoint for request in requests], template)


@group.command()
@click.argument("endpoint")
@click.argument("ports", nargs=-1, required=True)
@click.option("--from", "sources", multiple=True, help="Only these may come (CIDR).")
@click.option("--mesh", is_flag=True, help="Every node of the cluster publishes them.")
@pass_client
def publish(client: Client, endpoint: str, ports: tuple[str, ...], sources: tuple[str, ...], mesh: bool) -> None:
    """Publish ports of an endpoint, a container's or not: [[IP:][HOSTPORT]:]PORT[/tcp|udp|sctp]."""
    wanted = [port for text in ports for port in parse_port(text, sources, mesh=mesh)]
    client.endpoints.PublishPorts(endpoint_pb2.PublishPortsRequest(endpoint=endpoint, ports=wanted))


@group.command()
@click.argument("endpoint")
@click.argument("ports", nargs=-1, required=True)
@pass_client
def unpublish(client: Client, endpoint: str, ports: tuple[str, ...]) -> None:
    """Take published ports of an endpoint back."""
    wanted = [port for text in ports for port in parse_port(text)]
    client.endpoints.UnpublishPorts(endpoint_pb2.UnpublishPortsRequest(endpoint=endpoint, ports=wanted))


@group.command()
@click.argument("endpoint")
@click.option("--bandwidth-in", help="Most that it receives, such as 50mbit; 0 for no limit.")
@click.option("--bandwidth-out", help="Most that it sends.")
@click.option("--label-add", multiple=True, help="KEY=VALUE to set.")
@click.option("--label-rm", multiple=True, help="KEY to remove.")
@pass_client
def update(client: Client, endpoint: str, bandwidth_in: str | None, bandwidth_out: str | None,
           label_add: tuple[str, ...], label_rm: tuple[str, ...]) -> None:  # fmt: skip
    """Change an endpoint while it is attached."""
    found = client.endpoints.GetEndpoint(endpoint_pb2.GetEndpointRequest(endpoint=endpoint)).endpoint
    options = bandwidth(bandwidth_in, bandwidth_out)
    labels = {key: value for key, value in found.labels.items() if key not in label_rm}
    asked = {"spec.options": options, "labels": label_add or label_rm}
    mask = FieldMask(paths=[path for path, given in asked.items() if given])
    if not mask.paths:
        raise click.UsageError("nothing to change: give --bandwidth-in, --bandwidth-out, --label-add or --label-rm")
    changed = endpoint_pb2.Endpoint(
        id=found.id, etag=found.etag, labels=labels | key_values(label_add, "--label-add"),
        spec=endpoint_pb2.EndpointSpec(options={**found.spec.options, **options}),
    )  # fmt: skip
    request = endpoint_pb2.UpdateEndpointRequest(endpoint=changed, update_mask=mask)
    client.endpoints.UpdateEndpoint(request)
    click.echo(endpoint)
