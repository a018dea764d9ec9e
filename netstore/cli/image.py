"""netstore image: pull, import, load, ls, inspect, rm."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import click

from netstore.api.v1 import image_pb2
from netstore.cli.client import Client, pages, pass_client, tolerant
from netstore.cli.commands import Group
from netstore.cli.completion import names
from netstore.cli.format import age, listing, shapes, short_id, show_objects, size
from netstore.cli.grammar import key_values

__all__ = ["group"]

_CHUNK = 512 * 1024
_IMAGE = names("image")


@click.group("image", cls=Group)
def group() -> None:
    """Images."""


@group.command("pull")
@click.argument("name")
@click.option("-u", "--username", default="", help="Log in to the registry; the password is read from standard input.")
@click.option("-q", "--quiet", is_flag=True, help="Print the name alone.")
@pass_client
def pull_(client: Client, name: str, username: str, quiet: bool) -> None:
    """Fetch an image from its registry, Docker Hub where NAME has none."""
    password = click.prompt("Password", hide_input=True, err=True, default="", show_default=False) if username else ""
    image = pull(client, name, username=username, password=password, quiet=quiet)
    click.echo(image.name)


def pull(client: Client, name: str, *, username: str = "", password: str = "", quiet: bool = False) -> image_pb2.Image:
    """Fetch an image, showing what is done on standard error."""
    request = image_pb2.PullImageRequest(image=name, username=username, password=password)
    for response in client.images.PullImage(request):
        if response.WhichOneof("response") == "image":
            return response.image
        if not quiet:
            click.echo(response.progress, err=True)
    raise click.ClickException(f"netstored ended without saying what became of {name}")


@group.command("import")
@click.argument("file", type=click.Path())
@click.argument("name", required=False, default="")
@click.option("--cmd", help="Command: words, or a JSON array.")
@click.option("--entrypoint", help="Entrypoint: words, or a JSON array.")
@click.option("-e", "--env", multiple=True, help="KEY=VALUE.")
@click.option("-w", "--workdir", default="", help="Working directory.")
@click.option("-u", "--user", default="", help="USER[:GROUP].")
@click.option("--expose", multiple=True, help="PORT[/PROTOCOL].")
@click.option("--volume", "volumes", multiple=True, help="Path that becomes a volume.")
@click.option("--stop-signal", default="", help="Signal that asks it to stop.")
@click.option("--label", multiple=True, help="KEY=VALUE.")
@pass_client
def import_(client: Client, file: str, name: str, cmd: str | None, entrypoint: str | None, env: tuple[str, ...],
            workdir: str, user: str, expose: tuple[str, ...], volumes: tuple[str, ...], stop_signal: str,
            label: tuple[str, ...]) -> None:  # fmt: skip
    """Import a root filesystem, a `docker save` archive, an OCI archive or an OCI layout directory; - is stdin."""
    start = image_pb2.ImportStart(name=name)
    config = image_pb2.ImageConfig(
        cmd=_words(cmd), entrypoint=_words(entrypoint), env=env, working_dir=workdir, user=user, volumes=volumes,
        exposed_ports=[port if "/" in port else f"{port}/tcp" for port in expose], stop_signal=stop_signal,
        labels=key_values(label, "--label"),
    )  # fmt: skip
    if config != image_pb2.ImageConfig():
        start.config.CopyFrom(config)
    for image in _send(client, start, file):
        click.echo(f"sha256:{image.id}")


@group.command()
@click.option("-i", "--input", "file", type=click.Path(), default="-", help="File; standard input by default.")
@pass_client
def load(client: Client, file: str) -> None:
    """Load what `docker save` wrote, or an OCI archive."""
    for image in _send(client, image_pb2.ImportStart(), file):
        click.echo(f"Loaded image: {image.name or 'sha256:' + image.id}")


def _send(client: Client, start: image_pb2.ImportStart, file: str) -> list[image_pb2.Image]:
    def requests() -> Iterator[image_pb2.ImportImageRequest]:
        yield image_pb2.ImportImageRequest(start=start)
        for chunk in _chunks(file):
            yield image_pb2.ImportImageRequest(chunk=chunk)

    return list(client.images.ImportImage(requests()).images)


def _chunks(file: str) -> Iterator[bytes]:
    source, total = _open(file)
    with source:
        if not sys.stderr.isatty():
            while chunk := source.read(_CHUNK):
                yield chunk
            return
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("Importing", total=total)
            while chunk := source.read(_CHUNK):
                progress.advance(task, len(chunk))
                yield chunk


def _open(file: str) -> tuple[BinaryIO, int | None]:
    if file == "-":
        return sys.stdin.buffer, None
    path = Path(file)
    if (path / "oci-layout").exists():
        return _layout(path), None
    try:
        return path.open("rb"), path.stat().st_size
    except OSError as error:
        raise click.UsageError(f"{file}: {error.strerror}") from error


def _layout(path: Path) -> BinaryIO:
    """Return a tar of an OCI layout directory, made while it is read."""
    reading, writing = os.pipe()

    def write() -> None:
        with os.fdopen(writing, "wb") as pipe, tarfile.open(fileobj=pipe, mode="w|") as archive:
            for name in ("oci-layout", "index.json", "blobs"):
                archive.add(path / name, arcname=name)

    threading.Thread(target=write, daemon=True).start()
    return os.fdopen(reading, "rb")


def _words(text: str | None) -> list[str]:
    if not text:
        return []
    if text.startswith("["):
        try:
            return [str(word) for word in json.loads(text)]
        except ValueError as error:
            raise click.UsageError(f"{text!r} is no JSON array") from error
    return shlex.split(text)


@group.command("ls")
@click.option("-f", "--filter", "filters", multiple=True, help="reference=, label=, dangling=.")
@shapes
@pass_client
def ls(client: Client, filters: tuple[str, ...], template: str | None, quiet: bool, no_trunc: bool) -> None:
    """List images, the newest first."""
    found = pages(client.images.ListImages, image_pb2.ListImagesRequest(filter=filters), "images")[::-1]
    ids = [short_id(image.id, full=no_trunc) for image in found]
    rows = []
    for shown, image in zip(ids, found, strict=True):
        repository, _, tag = image.name.rpartition(":")
        rows.append(
            (repository or "<none>", tag or "<none>", shown, age(image.create_time), size(image.status.size_bytes))
        )
    listing(found, ("REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"), rows, template, quiet=quiet, ids=ids)


@group.command()
@click.argument("images", nargs=-1, required=True, shell_complete=_IMAGE)
@click.option("-f", "--format", "template", default="json", help="'json' (default), or a template.")
@pass_client
def inspect(client: Client, images: tuple[str, ...], template: str) -> None:
    """Show images in full."""
    requests = [image_pb2.GetImageRequest(image=each) for each in images]
    show_objects([client.images.GetImage(request).image for request in requests], template)


@group.command("rm")
@click.argument("images", nargs=-1, required=True, shell_complete=_IMAGE)
@click.option("-f", "--force", is_flag=True, help="A missing one is a success.")
@pass_client
def rm(client: Client, images: tuple[str, ...], force: bool) -> None:
    """Remove images."""
    with tolerant(client) as attempt:
        for name in images:
            request = image_pb2.DeleteImageRequest(image=name, allow_missing=force)
            if attempt(lambda r=request: client.images.DeleteImage(r)):  # type: ignore[misc]
                click.echo(name)
