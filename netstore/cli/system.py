"""netstore system: info, check, events, df, backup."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from netstore.api.v1 import common_pb2, system_pb2
from netstore.cli.client import Client, pass_client
from netstore.cli.commands import Group
from netstore.cli.format import listing, name_of, pairs, show_objects, size, to_dict
from netstore.cli.grammar import Moment

__all__ = ["group"]

_NEWEST = (1 << 63) - 1


@click.group("system", cls=Group)
def group() -> None:
    """The node."""


@group.command()
@click.option("-f", "--format", "template", help="'json', or a template.")
@pass_client
def info(client: Client, template: str | None) -> None:
    """Show what the node is and what it can do."""
    found = client.system.GetInfo(system_pb2.GetInfoRequest())
    if template == "json":
        click.echo(json.dumps(to_dict(found), indent=2))
    elif template:
        show_objects([found], template)
    else:
        for key, value in to_dict(found).items():
            if key == "cluster":
                told = found.cluster
                state = name_of(system_pb2.ClusterState, told.state, "CLUSTER_STATE")
                seen = "" if told.state == system_pb2.CLUSTER_STATE_JOINED else " when last seen"
                nodes = f"{told.nodes_up} of {told.nodes} nodes up{seen}"
                click.echo(f"Cluster: {state} as {told.node_name} ({told.address}), {nodes}")
            elif key != "warnings":
                text = " ".join(value) if isinstance(value, list) else str(value)
                click.echo(f"{key.replace('_', ' ').capitalize()}: {text}")
        for warning in found.warnings:
            click.echo(f"WARNING: {warning}", err=True)


@group.command()
@click.option("--repair", is_flag=True, help="Repair what is found.")
@click.option("--format", "template", help="'json', or a template.")
@pass_client
def check(client: Client, repair: bool, template: str | None) -> None:
    """Compare kernel and store; exit status 1 when they differ and that was not repaired."""
    findings = client.system.CheckSystem(system_pb2.CheckSystemRequest(repair=repair)).findings
    if template:
        show_objects(findings, template)
    else:
        for finding in findings:
            click.echo(
                f"{name_of(system_pb2.FindingState, finding.state, 'FINDING_STATE')}: {finding.name}: {finding.detail}"
            )
        if not findings:
            click.echo("kernel and store agree")
    if any(finding.state != system_pb2.FINDING_STATE_REPAIRED for finding in findings):
        sys.exit(1)


@group.command()
@click.option(
    "--since", help="Begin after this revision (0 is the oldest kept), or at a time: RFC 3339, or so long ago: 10m."
)
@click.option("-f", "--filter", "filters", multiple=True, help="type=, event=, id=, name=.")
@click.option("--until-now", is_flag=True, help="End with the newest event there is.")
@click.option("--format", "template", help="'json' (one object a line), or a template.")
@pass_client
def events(client: Client, since: str | None, filters: tuple[str, ...], until_now: bool, template: str | None) -> None:
    """Show changes as they are committed."""
    revision = min(int(since), _NEWEST) if since and since.isdecimal() else None if since is None else 0
    begin = Moment().convert(since, None, None) if since and not since.isdecimal() else 0.0
    newest = client.system.GetInfo(system_pb2.GetInfoRequest()).revision
    until = newest if until_now else None
    ours = [_filter(each) for each in filters]
    request = system_pb2.WatchEventsRequest(filter=ours, revision=revision, until=until)
    for response in client.system.WatchEvents(request):
        event = response.event
        if event.time.ToNanoseconds() / 1e9 < begin:
            continue
        if template == "json":
            click.echo(json.dumps(to_dict(event)))
        elif template:
            show_objects([event], template)
        else:
            kind = name_of(common_pb2.ResourceKind, event.kind, "RESOURCE_KIND")
            attributes = f" ({pairs(event.attributes)})" if event.attributes else ""
            click.echo(
                f"{event.time.ToJsonString()} {event.revision} {kind} {event.action} "
                f"{event.resource_name or event.resource_id[:12]}{attributes}"
            )


def _filter(text: str) -> str:
    """Return a filter with our name of what Docker calls otherwise."""
    key, equals, value = text.partition("=")
    return {"type": "kind", "event": "action"}.get(key, key) + equals + value


@group.command()
@click.option("--format", "template", help="'json', or a template.")
@pass_client
def df(client: Client, template: str | None) -> None:
    """Show what images, containers and volumes hold."""
    entries = client.system.GetDiskUsage(system_pb2.GetDiskUsageRequest()).entries
    rows = []
    for entry in entries:
        share = f" ({100 * entry.reclaimable_bytes // entry.size_bytes}%)" if entry.size_bytes else ""
        kind = name_of(common_pb2.ResourceKind, entry.kind, "RESOURCE_KIND").capitalize() + "s"
        rows.append((kind, str(entry.total), str(entry.active), size(entry.size_bytes),
                     size(entry.reclaimable_bytes) + share))  # fmt: skip
    listing(entries, ("TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"), rows, template, quiet=False, ids=())


@group.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-f", "--force", is_flag=True, help="Replace the file.")
@pass_client
def backup(client: Client, file: Path, force: bool) -> None:
    """Write a consistent copy of the node's database, taken while it runs."""
    if file.exists() and not force:
        raise click.UsageError(f"{file} exists: name another file, or give --force")
    part = file.with_name(f"{file.name}.part")
    try:
        with part.open("wb") as target:
            os.fchmod(target.fileno(), 0o600)
            for response in client.system.BackupStore(system_pb2.BackupStoreRequest()):
                target.write(response.chunk)
            os.fsync(target.fileno())
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)
    click.echo(f"{file}: {size(file.stat().st_size)}")
