"""netstore volume: create, ls, inspect, update, rm, prune, attach, detach, mounts, drivers, stage, unstage, trim."""

from __future__ import annotations

import sys
import uuid

import click
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from netstore.api.v1 import volume_pb2
from netstore.cli import archive, copy, look, snapshot, trash
from netstore.cli.attach import attach, detach, mounts
from netstore.cli.client import Client, pages, pass_client, tolerant
from netstore.cli.commands import Group
from netstore.cli.completion import names
from netstore.cli.format import by_name, listing, shapes, show_objects, size
from netstore.cli.grammar import INT32, key_values, parse_bytes

__all__ = ["group"]

_VOLUME = names("volume")


@click.group("volume", cls=Group)
def group() -> None:
    """Volumes."""


group.add_command(snapshot.group)
group.add_command(snapshot.clone)
group.add_command(trash.group)
for each in (archive.export, archive.import_, copy.cp, look.stats, look.verify, attach, detach, mounts):
    group.add_command(each)


@group.command()
@click.argument("name", required=False, default="")
@click.option("-d", "--driver", default="", help="Driver [default: local, or what holds the size].")
@click.option("-o", "--opt", multiple=True, help="Driver option KEY=VALUE.")
@click.option("--label", multiple=True, help="KEY=VALUE.")
@click.option("--size", "limit", help="Size limit, such as 10G.")
@click.option(
    "--type", "type_", type=click.Choice(["mount", "block"]), default="mount", help="A filesystem, or a device."
)
@click.option(
    "--format", "make", type=click.Choice(["ext4", "xfs", "btrfs"]), help="Make a filesystem on a blank device."
)
@click.option("--snapshot-schedule", default="", help='@hourly, @daily, "@every 15m", or five fields of cron (UTC).')
@click.option("--keep", type=INT32, default=0, help="Snapshots of the schedule to keep [default: 24].")
@pass_client
def create(client: Client, name: str, driver: str, opt: tuple[str, ...], label: tuple[str, ...], limit: str | None,
           type_: str, make: str | None, snapshot_schedule: str, keep: int) -> None:  # fmt: skip
    """Create a volume; without a name, an anonymous one."""
    options = key_values(opt, "--opt") | ({"format": make} if make else {})
    mode = volume_pb2.VOLUME_MODE_BLOCK if type_ == "block" else volume_pb2.VOLUME_MODE_FILESYSTEM
    spec = volume_pb2.VolumeSpec(
        driver=driver, options=options, size_bytes=parse_bytes(limit, "--size") if limit else 0, mode=mode,
        snapshot_schedule=snapshot_schedule, snapshot_keep=keep,
    )  # fmt: skip
    volume = volume_pb2.Volume(name=name, labels=key_values(label, "--label"), spec=spec)
    request = volume_pb2.CreateVolumeRequest(volume=volume, request_id=str(uuid.uuid4()))
    made = client.volumes.CreateVolume(request).volume
    click.echo(made.name)
    if limit and not driver:
        click.echo(f"{limit} held by {made.status.size_enforcement} (driver {made.spec.driver})", err=True)


@group.command("ls")
@click.option("-f", "--filter", "filters", multiple=True, help="driver=, label=, name=, dangling=.")
@shapes
@pass_client
def ls(client: Client, filters: tuple[str, ...], template: str | None, quiet: bool, no_trunc: bool) -> None:
    """List volumes: sizes and inodes as far as they are known without a walk through directories."""
    found = by_name(pages(client.volumes.ListVolumes, volume_pb2.ListVolumesRequest(filter=filters), "volumes"))
    rows = [] if quiet or template else [_row(volume) for volume in found]
    headers = ("DRIVER", "VOLUME NAME", "SIZE", "USED", "INODES", "CONTAINERS")
    listing(found, headers, rows, template, quiet=quiet, ids=[volume.name for volume in found])


def _row(volume: volume_pb2.Volume) -> tuple[str, ...]:
    status = volume.status
    limit = status.capacity_bytes or volume.spec.size_bytes
    return (
        volume.spec.driver,
        volume.name,
        size(limit) if limit else "-",
        size(status.used_bytes) if status.HasField("used_bytes") else "-",
        str(status.used_inodes) if status.HasField("used_inodes") else "-",
        ", ".join(status.containers) or "-",
    )


@group.command()
@click.argument("volumes", nargs=-1, required=True, shell_complete=_VOLUME)
@click.option("-f", "--format", "template", default="json", help="'json' (default), or a template.")
@pass_client
def inspect(client: Client, volumes: tuple[str, ...], template: str) -> None:
    """Show volumes in full."""
    with tolerant(client) as attempt:
        found: list[volume_pb2.Volume] = []
        for name in volumes:
            request = volume_pb2.GetVolumeRequest(volume=name)
            attempt(lambda r=request: found.append(client.volumes.GetVolume(r).volume))  # type: ignore[misc]
        show_objects(found, template)


@group.command()
@click.argument("volume", shell_complete=_VOLUME)
@click.option("--label-add", multiple=True, help="KEY=VALUE to set.")
@click.option("--label-rm", multiple=True, help="KEY to remove.")
@click.option("--size", "limit", help="New size limit, such as 20G; the volume may be in use.")
@click.option("-o", "--opt", multiple=True, help="Option of mounting, KEY=VALUE; KEY= removes it. Not while used.")
@click.option("--snapshot-schedule", help="When snapshots are made; '' for never.")
@click.option("--keep", type=INT32, help="Snapshots of the schedule to keep.")
@pass_client
def update(client: Client, volume: str, label_add: tuple[str, ...], label_rm: tuple[str, ...], limit: str | None,
           opt: tuple[str, ...], snapshot_schedule: str | None, keep: int | None) -> None:  # fmt: skip
    """Change labels, size, options or schedule of a volume."""
    found = client.volumes.GetVolume(volume_pb2.GetVolumeRequest(volume=volume)).volume
    changed, paths = volume_pb2.Volume(id=found.id, etag=found.etag, spec=found.spec), []
    if label_add or label_rm:
        labels = {key: value for key, value in found.labels.items() if key not in label_rm}
        changed.labels.update(labels | key_values(label_add, "--label-add"))
        paths.append("labels")
    if limit:
        changed.spec.size_bytes = parse_bytes(limit, "--size")
        paths.append("spec.size_bytes")
    for key, value in key_values(opt, "--opt").items():
        changed.spec.options[key] = value
        if not value:
            del changed.spec.options[key]
        paths.append("spec.options")
    if snapshot_schedule is not None:
        changed.spec.snapshot_schedule = snapshot_schedule
        paths.append("spec.snapshot_schedule")
    if keep is not None:
        changed.spec.snapshot_keep = keep
        paths.append("spec.snapshot_keep")
    if not paths:
        raise click.UsageError("say what to change: labels, --size, --opt, --snapshot-schedule or --keep")
    mask = FieldMask(paths=sorted(set(paths)))
    client.volumes.UpdateVolume(volume_pb2.UpdateVolumeRequest(volume=changed, update_mask=mask))
    click.echo(volume)


@group.command()
@click.argument("volume", shell_complete=_VOLUME)
@click.argument("name")
@pass_client
def rename(client: Client, volume: str, name: str) -> None:
    """Give a volume another name; what is mounted stays so."""
    request = volume_pb2.RenameVolumeRequest(volume=volume, name=name)
    click.echo(client.volumes.RenameVolume(request).volume.name)


@group.command()
@shapes
@pass_client
def drivers(client: Client, template: str | None, quiet: bool, no_trunc: bool) -> None:
    """Show what the volume drivers can on this node."""
    found = client.volumes.ListVolumeDrivers(volume_pb2.ListVolumeDriversRequest()).drivers
    names = volume_pb2.VolumeCapability.Name
    rows = [
        (
            driver.name,
            ", ".join(names(each).removeprefix("VOLUME_CAPABILITY_").lower() for each in driver.capabilities) or "-",
            ", ".join(option.key for option in driver.options) or "-",
            driver.unavailable or (driver.no_size and f"no sizes: {driver.no_size}") or "ready",
        )
        for driver in found
    ]
    headers = ("DRIVER", "CAPABILITIES", "OPTIONS", "HERE")
    listing(found, headers, rows, template, quiet=quiet, ids=[driver.name for driver in found])


@group.command()
@click.argument("volume", shell_complete=_VOLUME)
@click.argument("holder")
@pass_client
def stage(client: Client, volume: str, holder: str) -> None:
    """Keep a volume mounted on the node for HOLDER, over restarts; prints where."""
    request = volume_pb2.StageVolumeRequest(volume=volume, holder=holder)
    click.echo(client.volumes.StageVolume(request).volume.status.mountpoint)


@group.command()
@click.argument("volume", shell_complete=_VOLUME)
@click.argument("holder")
@pass_client
def unstage(client: Client, volume: str, holder: str) -> None:
    """Take HOLDER's hold back; after the last the volume is unmounted."""
    client.volumes.UnstageVolume(volume_pb2.UnstageVolumeRequest(volume=volume, holder=holder))
    click.echo(volume)


@group.command()
@click.argument("volumes", nargs=-1, required=True, shell_complete=_VOLUME)
@pass_client
def trim(client: Client, volumes: tuple[str, ...]) -> None:
    """Give blocks that volumes no longer use back to the node (sparse images), or to the disk."""
    with tolerant(client) as attempt:
        for name in volumes:
            request = volume_pb2.TrimVolumeRequest(volume=name)
            attempt(lambda r=request: click.echo(f"{r.volume}: {size(client.volumes.TrimVolume(r).trimmed_bytes)}"))  # type: ignore[misc]


@group.command("rm")
@click.argument("volumes", nargs=-1, required=True, shell_complete=_VOLUME)
@click.option("-f", "--force", is_flag=True, help="A missing one is a success.")
@trash.period
@pass_client
def rm(client: Client, volumes: tuple[str, ...], force: bool, period: Duration | None) -> None:
    """Remove volumes, their snapshots and their data."""
    with tolerant(client) as attempt:
        for name in volumes:
            request = volume_pb2.DeleteVolumeRequest(volume=name, allow_missing=force, trash_period=period)
            if attempt(lambda r=request: client.volumes.DeleteVolume(r)):  # type: ignore[misc]
                click.echo(name)


@group.command()
@click.option("-a", "--all", "all_", is_flag=True, help="Named volumes too, not only anonymous ones.")
@click.option("-f", "--force", is_flag=True, help="Do it, without asking.")
@click.option("--filter", "filters", multiple=True, help="label=, label!=.")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@trash.period
@pass_client
def prune(client: Client, all_: bool, force: bool, filters: tuple[str, ...], dry_run: bool,
          period: Duration | None) -> None:  # fmt: skip
    """Show what no container mounts, and remove it when told so."""
    request = volume_pb2.PruneVolumesRequest(filter=filters, all=all_, dry_run=True, trash_period=period)
    preview = client.volumes.PruneVolumes(request)
    rows = [(each.name, size(each.size_bytes)) for each in preview.pruned]
    if rows:
        listing(preview.pruned, ("VOLUME NAME", "SIZE"), rows, None, quiet=False, ids=())
    if not rows:
        click.echo("Nothing to remove" if all_ else "Nothing to remove: no anonymous volume (--all: named ones too)")
    if dry_run or not rows:
        return
    if not force and not sys.stdin.isatty():
        click.echo(f"Nothing is removed yet: --force does it ({size(preview.reclaimed_bytes)})", err=True)
        return
    if not force and not click.confirm(f"Remove these volumes ({size(preview.reclaimed_bytes)})?", default=False):
        return
    request.dry_run = False
    request.volume_ids.extend(each.id for each in preview.pruned)  # and no others
    click.echo(f"Total reclaimed space: {size(client.volumes.PruneVolumes(request).reclaimed_bytes)}")
