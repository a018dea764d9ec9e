"""netstore volume cp: `docker cp` for volumes. GNU tar packs and unpacks on this side."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click
import grpc

from netstore.api.v1 import archive_pb2
from netstore.cli.client import Client, pass_client
from netstore.cli.commands import Command

__all__ = ["cp"]

_CHUNK = 1 << 20


@click.command("cp", cls=Command)
@click.argument("source")
@click.argument("target")
@click.option("-a", "--archive", "keep", is_flag=True, help="Keep owners, setuid and the like.")
@pass_client
def cp(client: Client, source: str, target: str, keep: bool) -> None:
    """Copy between a volume and a local path: VOLUME:PATH and PATH, either way; - is a tar on standard input or output.

    As with docker cp: a directory goes into one that exists, and becomes one that does not; DIR/. is what is in it.
    """
    from_volume, to_volume = _split(source), _split(target)
    if bool(from_volume) == bool(to_volume):
        raise click.UsageError("one of the two is VOLUME:PATH, the other a local path")
    if from_volume:
        _out(client, *from_volume, target, keep=keep)
    elif to_volume:
        _in(client, source, *to_volume, keep=keep)


def _split(text: str) -> tuple[str, str] | None:
    """Return the parts of VOLUME:PATH, None for a local path: it begins with / or ., or has no colon."""
    volume, colon, path = text.partition(":")
    return None if not colon or text.startswith(("/", ".")) else (volume, path or "/")


def _out(client: Client, volume: str, path: str, target: str, *, keep: bool) -> None:
    request = archive_pb2.ReadPathRequest(volume=volume, path=path)
    responses = client.archives.ReadPath(request)
    info = next(responses).start
    if target == "-":
        for response in responses:
            sys.stdout.buffer.write(response.chunk)
        sys.stdout.buffer.flush()
        return
    place = Path(target)
    if stat.S_ISDIR(info.mode):
        if place.is_dir() and not path.endswith("/.") and info.name not in ("", "."):
            place = place / info.name
        elif not place.parent.is_dir():
            raise click.UsageError(f"{place.parent} is no directory")
        place.mkdir(exist_ok=True)
        _extract(responses, place, keep=keep)
        return
    final = place / info.name if place.is_dir() else place
    if (target.endswith("/") and not place.is_dir()) or not final.parent.is_dir():
        raise click.UsageError(f"{final.parent if place.is_dir() else place} is no directory")
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".netstore-cp-") as draft:
        _extract(responses, Path(draft), keep=keep)
        os.replace(Path(draft) / info.name, final)


def _extract(responses: Iterator[Any], place: Path, *, keep: bool) -> None:
    owners = ["--same-owner", "--same-permissions"] if keep else ["--no-same-owner", "--no-same-permissions"]
    command = ["tar", "-x", "-C", str(place), "--xattrs", *owners]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as tar:
        assert tar.stdin
        try:
            for response in responses:
                tar.stdin.write(response.chunk)
        except BrokenPipeError:
            pass
        finally:
            tar.stdin.close()
    if tar.returncode:
        raise click.ClickException(f"tar failed with status {tar.returncode}")


def _in(client: Client, source: str, volume: str, path: str, *, keep: bool) -> None:
    start = archive_pb2.WritePathStart(volume=volume, path=path, keep_privileges=keep)
    if source == "-":
        _write(client, start, sys.stdin.buffer)
        return
    local = Path(source)
    if not os.path.lexists(local):
        raise click.UsageError(f"{source}: no such file or directory")
    there = _look(client, volume, path)
    inside = there is not None and stat.S_ISDIR(there.mode)
    owners = [] if keep else ["--owner=0", "--group=0"]
    if local.is_dir() and not local.is_symlink():
        if inside and not source.endswith("/."):
            start.path = f"{path.rstrip('/')}/{local.resolve().name}"
        elif there is not None and not inside:
            raise click.UsageError(f"{volume}:{path} is no directory")
        start.make_directory = True
        command = ["tar", "-c", "--format=posix", "--xattrs", "--sparse", "--numeric-owner", *owners, "-C", source, "."]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as tar:
            assert tar.stdout
            _write(client, start, tar.stdout)
        return
    if path.endswith("/") and not inside:
        raise click.UsageError(f"{volume}:{path} is no directory")
    name = local.name if inside else path.rstrip("/").rpartition("/")[2]
    start.path = path if inside else path.rpartition("/")[0] or "/"
    with _one(local, name, keep=keep) as packed:
        _write(client, start, packed)


def _look(client: Client, volume: str, path: str) -> archive_pb2.PathInfo | None:
    """Return what is at a path, links followed as far as a directory behind them matters; None when nothing is."""
    for suffix in ("/.", ""):
        try:
            request = archive_pb2.GetPathRequest(volume=volume, path=path.rstrip("/") + suffix or "/")
            return client.archives.GetPath(request).info
        except grpc.RpcError as error:
            refused = error.code()
            if refused not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
                raise
            last = error
    if "no such volume" in (last.details() or ""):
        raise last
    return None


@contextmanager
def _one(local: Path, name: str, *, keep: bool) -> Iterator[IO[bytes]]:
    """Give a tar of one file under another name, made while it is read."""
    reading, writing = os.pipe()

    def owned(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uname = info.gname = ""
        if not keep:
            info.uid = info.gid = 0
        return info

    def pack() -> None:
        with os.fdopen(writing, "wb") as pipe, tarfile.open(fileobj=pipe, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            tar.add(local, arcname=name, filter=owned)

    packing = threading.Thread(target=pack, daemon=True)
    packing.start()
    with os.fdopen(reading, "rb") as packed:
        yield packed
    packing.join()


def _write(client: Client, start: archive_pb2.WritePathStart, source: IO[bytes]) -> None:
    def requests() -> Iterator[archive_pb2.WritePathRequest]:
        yield archive_pb2.WritePathRequest(start=start)
        while chunk := source.read(_CHUNK):
            yield archive_pb2.WritePathRequest(chunk=chunk)
        yield archive_pb2.WritePathRequest(end=archive_pb2.WritePathEnd())

    client.archives.WritePath(requests())
