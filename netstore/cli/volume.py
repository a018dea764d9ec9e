"""netstore volume: create, ls, inspect, update, rm, prune, attach, detach, mounts, drivers, stage, unstage."""

from __future__ import annotations

import uuid

import click
from google.protobuf.field_mask_pb2 import FieldMask

from netstore.api.v1 import volume_pb2
from netstore.cli import archive, snapshot
from netstore.cli.attach import attach, detach, mounts
from netstore.cli.client import Client, pages, pass_client, tolerant
from netstore.cli.completion import names
from netstore.cli.format import listing, shapes, show_objects, size
from netstore.cli.grammar import key_values, parse_bytes

__all__ = ["group"]

_VOLUME = names("volume")


@click.group("volume")
def group() -> None:
    """Volumes."""


group.add_command(snapshot.group)
group.add_command(snapshot.clone)
for each in (archive.export, archive.import_, attach, detach, mounts):
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
@pass_client
def create(client: Client, name: str, driver: str, opt: tuple[str, ...], label: tuple[str, ...],
           limit: str | None, type_: str, make: str | None) -> None:  # fmt: skip
    """Create a volume; without a name, an anonymous one."""
    options = key_values(opt, "--opt") | ({"format": make} if make else {})
    mode = volume_pb2.VOLUME_MODE_BLOCK if type_ == "block" else volume_pb2.VOLUME_MODE_FILESYSTEM
    spec = volume_pb2.VolumeSpec(
        driver=driver, options=options, size_bytes=parse_bytes(limit, "--size") if limit else 0, mode=mode
    )
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
    """List volumes."""
    found = pages(client.volumes.ListVolumes, volume_pb2.ListVolumesRequest(filter=filters), "volumes")
    rows = [(volume.spec.driver, volume.name) for volume in found]
    listing(found, ("DRIVER", "VOLUME NAME"), rows, template, quiet=quiet, ids=[volume.name for volume in found])


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
@pass_client
def update(
    client: Client, volume: str, label_add: tuple[str, ...], label_rm: tuple[str, ...], limit: str | None
) -> None:
    """Change a volume's labels or its size."""
    found = client.volumes.GetVolume(volume_pb2.GetVolumeRequest(volume=volume)).volume
    changed, paths = volume_pb2.Volume(id=found.id, etag=found.etag), []
    if label_add or label_rm or not limit:
        labels = {key: value for key, value in found.labels.items() if key not in label_rm}
        changed.labels.update(labels | key_values(label_add, "--label-add"))
        paths.append("labels")
    if limit:
        changed.spec.size_bytes = parse_bytes(limit, "--size")
        paths.append("spec.size_bytes")
    client.volumes.UpdateVolume(volume_pb2.UpdateVolumeRequest(volume=changed, update_mask=FieldMask(paths=paths)))
    click.echo(volume)


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


@group.command("rm")
@click.argument("volumes", nargs=-1, required=True, shell_complete=_VOLUME)
@click.option("-f", "--force", is_flag=True, help="A missing one is a success.")
@pass_client
def rm(client: Client, volumes: tuple[str, ...], force: bool) -> None:
    """Remove volumes and their data."""
    with tolerant(client) as attempt:
        for name in volumes:
            request = volume_pb2.DeleteVolumeRequest(volume=name, allow_missing=force)
            if attempt(lambda r=request: client.volumes.DeleteVolume(r)):  # type: ignore[misc]
                click.echo(name)


@group.command()
@click.option("-a", "--all", "all_", is_flag=True, help="Named volumes too, not only anonymous ones.")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.option("--filter", "filters", multiple=True, help="label=, label!=.")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@pass_client
def prune(client: Client, all_: bool, force: bool, filters: tuple[str, ...], dry_run: bool) -> None:
    """Remove volumes that no container mounts."""
    request = volume_pb2.PruneVolumesRequest(filter=filters, all=all_, dry_run=True)
    preview = client.volumes.PruneVolumes(request)
    for name in preview.volumes:
        click.echo(name)
    if dry_run or not preview.volumes:
        return
    if not force and not click.confirm(f"Remove these volumes ({size(preview.reclaimed_bytes)})?", default=False):
        return
    request.dry_run = False
    click.echo(f"Total reclaimed space: {size(client.volumes.PruneVolumes(request).reclaimed_bytes)}")
