"""netstore volume export and import. Both go on by themselves where the connection was cut."""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import click
import grpc

from netstore.api.v1 import archive_pb2, volume_pb2
from netstore.cli.client import Client, Problem, pass_client
from netstore.cli.commands import Command
from netstore.cli.completion import names
from netstore.cli.format import size
from netstore.cli.grammar import INT32, key_values, parse_bytes
from netstore.cli.snapshot import split, tell

__all__ = ["export", "import_"]

_VOLUME = names("volume")
_CHUNK = 1 << 20
_PATIENCE_SECONDS = 60.0
_COMPRESSIONS = {"zstd": archive_pb2.COMPRESSION_ZSTD, "none": archive_pb2.COMPRESSION_NONE}


@click.command("export", cls=Command)
@click.argument("volume", shell_complete=_VOLUME)
@click.option("-o", "--output", type=click.Path(), help="File, complete or not there [default: standard output].")
@click.option("--compression", type=click.Choice(list(_COMPRESSIONS)), default="zstd", show_default=True)
@click.option("--level", type=INT32, default=0, help="Level of zstd, 1 to 19 [default: 3].")
@pass_client
def export(client: Client, volume: str, output: str | None, compression: str, level: int) -> None:
    """Write a volume, or VOLUME@SNAPSHOT, as a tar archive; its sha256 goes to standard error."""
    if not output and sys.stdout.isatty():
        raise click.UsageError("the archive would go to the terminal: give -o FILE, or redirect standard output")
    name, snapshot = split(volume)
    request = archive_pb2.ExportVolumeRequest(
        volume=name, snapshot=snapshot, compression=_COMPRESSIONS[compression], level=level
    )
    try:
        with _written(output) as target:
            start, end = _receive(client, request, target)
    except OSError as error:
        raise click.UsageError(f"-o {output}: {error.strerror}") from error
    click.echo(f"sha256:{end.sha256} {size(end.size_bytes)} ({size(end.plain_bytes)} unpacked)", err=True)
    tell(start.consistency, start.frozen_time)


@contextmanager
def _written(output: str | None) -> Iterator[BinaryIO]:
    """Open what is written: a file that is not there before it is whole; a pipe or a device as it is."""
    if output is None or (os.path.exists(output) and not os.path.isfile(output)):
        with open(output, "wb") if output else sys.stdout.buffer as target:
            yield target
        return
    part = Path(f"{output}.part")
    try:
        with part.open("wb") as target:
            yield target
            target.flush()
            os.fsync(target.fileno())
        part.rename(output)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _receive(
    client: Client, request: archive_pb2.ExportVolumeRequest, target: BinaryIO
) -> tuple[archive_pb2.ExportStart, archive_pb2.ExportEnd]:
    start = archive_pb2.ExportStart()
    with _bar("Exporting", 0) as advance:
        while True:
            try:
                for response in client.archives.ExportVolume(request):
                    which = response.WhichOneof("response")
                    if which == "chunk":
                        target.write(response.chunk)
                        request.offset += len(response.chunk)
                        advance(len(response.chunk))
                    elif which == "start":
                        start = response.start
                    else:
                        target.flush()
                        return start, response.end
                raise click.ClickException("the stream ended before its end")
            except grpc.RpcError as error:
                if not (start.resumable or not request.offset) or not _is_back(client, error):
                    raise


def _is_back(client: Client, error: grpc.RpcError) -> bool:
    """Wait for a netstored that went away; False when the error is another, or it does not come back."""
    if not Problem.of(error).unreachable:
        return False
    click.echo("netstored went away; waiting for it", err=True)
    try:
        grpc.channel_ready_future(client.channel).result(timeout=_PATIENCE_SECONDS)
    except grpc.FutureTimeoutError:
        return False
    time.sleep(0.1)
    return True


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show how far it is, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total or None)
        yield lambda count: progress.advance(task, count)


@click.command("import", cls=Command)
@click.argument("volume")
@click.argument("file", type=click.Path(), default="-")
@click.option("-d", "--driver", default="", help="Driver of the volume.")
@click.option("-o", "--opt", multiple=True, help="Driver option KEY=VALUE.")
@click.option("--size", "limit", help="Size limit, such as 10G.")
@click.option("--label", multiple=True, help="KEY=VALUE.")
@click.option("--sha256", default="", help="What the archive must have.")
@click.option("--keep-privileges", is_flag=True, help="Keep setuid, setgid, capabilities and devices.")
@click.option("--resume", default="", help="Go on with the upload of this id.")
@pass_client
def import_(client: Client, volume: str, file: str, driver: str, opt: tuple[str, ...], limit: str | None,
            label: tuple[str, ...], sha256: str, keep_privileges: bool, resume: str) -> None:  # fmt: skip
    """Make a volume from a tar archive (plain, gzip, zstd) in a file; - is standard input."""
    spec = volume_pb2.VolumeSpec(
        driver=driver, options=key_values(opt, "--opt"), size_bytes=parse_bytes(limit, "--size") if limit else 0
    )
    start = archive_pb2.ImportVolumeStart(
        volume=volume_pb2.Volume(name=volume, labels=key_values(label, "--label"), spec=spec),
        upload_id=resume or str(uuid.uuid4()), keep_privileges=keep_privileges,
    )  # fmt: skip
    end = archive_pb2.ImportVolumeEnd(sha256=sha256.removeprefix("sha256:"))
    try:
        with sys.stdin.buffer if file == "-" else open(file, "rb") as source:
            made = _send(client, start, end, source, resume=bool(resume))
    except OSError as error:
        raise click.UsageError(f"{file}: {error.strerror}") from error
    click.echo(made.volume.name)


def _send(client: Client, start: archive_pb2.ImportVolumeStart, end: archive_pb2.ImportVolumeEnd, source: BinaryIO, *,
          resume: bool) -> archive_pb2.ImportVolumeResponse:  # fmt: skip
    seekable = source.seekable()
    total = os.fstat(source.fileno()).st_size if seekable else 0
    while True:
        if resume:
            start.offset = _offset(client, start.upload_id)
            source.seek(start.offset)
        try:
            with _bar("Importing", total) as advance:
                advance(start.offset)
                return client.archives.ImportVolume(_requests(start, end, source, advance))
        except grpc.RpcError as error:
            if not seekable or not _is_back(client, error):
                if Problem.of(error).unreachable and seekable:
                    click.echo(f"go on with --resume {start.upload_id}", err=True)
                raise
        resume = True


def _requests(
    start: archive_pb2.ImportVolumeStart,
    end: archive_pb2.ImportVolumeEnd,
    source: BinaryIO,
    advance: Callable[[int], Any],
) -> Iterator[archive_pb2.ImportVolumeRequest]:
    yield archive_pb2.ImportVolumeRequest(start=start)
    while chunk := source.read(_CHUNK):
        yield archive_pb2.ImportVolumeRequest(chunk=chunk)
        advance(len(chunk))
    yield archive_pb2.ImportVolumeRequest(end=end)


def _offset(client: Client, upload_id: str) -> int:
    try:
        request = archive_pb2.GetUploadRequest(upload_id=upload_id)
        return int(client.archives.GetUpload(request).received_bytes)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        return 0
