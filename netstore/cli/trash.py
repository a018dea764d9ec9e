"""netstore volume trash: ls, restore, empty."""

from __future__ import annotations

from typing import Any

import click

from netstore.api.v1 import volume_pb2
from netstore.cli.client import Client, pages, pass_client
from netstore.cli.commands import Group
from netstore.cli.format import age, duration, listing, shapes, short_id
from netstore.cli.grammar import Period

__all__ = ["group", "period"]


def period(command: Any) -> Any:
    """Add --trash to a command that removes volumes."""
    text = "Keep them in the trash so long, such as 24h; 0 removes for good [default: netstored's configuration]."
    return click.option("--trash", "period", type=Period(), help=text)(command)


@click.group("trash", cls=Group)
def group() -> None:
    """Volumes that were removed and can come back."""


@group.command("ls")
@shapes
@pass_client
def ls(client: Client, template: str | None, quiet: bool, no_trunc: bool) -> None:
    """List what is in the trash, the oldest removal first."""
    found = pages(client.volumes.ListTrashedVolumes, volume_pb2.ListTrashedVolumesRequest(), "volumes")
    rows = [
        (each.volume.name, short_id(each.volume.id, full=no_trunc), each.volume.spec.driver, age(each.remove_time),
         duration((each.expire_time.ToNanoseconds() - each.remove_time.ToNanoseconds()) / 1e9))
        for each in found
    ]  # fmt: skip
    ids = [short_id(each.volume.id, full=no_trunc) for each in found]
    listing(found, ("VOLUME NAME", "ID", "DRIVER", "REMOVED", "KEPT FOR"), rows, template, quiet=quiet, ids=ids)


@group.command()
@click.argument("volume")
@click.argument("name", required=False, default="")
@pass_client
def restore(client: Client, volume: str, name: str) -> None:
    """Bring a volume back, with its snapshots; under another NAME if its own is taken."""
    request = volume_pb2.RestoreTrashedVolumeRequest(volume=volume, name=name)
    click.echo(client.volumes.RestoreTrashedVolume(request).volume.name)


@group.command()
@click.argument("volumes", nargs=-1)
@pass_client
def empty(client: Client, volumes: tuple[str, ...]) -> None:
    """Remove volumes in the trash for good; without names, all."""
    for name in client.volumes.EmptyTrash(volume_pb2.EmptyTrashRequest(volumes=volumes)).volumes:
        click.echo(name)
