"""netstore volume snapshot: create, ls, inspect, rm, restore; and volume clone."""

from __future__ import annotations

import uuid
from typing import Any

import click

from netstore.api.v1 import snapshot_pb2, volume_pb2
from netstore.cli.client import Client, pages, pass_client, tolerant
from netstore.cli.commands import Command, Group
from netstore.cli.completion import names
from netstore.cli.format import age, listing, shapes, show_objects, size
from netstore.cli.grammar import key_values, parse_bytes

__all__ = ["clone", "group", "split", "tell"]

_VOLUME = names("volume")
_SAID = {
    snapshot_pb2.SNAPSHOT_CONSISTENCY_MOMENT: "of one moment",
    snapshot_pb2.SNAPSHOT_CONSISTENCY_UNUSED: "of a volume that nobody used",
    snapshot_pb2.SNAPSHOT_CONSISTENCY_LIVE: "file by file while it was used: stop what writes, or use the driver image "
    "or btrfs, for one moment",
}


@click.group("snapshot", cls=Group)
def group() -> None:
    """Snapshots of volumes."""


def split(reference: str) -> tuple[str, str]:
    """Return the parts of VOLUME@SNAPSHOT; the second is "" when there is none."""
    volume, _, snapshot = reference.partition("@")
    return volume, snapshot


def split_whole(reference: str) -> tuple[str, str]:
    """Return the parts of VOLUME@SNAPSHOT, both."""
    volume, snapshot = split(reference)
    if not (volume and snapshot):
        raise click.UsageError(f"{reference!r}: write VOLUME@SNAPSHOT")
    return volume, snapshot


@group.command()
@click.argument("volume", shell_complete=_VOLUME)
@click.argument("name", required=False, default="")
@click.option("--label", multiple=True, help="KEY=VALUE.")
@pass_client
def create(client: Client, volume: str, name: str, label: tuple[str, ...]) -> None:
    """Make a snapshot; without a name, one is made from the time."""
    wanted = snapshot_pb2.Snapshot(
        name=name, labels=key_values(label, "--label"), spec=snapshot_pb2.SnapshotSpec(volume=volume)
    )
    request = snapshot_pb2.CreateSnapshotRequest(snapshot=wanted, request_id=str(uuid.uuid4()))
    made = client.snapshots.CreateSnapshot(request).snapshot
    click.echo(f"{made.spec.volume}@{made.name}")
    tell(made.status.consistency, made.status.frozen_time)


def tell(consistency: Any, frozen: Any) -> None:
    """Say on standard error what a copy is of."""
    froze = frozen.ToNanoseconds() / 1e6
    click.echo(f"  {_SAID[consistency]}{f', frozen for {froze:.1f} ms' if froze else ''}", err=True)


@group.command("ls")
@click.argument("volume", required=False, default="", shell_complete=_VOLUME)
@click.option("-f", "--filter", "filters", multiple=True, help="label=, name=, scheduled=.")
@shapes
@pass_client
def ls(
    client: Client, volume: str, filters: tuple[str, ...], template: str | None, quiet: bool, no_trunc: bool
) -> None:
    """List the snapshots of a volume, or all."""
    request = snapshot_pb2.ListSnapshotsRequest(volume=volume, filter=filters)
    found = pages(client.snapshots.ListSnapshots, request, "snapshots")
    rows = [
        (each.spec.volume, each.name, age(each.create_time), size(each.status.size_bytes),
         snapshot_pb2.SnapshotConsistency.Name(each.status.consistency).removeprefix("SNAPSHOT_CONSISTENCY_").lower(),
         "scheduled" if each.status.scheduled else "")
        for each in found
    ]  # fmt: skip
    ids = [f"{each.spec.volume}@{each.name}" for each in found]
    listing(found, ("VOLUME", "SNAPSHOT", "CREATED", "SIZE", "CONSISTENCY", ""), rows, template, quiet=quiet, ids=ids)


@group.command()
@click.argument("snapshots", nargs=-1, required=True)
@click.option("-f", "--format", "template", default="json", help="'json' (default), or a template.")
@pass_client
def inspect(client: Client, snapshots: tuple[str, ...], template: str) -> None:
    """Show snapshots, VOLUME@SNAPSHOT, in full."""
    with tolerant(client) as attempt:
        found: list[snapshot_pb2.Snapshot] = []
        for reference in snapshots:
            volume, snapshot = split_whole(reference)
            request = snapshot_pb2.GetSnapshotRequest(volume=volume, snapshot=snapshot)
            attempt(lambda r=request: found.append(client.snapshots.GetSnapshot(r).snapshot))  # type: ignore[misc]
        show_objects(found, template)


@group.command("rm")
@click.argument("snapshots", nargs=-1, required=True)
@click.option("-f", "--force", is_flag=True, help="A missing one is a success.")
@pass_client
def rm(client: Client, snapshots: tuple[str, ...], force: bool) -> None:
    """Remove snapshots, VOLUME@SNAPSHOT."""
    with tolerant(client) as attempt:
        for reference in snapshots:
            volume, snapshot = split_whole(reference)
            request = snapshot_pb2.DeleteSnapshotRequest(volume=volume, snapshot=snapshot, allow_missing=force)
            if attempt(lambda r=request: client.snapshots.DeleteSnapshot(r)):  # type: ignore[misc]
                click.echo(reference)


@group.command()
@click.argument("snapshot")
@pass_client
def restore(client: Client, snapshot: str) -> None:
    """Make a volume's data that of its snapshot, VOLUME@SNAPSHOT; nobody may use the volume."""
    volume, name = split_whole(snapshot)
    request = snapshot_pb2.RestoreSnapshotRequest(volume=volume, snapshot=name)
    click.echo(client.snapshots.RestoreSnapshot(request).volume.name)


@click.command("clone", cls=Command)
@click.argument("source", shell_complete=_VOLUME)
@click.argument("name")
@click.option("-d", "--driver", help="Driver of the new volume [default: the source's].")
@click.option("-o", "--opt", multiple=True, help="Driver option KEY=VALUE.")
@click.option("--size", "limit", help="Size limit, such as 10G [default: the source's].")
@click.option("--label", multiple=True, help="KEY=VALUE.")
@pass_client
def clone(client: Client, source: str, name: str, driver: str | None, opt: tuple[str, ...], limit: str | None,
          label: tuple[str, ...]) -> None:  # fmt: skip
    """Make a volume with the data of another: VOLUME, or VOLUME@SNAPSHOT."""
    volume, snapshot = split(source)
    wanted = volume_pb2.Volume(name=name, labels=key_values(label, "--label"))
    if driver or opt or limit:
        found = client.volumes.GetVolume(volume_pb2.GetVolumeRequest(volume=volume)).volume.spec
        options = dict(found.options) if driver in (None, found.driver) else {}
        size_bytes = parse_bytes(limit, "--size") if limit else found.size_bytes if not driver else 0
        spec = volume_pb2.VolumeSpec(
            driver=driver or found.driver, options=options | key_values(opt, "--opt"), size_bytes=size_bytes
        )
        wanted.spec.CopyFrom(spec)
    request = snapshot_pb2.CloneVolumeRequest(
        source_volume=volume, source_snapshot=snapshot, volume=wanted, request_id=str(uuid.uuid4())
    )
    made = client.snapshots.CloneVolume(request)
    click.echo(made.volume.name)
    tell(made.consistency, made.frozen_time)
