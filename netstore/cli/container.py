"""netstore container; most of it stands at the top, too: run, ps, exec, logs…"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import click
import grpc
from google.protobuf.duration_pb2 import Duration

from netstore.api.v1 import container_pb2
from netstore.cli.client import Client, Problem, fail, pages, pass_client, tolerant
from netstore.cli.commands import Group, Launching
from netstore.cli.completion import names
from netstore.cli.format import age, duration, listing, one_line, shapes, short_id, show_objects
from netstore.cli.grammar import Moment, seconds
from netstore.cli.port import show, shown
from netstore.cli.run import create, join, run
from netstore.cli.terminal import Terminal

__all__ = ["group"]

_CONTAINER = names("container")


@click.group("container", cls=Group)
def group() -> None:
    """Containers."""


group.add_command(run)
group.add_command(create)
group.add_command(show)


@group.command("ps")
@click.option("-a", "--all", "all_", is_flag=True, help="Those that do not run, too.")
@click.option(
    "-f", "--filter", "filters", multiple=True, help="id=, name=, label=, status=, network=, volume=, ancestor=."
)
@shapes
@pass_client
def ps(client: Client, all_: bool, filters: tuple[str, ...], template: str | None, quiet: bool, no_trunc: bool) -> None:
    """List containers, the newest first."""
    request = container_pb2.ListContainersRequest(filter=filters, all=all_)
    found = pages(client.containers.ListContainers, request, "containers")[::-1]
    ids = [short_id(container.id, full=no_trunc) for container in found]
    rows = [
        (shown, c.spec.image, f'"{one_line(c.status.args, 20, full=no_trunc)}"', age(c.create_time), _status(c),
         ", ".join(_ports(c)), c.name)
        for shown, c in zip(ids, found, strict=True)
    ]  # fmt: skip
    headers = ("CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "PORTS", "NAMES")
    listing(found, headers, rows, template, quiet=quiet, ids=ids)


group.add_command(ps, "ls")


def _status(container: container_pb2.Container) -> str:
    status = container.status
    if status.state == container_pb2.CONTAINER_STATE_RUNNING:
        return f"Up {duration(time.time() - status.start_time.ToNanoseconds() / 1e9)}"
    if status.state == container_pb2.CONTAINER_STATE_EXITED:
        return f"Exited ({status.exit_code}) {age(status.finish_time)}"
    if status.state == container_pb2.CONTAINER_STATE_RESTARTING:
        return f"Restarting ({status.exit_code}) {age(status.finish_time)}"
    return "Created"


def _ports(container: container_pb2.Container) -> Iterator[str]:
    for endpoint in container.status.endpoints:
        for port in endpoint.status.ports:
            yield "->".join(shown(port)) + (" (mesh)" if port.mesh else "")


@group.command()
@click.argument("containers", nargs=-1, required=True, shell_complete=_CONTAINER)
@click.option("-a", "--attach", "attached", is_flag=True, help="Show its output; its exit code is ours.")
@click.option("-i", "--interactive", is_flag=True, help="Give it our standard input.")
@pass_client
def start(client: Client, containers: tuple[str, ...], attached: bool, interactive: bool) -> None:
    """Start containers."""
    if attached or interactive:
        if len(containers) > 1:
            raise click.UsageError("--attach and --interactive take one container")
        found = client.containers.GetContainer(container_pb2.GetContainerRequest(container=containers[0])).container
        request = container_pb2.StartContainerRequest(container=found.id)
        terminal = Terminal(tty_=found.spec.tty, stdin=interactive, detaches=True)
        sys.exit(join(client, found, terminal, ready=lambda: client.containers.StartContainer(request)) or 0)
    with tolerant(client) as attempt:
        for name in containers:
            request = container_pb2.StartContainerRequest(container=name)
            if attempt(lambda r=request: client.containers.StartContainer(r)):  # type: ignore[misc]
                click.echo(name)


@group.command()
@click.argument("container", shell_complete=_CONTAINER)
@click.option("--no-stdin", is_flag=True, help="Give it no input.")
@pass_client
def attach(client: Client, container: str, no_stdin: bool) -> None:
    """Join the streams of a running container; ctrl-p ctrl-q leaves one with a terminal. Its exit code is ours."""
    found = client.containers.GetContainer(container_pb2.GetContainerRequest(container=container)).container
    if found.status.state != container_pb2.CONTAINER_STATE_RUNNING:
        raise click.ClickException(f"container {found.name} does not run\n  hint: netstore start -ai {found.name}")
    terminal = Terminal(tty_=found.spec.tty, stdin=found.spec.open_stdin and not no_stdin, detaches=True)
    sys.exit(join(client, found, terminal) or 0)


_timeout = click.option(
    "-t", "--time", "--timeout", "timeout", type=float, help="Seconds to wait before killing [default: 10]."
)
_signal = click.option("-s", "--signal", "signal_", default="", help="Signal instead of the container's own.")


def _patience(timeout: float | None) -> Duration | None:
    return None if timeout is None else seconds(timeout, "--time")


@group.command()
@click.argument("containers", nargs=-1, required=True, shell_complete=_CONTAINER)
@_timeout
@_signal
@pass_client
def stop(client: Client, containers: tuple[str, ...], timeout: float | None, signal_: str) -> None:
    """Stop containers."""
    with tolerant(client) as attempt:
        for name in containers:
            request = container_pb2.StopContainerRequest(container=name, signal=signal_, timeout=_patience(timeout))
            if attempt(lambda r=request: client.containers.StopContainer(r)):  # type: ignore[misc]
                click.echo(name)


@group.command()
@click.argument("containers", nargs=-1, required=True, shell_complete=_CONTAINER)
@_timeout
@_signal
@pass_client
def restart(client: Client, containers: tuple[str, ...], timeout: float | None, signal_: str) -> None:
    """Stop containers, and start them again."""
    with tolerant(client) as attempt:
        for name in containers:
            request = container_pb2.RestartContainerRequest(container=name, signal=signal_, timeout=_patience(timeout))
            if attempt(lambda r=request: client.containers.RestartContainer(r)):  # type: ignore[misc]
                click.echo(name)


@group.command()
@click.argument("containers", nargs=-1, required=True, shell_complete=_CONTAINER)
@click.option("-s", "--signal", "signal_", default="KILL", show_default=True, help="Signal to send.")
@pass_client
def kill(client: Client, containers: tuple[str, ...], signal_: str) -> None:
    """Send a signal to containers."""
    with tolerant(client) as attempt:
        for name in containers:
            request = container_pb2.KillContainerRequest(container=name, signal=signal_)
            if attempt(lambda r=request: client.containers.KillContainer(r)):  # type: ignore[misc]
                click.echo(name)


@group.command()
@click.argument("containers", nargs=-1, required=True, shell_complete=_CONTAINER)
@click.option("-f", "--force", is_flag=True, help="Kill it when it runs.")
@click.option("-v", "--volumes", is_flag=True, help="Its anonymous volumes too.")
@pass_client
def rm(client: Client, containers: tuple[str, ...], force: bool, volumes: bool) -> None:
    """Remove containers."""
    with tolerant(client) as attempt:
        for name in containers:
            request = container_pb2.DeleteContainerRequest(
                container=name, force=force, volumes=volumes, allow_missing=force
            )
            if attempt(lambda r=request: client.containers.DeleteContainer(r)):  # type: ignore[misc]
                click.echo(name)


@group.command()
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.option("--filter", "filters", multiple=True, help="As for ps.")
@pass_client
def prune(client: Client, force: bool, filters: tuple[str, ...]) -> None:
    """Remove containers that do not run."""
    request = container_pb2.ListContainersRequest(filter=filters, all=True)
    found = pages(client.containers.ListContainers, request, "containers")
    ended = (container_pb2.CONTAINER_STATE_CREATED, container_pb2.CONTAINER_STATE_EXITED)
    idle = [each for each in found if each.status.state in ended]
    for each in idle:
        click.echo(each.name)
    if not idle or not (force or click.confirm("Remove these containers?", default=False)):
        return
    with tolerant(client) as attempt:
        for each in idle:
            gone = container_pb2.DeleteContainerRequest(container=each.id, allow_missing=True)
            attempt(lambda r=gone: client.containers.DeleteContainer(r))  # type: ignore[misc]


@group.command()
@click.argument("containers", nargs=-1, required=True, shell_complete=_CONTAINER)
@pass_client
def wait(client: Client, containers: tuple[str, ...]) -> None:
    """Wait until containers end; prints their exit codes."""
    for name in containers:
        request = container_pb2.WaitContainerRequest(container=name)
        click.echo(client.containers.WaitContainer(request).exit_code)


@group.command()
@click.argument("containers", nargs=-1, required=True, shell_complete=_CONTAINER)
@click.option("-f", "--format", "template", default="json", help="'json' (default), or a template.")
@pass_client
def inspect(client: Client, containers: tuple[str, ...], template: str) -> None:
    """Show containers in full."""
    with tolerant(client) as attempt:
        found: list[container_pb2.Container] = []
        for name in containers:
            request = container_pb2.GetContainerRequest(container=name)
            attempt(lambda r=request: found.append(client.containers.GetContainer(r).container))  # type: ignore[misc]
        show_objects(found, template)


@group.command()
@click.argument("container", shell_complete=_CONTAINER)
@click.option("-f", "--follow", is_flag=True, help="Go on as more is printed.")
@click.option("-n", "--tail", default="all", show_default=True, help="Only this many last lines.")
@click.option("--since", type=Moment(), help="Only from this time (RFC 3339, or Unix seconds), or this long ago: 10m.")
@click.option("-t", "--timestamps", is_flag=True, help="Show when each line was printed.")
@pass_client
def logs(client: Client, container: str, follow: bool, tail: str, since: float | None, timestamps: bool) -> None:
    """Show what a container printed."""
    request = container_pb2.ReadLogsRequest(container=container, follow=follow)
    if tail != "all":
        if not tail.isdecimal():
            raise click.UsageError(f"--tail: {tail!r} is neither a number nor 'all'")
        request.tail = int(tail)
    if since is not None:
        request.since.FromNanoseconds(int(since * 1e9))
    for piece in client.containers.ReadLogs(request):
        target = sys.stderr if piece.stream == container_pb2.LOG_STREAM_STDERR else sys.stdout
        prefix = f"{piece.time.ToJsonString()} ".encode() if timestamps else b""
        target.buffer.write(prefix + piece.data)
        target.buffer.flush()


@group.command("exec", cls=Launching, context_settings={"allow_interspersed_args": False})
@click.argument("container", shell_complete=_CONTAINER)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("-d", "--detach", is_flag=True, help="Start it, and return: its output is discarded.")
@click.option("-i", "--interactive", is_flag=True, help="Give it our standard input.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal.")
@click.option("-e", "--env", multiple=True, help="KEY=VALUE.")
@click.option("-w", "--workdir", default="", help="Working directory.")
@click.option("-u", "--user", default="", help="USER[:GROUP].")
@pass_client
def exec_(client: Client, container: str, command: tuple[str, ...], detach: bool, interactive: bool, tty: bool,
          env: tuple[str, ...], workdir: str, user: str) -> None:  # fmt: skip
    """Run a command in a running container; its exit code is ours."""
    if detach and (interactive or tty):
        raise click.UsageError("--detach goes without --interactive and --tty: nobody is there to type")
    terminal = Terminal(tty_=tty, stdin=interactive)
    start = container_pb2.ExecStart(
        container=container, command=command, env=env, working_dir=workdir, user=user, stdin=interactive, tty=tty,
        size=terminal.size(), detach=detach,
    )  # fmt: skip
    first = container_pb2.ExecContainerRequest(start=start)
    try:
        sys.exit(terminal.run(client.containers.ExecContainer, first))
    except grpc.RpcError as error:
        code = int(Problem.of(error).metadata.get("exit_code", "125"))
        fail(error, client, status=code)
