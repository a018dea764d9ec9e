"""netstore service: create, ls, inspect, update, rm."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from typing import Any

import click
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from netstore.api.v1 import common_pb2, service_pb2
from netstore.cli.client import Client, pages, pass_client, tolerant
from netstore.cli.commands import Group
from netstore.cli.completion import names
from netstore.cli.format import by_name, listing, name_of, shapes, short_id, show_objects
from netstore.cli.grammar import Period, parse_port

__all__ = ["group"]

_SERVICE = names("service")
_MODES = {"vip": service_pb2.ENDPOINT_MODE_VIP, "dnsrr": service_pb2.ENDPOINT_MODE_DNSRR}
_HEALTH = re.compile(r"tcp:(\d{1,5})|http:(\d{1,5})(/\S*)?")


@click.group("service", cls=Group)
def group() -> None:
    """One name and address for several endpoints of a network."""


def _ports(texts: Sequence[str], flag: str) -> list[service_pb2.ServicePort]:
    return [port for text in texts for mapping in parse_port(text) for port in _service_ports(mapping, text, flag)]


def _service_ports(mapping: common_pb2.PortMapping, text: str, flag: str) -> list[service_pb2.ServicePort]:
    if not mapping.host_port or mapping.host_port_last or mapping.host_ip or mapping.sources:
        raise click.UsageError(f"{flag}: {text!r}: write PORT:TARGET[/tcp|udp|sctp]; it is the port of every node")
    return [
        service_pb2.ServicePort(
            published_port=mapping.host_port + each, target_port=mapping.container_port + each,
            protocol=mapping.protocol,
        )
        for each in range(max(mapping.count, 1))
    ]  # fmt: skip


def _check(text: str | None, interval: Duration | None, timeout: Duration | None, retries: int | None,
           present: service_pb2.HealthCheck | None = None) -> service_pb2.HealthCheck | None:  # fmt: skip
    """Return the health check that flags ask for, beginning with the present one; None when they ask for none."""
    check = service_pb2.HealthCheck()
    if present:
        check.CopyFrom(present)
    if text is not None:
        match = _HEALTH.fullmatch(text)
        if match is None:
            raise click.UsageError(f"--health: {text!r}: write tcp:PORT or http:PORT[/PATH]")
        check.protocol = service_pb2.HEALTH_PROTOCOL_TCP if match[1] else service_pb2.HEALTH_PROTOCOL_HTTP
        check.port, check.path = int(match[1] or match[2]), match[3] or ""
    elif interval or timeout or retries is not None:
        if not present:
            raise click.UsageError("--health-interval, --health-timeout and --health-retries go with --health")
    else:
        return None
    if interval:
        check.interval.CopyFrom(interval)
    if timeout:
        check.timeout.CopyFrom(timeout)
    check.retries = check.retries if retries is None else retries
    return check


def _health_flags(command: Any) -> Any:
    """Add Docker's flags of a health check, besides what it asks."""
    for flag, type_, text in (
        (
            "--health-retries",
            click.IntRange(0, 1000),
            "Failures in a row that make an endpoint unhealthy [default: 3].",
        ),
        ("--health-timeout", Period(), "How long an answer may take [default: 30s]."),
        ("--health-interval", Period(), "Time between two checks [default: 30s]; until the first success it is 1s."),
        ("--health", str, "tcp:PORT or http:PORT[/PATH]: who does not answer gets no connections."),
    ):
        command = click.option(flag, type=type_, help=text)(command)
    return command


@group.command()
@click.argument("name")
@click.option("--network", required=True, help="The network that it is on.", shell_complete=names("network"))
@click.option("-l", "--label", "selector", multiple=True, required=True,
              help="KEY[=VALUE] that its endpoints have; repeated: all of them.")  # fmt: skip
@click.option(
    "-p", "--publish", multiple=True, help="PORT:TARGET[/tcp|udp|sctp]: a port of every node that leads to it."
)
@click.option("--endpoint-mode", "--mode", "mode", type=click.Choice([*_MODES]), default="vip", show_default=True,
              help="The name means a virtual address, or the endpoints' addresses in turn.")  # fmt: skip
@_health_flags
@pass_client
def create(client: Client, name: str, network: str, selector: tuple[str, ...], publish: tuple[str, ...], mode: str,
           health: str | None, health_interval: Duration | None, health_timeout: Duration | None,
           health_retries: int | None) -> None:  # fmt: skip
    """Balance a name over the endpoints of a network that have some labels."""
    spec = service_pb2.ServiceSpec(
        network=network, selector=selector, mode=_MODES[mode], ports=_ports(publish, "--publish"),
        health=_check(health, health_interval, health_timeout, health_retries),
    )  # fmt: skip
    service = service_pb2.Service(name=name, spec=spec)
    request = service_pb2.CreateServiceRequest(service=service, request_id=str(uuid.uuid4()))
    click.echo(client.services.CreateService(request).service.id)


@group.command()
@click.argument("service", shell_complete=_SERVICE)
@click.option("--label-add", multiple=True, help="KEY[=VALUE] that its endpoints must have, too.")
@click.option("--label-rm", multiple=True, help="KEY[=VALUE] that they need not have any more.")
@click.option("--publish-add", multiple=True, help="PORT:TARGET[/tcp|udp|sctp] to publish.")
@click.option("--publish-rm", multiple=True, help="The same, or PORT: not to publish any more.")
@click.option("--no-healthcheck", is_flag=True, help="Every attached endpoint gets connections.")
@_health_flags
@pass_client
def update(client: Client, service: str, label_add: tuple[str, ...], label_rm: tuple[str, ...],
           publish_add: tuple[str, ...], publish_rm: tuple[str, ...], *, no_healthcheck: bool, health: str | None,
           health_interval: Duration | None, health_timeout: Duration | None,
           health_retries: int | None) -> None:  # fmt: skip
    """Change a service; connections that there are go on."""
    found = client.services.GetService(service_pb2.GetServiceRequest(service=service)).service
    spec, present = service_pb2.ServiceSpec(), found.spec.health if found.spec.HasField("health") else None
    check = _check(health, health_interval, health_timeout, health_retries, present)
    if check and no_healthcheck:
        raise click.UsageError("--no-healthcheck goes with no other flag of health")
    if check:
        spec.health.CopyFrom(check)
    spec.selector.extend(each for each in found.spec.selector if each not in label_rm)
    spec.selector.extend(label_add)
    unwanted = {_place(port) for text in publish_rm for port in _unpublished(text)}
    spec.ports.extend(port for port in found.spec.ports if _place(port) not in unwanted)
    spec.ports.extend(_ports(publish_add, "--publish-add"))
    asked = {"spec.selector": label_add or label_rm, "spec.ports": publish_add or publish_rm,
             "spec.health": check or no_healthcheck}  # fmt: skip
    mask = FieldMask(paths=[path for path, given in asked.items() if given])
    if not mask.paths:
        raise click.UsageError("nothing to change: give a flag of labels, of published ports or of health")
    changed = service_pb2.Service(id=found.id, etag=found.etag, spec=spec)
    client.services.UpdateService(service_pb2.UpdateServiceRequest(service=changed, update_mask=mask))
    click.echo(service)


def _unpublished(text: str) -> list[service_pb2.ServicePort]:
    port, slash, protocol = text.partition("/")
    return _ports([text if ":" in port else f"{port}:{port}{slash}{protocol}"], "--publish-rm")


def _place(port: service_pb2.ServicePort) -> tuple[int, int]:
    return port.published_port, port.protocol


def _shown(port: service_pb2.ServicePort) -> str:
    protocol = name_of(common_pb2.Protocol, port.protocol, "PROTOCOL")
    return f"*:{port.published_port}->{port.target_port}/{protocol}"


@group.command("ls")
@click.option("-f", "--filter", "filters", multiple=True, help="network=, id=, name=, label=, mode=.")
@shapes
@pass_client
def ls(client: Client, filters: tuple[str, ...], template: str | None, quiet: bool, no_trunc: bool) -> None:
    """List services, with how many of their endpoints get connections."""
    found = by_name(pages(client.services.ListServices, service_pb2.ListServicesRequest(filter=filters), "services"))
    ids = [short_id(service.id, full=no_trunc) for service in found]
    rows = [
        (shown, s.name, s.spec.network, name_of(service_pb2.EndpointMode, s.spec.mode, "ENDPOINT_MODE"),
         ",".join(s.spec.selector), f"{sum(each.healthy for each in s.status.endpoints)}/{len(s.status.endpoints)}",
         ",".join(s.status.addresses), ",".join(map(_shown, s.spec.ports)))
        for shown, s in zip(ids, found, strict=True)
    ]  # fmt: skip
    headers = ("ID", "NAME", "NETWORK", "MODE", "LABELS", "HEALTHY", "ADDRESS", "PORTS")
    listing(found, headers, rows, template, quiet=quiet, ids=ids)


@group.command()
@click.argument("services", nargs=-1, required=True, shell_complete=_SERVICE)
@click.option("-f", "--format", "template", default="json", help="'json' (default), or a template.")
@pass_client
def inspect(client: Client, services: tuple[str, ...], template: str) -> None:
    """Show services in full, with their endpoints."""
    with tolerant(client) as attempt:
        found: list[service_pb2.Service] = []
        for name in services:
            request = service_pb2.GetServiceRequest(service=name)
            attempt(lambda r=request: found.append(client.services.GetService(r).service))  # type: ignore[misc]
        show_objects(found, template)


@group.command("rm")
@click.argument("services", nargs=-1, required=True, shell_complete=_SERVICE)
@click.option("-f", "--force", is_flag=True, help="A missing one is a success.")
@pass_client
def rm(client: Client, services: tuple[str, ...], force: bool) -> None:
    """Remove services; their endpoints stay."""
    with tolerant(client) as attempt:
        for name in services:
            request = service_pb2.DeleteServiceRequest(service=name, allow_missing=force)
            if attempt(lambda r=request: client.services.DeleteService(r)):  # type: ignore[misc]
                click.echo(name)
