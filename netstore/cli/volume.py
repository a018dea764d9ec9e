"""netstore volume: create, ls, inspect, update, rm, prune."""

from __future__ import annotations

import uuid

import click
from google.protobuf.field_mask_pb2 import FieldMask

from netstore.api.v1 import volume_pb2
from netstore.cli import snapshot
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


@group.command()
@click.argument("name", required=False, default="")
@click.option("-d", "--driver", default="local", show_default=True, help="Driver.")
@click.option("-o", "--opt", multiple=True, help="Driver option KEY=VALUE.")
@click.option("--label", multiple=True, help="KEY=VALUE.")
@click.option("--size", "limit", help="Size limit, such as 10G.")
@pass_client
def create(client: Client, name: str, driver: str, opt: tuple[str, ...], label: tuple[str, ...],
           limit: str | None) -> None:  # fmt: skip
    """Create a volume; without a name, an anonymous one."""
    spec = volume_pb2.VolumeSpec(
        driver=driver, options=key_values(opt, "--opt"), size_bytes=parse_bytes(limit, "--size") if limit else 0
    )
    volume = volume_pb2.Volume(name=name, labels=key_values(label, "--label"), spec=spec)
    request = volume_pb2.CreateVolumeRequest(volume=volume, request_id=str(uuid.uuid4()))
    click.echo(client.volumes.CreateVolume(request).volume.name)


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
@pass_client
def update(client: Client, volume: str, label_add: tuple[str, ...], label_rm: tuple[str, ...]) -> None:
    """Change a volume's labels."""
    found = client.volumes.GetVolume(volume_pb2.GetVolumeRequest(volume=volume)).volume
    labels = {key: value for key, value in found.labels.items() if key not in label_rm}
    labels |= key_values(label_add, "--label-add")
    changed = volume_pb2.Volume(id=found.id, etag=found.etag, labels=labels)
    client.volumes.UpdateVolume(volume_pb2.UpdateVolumeRequest(volume=changed, update_mask=FieldMask(paths=["labels"])))
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
