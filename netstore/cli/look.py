"""netstore volume stats and verify."""

from __future__ import annotations

import sys
import time

import click

from netstore.api.v1 import archive_pb2, volume_pb2
from netstore.cli.client import Client, pages, pass_client
from netstore.cli.commands import Command
from netstore.cli.completion import names
from netstore.cli.format import listing, size
from netstore.cli.snapshot import split

__all__ = ["stats", "verify"]

_VOLUME = names("volume")
_HEADERS = ("VOLUME NAME", "USED", "SIZE", "USED %", "INODES", "CHANGE")
_SECONDS = 2.0


@click.command(cls=Command)
@click.argument("volumes", nargs=-1, shell_complete=_VOLUME)
@click.option("--no-stream", is_flag=True, help="Once, not until it is interrupted.")
@pass_client
def stats(client: Client, volumes: tuple[str, ...], no_stream: bool) -> None:
    """Show what volumes hold, and how that changes; those of which it is known without a walk through directories."""
    before: dict[str, tuple[float, int]] = {}
    while True:
        found = _found(client, volumes)
        rows = [_row(volume, before) for volume in found]
        if not no_stream and sys.stdout.isatty():
            click.echo("\033[H\033[J", nl=False)
        listing(found, _HEADERS, rows, None, quiet=False, ids=())
        if no_stream:
            return
        before = {volume.id: (time.monotonic(), volume.status.used_bytes) for volume in found}
        time.sleep(_SECONDS)


def _found(client: Client, volumes: tuple[str, ...]) -> list[volume_pb2.Volume]:
    if volumes:
        requests = [volume_pb2.GetVolumeRequest(volume=name) for name in volumes]
        return [client.volumes.GetVolume(request).volume for request in requests]
    found = pages(client.volumes.ListVolumes, volume_pb2.ListVolumesRequest(), "volumes")
    return [volume for volume in found if volume.status.HasField("used_bytes")]


def _row(volume: volume_pb2.Volume, before: dict[str, tuple[float, int]]) -> tuple[str, ...]:
    status = volume.status
    known, limit = status.HasField("used_bytes"), status.capacity_bytes or volume.spec.size_bytes
    change = ""
    if volume.id in before:
        moment, used = before[volume.id]
        rate = (status.used_bytes - used) / max(time.monotonic() - moment, 1e-3)
        change = f"{'-' if rate < 0 else '+'}{size(abs(rate))}/s"
    return (
        volume.name,
        size(status.used_bytes) if known else "-",
        size(limit) if limit else "-",
        f"{100 * status.used_bytes / limit:.0f}" if known and limit else "-",
        str(status.used_inodes) if status.HasField("used_inodes") else "-",
        change or "-",
    )


@click.command(cls=Command)
@click.argument("volume", shell_complete=_VOLUME)
@pass_client
def verify(client: Client, volume: str) -> None:
    """Check the data of a volume, or VOLUME@SNAPSHOT, and say what was checked. Status 1 when something is wrong."""
    name, snapshot = split(volume)
    found = client.archives.VerifyVolume(archive_pb2.VerifyVolumeRequest(volume=name, snapshot=snapshot))
    for check in found.checks:
        click.echo(f"done: {check}{f' ({size(found.read_bytes)})' if 'read' in check and 'file' in check else ''}")
    for problem in found.problems:
        click.echo(f"wrong: {problem}")
    if found.problems:
        sys.exit(1)
    click.echo(f"{volume}: nothing wrong")
