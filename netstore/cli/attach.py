"""netstore volume attach, detach and mounts: what running containers, and other namespaces, see."""

from __future__ import annotations

from typing import Any

import click

from netstore.api.v1 import mount_pb2
from netstore.cli.client import Client, pages, pass_client
from netstore.cli.commands import Command
from netstore.cli.completion import names
from netstore.cli.format import listing, name_of, shapes
from netstore.cli.grammar import INT32
from netstore.cli.mounts import set_options

__all__ = ["attach", "detach", "mounts"]


def _elsewhere(command: Any) -> Any:
    """Add the flags that name a namespace which is no container's."""
    command = click.option("--mntns", help="A mount namespace by path instead of a container.")(command)
    return click.option("--pid", type=INT32, help="The mount namespace of a process instead of a container.")(command)


@click.command(cls=Command)
@click.argument("volume", shell_complete=names("volume"))
@click.argument("target", metavar="CONTAINER:/PATH[:OPTIONS]")
@_elsewhere
@click.option("--replace", is_flag=True, help="Put it in the place of what is mounted there, with no moment between.")
@click.option("--subpath", default="", help="A path in the volume instead of the whole.")
@pass_client
def attach(client: Client, volume: str, target: str, pid: int | None, mntns: str | None, replace: bool,
           subpath: str) -> None:  # fmt: skip
    """Mount a volume in a running container, or change how it is mounted.

    OPTIONS are those of -v: ro, rw, noexec, nosuid, nodev, U, idmap=…. The same volume with another of ro and rw
    changes the mount at once. With --pid or --mntns write /PATH[:OPTIONS].
    """
    ref, path, options = _split(target, pid, mntns)
    spec = mount_pb2.MountSpec(type=mount_pb2.MOUNT_TYPE_VOLUME, source=volume, target=path, subpath=subpath)
    set_options(spec, options, repr(target))
    made = client.mounts.Mount(mount_pb2.MountRequest(namespace=ref, spec=spec, replace=replace)).mount
    click.echo(f"{_name(made.namespace)}:{made.status.target}")


@click.command(cls=Command)
@click.argument("target", metavar="CONTAINER:/PATH")
@_elsewhere
@click.option("-f", "--force", is_flag=True, help="Also when it is in use: it ends with its last user.")
@pass_client
def detach(client: Client, target: str, pid: int | None, mntns: str | None, force: bool) -> None:
    """Take a mount out of a running container.

    With --pid or --mntns write /PATH.
    """
    ref, path, options = _split(target, pid, mntns)
    if options:
        raise click.UsageError(f"{target!r}: a mount to take away has no options: write {target.rpartition(':')[0]}")
    client.mounts.Unmount(mount_pb2.UnmountRequest(namespace=ref, target=path, force=force))
    click.echo(target)


@click.command(cls=Command)
@click.argument("container", required=False, shell_complete=names("container"))
@_elsewhere
@shapes
@pass_client
def mounts(client: Client, container: str | None, pid: int | None, mntns: str | None, template: str | None,
           quiet: bool, no_trunc: bool) -> None:  # fmt: skip
    """List the mounts of a container or namespace; without one, those of namespaces that are not containers'."""
    request = mount_pb2.ListMountsRequest()
    if container or pid is not None or mntns:
        request.namespace.CopyFrom(_reference(container, pid, mntns))
    found = pages(client.mounts.ListMounts, request, "mounts")
    rows = [
        (
            _name(each.namespace), each.status.target, name_of(mount_pb2.MountType, each.status.type, "MOUNT_TYPE"),
            each.status.volume or each.status.source, "ro" if each.status.read_only else "rw",
        ) for each in found
    ]  # fmt: skip
    head = ("WHERE", "TARGET", "TYPE", "SOURCE", "MODE")
    listing(found, head, rows, template, quiet=quiet, ids=[each.status.target for each in found])


def _split(text: str, pid: int | None, mntns: str | None) -> tuple[mount_pb2.MountNamespaceRef, str, str]:
    container = None
    if pid is None and mntns is None:
        container, colon, text = text.partition(":")
        if not colon or not container:
            raise click.UsageError(f"{container!r}: write CONTAINER:/PATH[:OPTIONS], or name --pid or --mntns")
    path, _, options = text.partition(":")
    return _reference(container, pid, mntns), path, options


def _reference(container: str | None, pid: int | None, mntns: str | None) -> mount_pb2.MountNamespaceRef:
    if sum(each is not None for each in (container, pid, mntns)) != 1:
        raise click.UsageError("name one of: a container, --pid PID, --mntns PATH")
    if mntns is not None:
        return mount_pb2.MountNamespaceRef(path=mntns)
    return mount_pb2.MountNamespaceRef(pid=pid or 0, container=container or "")


def _name(ref: mount_pb2.MountNamespaceRef) -> str:
    return ref.container or ref.path or f"pid {ref.pid}"
