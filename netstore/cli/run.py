"""netstore run and create."""

from __future__ import annotations

import contextlib
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import click
import grpc

from netstore.api.v1 import container_pb2, mount_pb2
from netstore.cli.client import Client, Problem, fail, pass_client
from netstore.cli.commands import Launching
from netstore.cli.completion import names
from netstore.cli.grammar import (
    bandwidth,
    key_values,
    parse_env,
    parse_network,
    parse_port,
    parse_restart,
    seconds,
)
from netstore.cli.image import pull
from netstore.cli.mounts import parse_mount, parse_tmpfs, parse_volume
from netstore.cli.terminal import Terminal

__all__ = ["create", "join", "run"]

_FAILED = 125


def _container_options(command: Any) -> Any:
    """Add what run and create have in common."""
    options: list[Callable[[Any], Any]] = [
        click.argument("image", shell_complete=names("image")),
        click.argument("command", nargs=-1, type=click.UNPROCESSED),
        click.option("-i", "--interactive", is_flag=True, help="Give it our standard input."),
        click.option("-t", "--tty", is_flag=True, help="Give it a terminal."),
        click.option(
            "--pull",
            type=click.Choice(["always", "missing", "never"]),
            default="missing",
            show_default=True,
            help="Fetch the image from its registry.",
        ),
        click.option("--rm", "auto_remove", is_flag=True, help="Remove it when it ends."),
        click.option("--name", default="", help="Name."),
        click.option("-e", "--env", multiple=True, help="KEY=VALUE, or KEY from our environment."),
        click.option("--env-file", multiple=True, type=click.Path(exists=True), help="File of KEY=VALUE lines."),
        click.option("-w", "--workdir", default="", help="Working directory."),
        click.option("-u", "--user", default="", help="USER[:GROUP]."),
        click.option("-h", "--hostname", default="", help="Host name."),
        click.option("--domainname", default="", help="Domain name."),
        click.option("--dns", multiple=True, help="Name server instead of the host's."),
        click.option("--dns-search", multiple=True, help="Search domain; '.' for none."),
        click.option("--dns-option", "--dns-opt", multiple=True, help="Option of resolv.conf."),
        click.option("--add-host", multiple=True, help="NAME:ADDRESS, or NAME:host-gateway."),
        click.option(
            "--network", "--net", multiple=True, help="NAME, host, none, container:NAME, or name=…,alias=…,ip=…."
        ),
        click.option("--network-alias", multiple=True, help="A further name on the first network."),
        click.option("--link-local-ip", multiple=True, help="A further address of 169.254.0.0/16 or fe80::/10."),
        click.option("--link", multiple=True, help="CONTAINER[:ALIAS]: a name of its own for another, there."),
        click.option("--ip", default="", help="Static IPv4 address on the first network."),
        click.option("--ip6", default="", help="Static IPv6 address on the first network."),
        click.option("--mac-address", default="", help="MAC address on the first network."),
        click.option("--bandwidth-in", help="Most that it receives on the first network, such as 50mbit."),
        click.option("--bandwidth-out", help="Most that it sends on the first network."),
        click.option("-p", "--publish", multiple=True, help="[[IP:][HOSTPORT]:]PORT[/tcp|udp|sctp]."),
        click.option("--mesh", is_flag=True, help="Every node of the cluster publishes the ports of -p."),
        click.option("-P", "--publish-all", is_flag=True, help="Publish every exposed port on a free one."),
        click.option("--expose", multiple=True, help="A port exposed besides the image's: PORT[-PORT][/PROTOCOL]."),
        click.option("-v", "--volume", multiple=True, help="[SOURCE:]TARGET[:OPTIONS]."),
        click.option("--mount", multiple=True, help="type=volume|bind|tmpfs|image,source=…,target=…."),
        click.option("--tmpfs", multiple=True, help="TARGET[:OPTIONS]."),
        click.option("--volumes-from", multiple=True, help="CONTAINER[:ro]: mount what it mounts."),
        click.option("--volume-driver", default="", help="Driver of volumes that -v makes."),
        click.option("--entrypoint", help="Instead of the image's; '' for none."),
        click.option("-l", "--label", multiple=True, help="KEY=VALUE."),
        click.option("--restart", default="no", help="no, on-failure[:N], always or unless-stopped."),
        click.option("--read-only", is_flag=True, help="The root filesystem cannot be written."),
        click.option("--stop-signal", default="", help="Signal that asks it to stop."),
        click.option("--stop-timeout", type=float, help="Seconds before stop kills [default: 10]."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


_SETTINGS = {"ignore_unknown_options": False, "allow_interspersed_args": False}


@click.command("run", cls=Launching, context_settings=_SETTINGS)
@click.option("-d", "--detach", is_flag=True, help="Print its id and return.")
@_container_options
@pass_client
def run(client: Client, /, detach: bool, **options: Any) -> None:
    """Create a container and start it."""
    stdin, tty = options["interactive"], options["tty"]
    terminal = None if detach or not (stdin or tty) else Terminal(tty_=tty, stdin=stdin, detaches=True)
    try:
        made = _create(client, options, stdin_once=stdin and not detach)
        start = partial(_start, client, made, auto_remove=options["auto_remove"])
        if terminal:
            code = join(client, made, terminal, ready=start)
        else:
            start()
            code = None if detach else _attend(client, made.id)
        if detach:
            click.echo(made.id)
        if options["auto_remove"] and code is not None:  # netstored would, a little later
            request = container_pb2.DeleteContainerRequest(container=made.id, volumes=True, allow_missing=True)
            client.containers.DeleteContainer(request)
    except grpc.RpcError as error:
        fail(error, client, status=int(Problem.of(error).metadata.get("exit_code", _FAILED)))
    sys.exit(code or 0)


@click.command("create", cls=Launching, context_settings=_SETTINGS)
@_container_options
@pass_client
def create(client: Client, /, **options: Any) -> None:
    """Create a container and start nothing."""
    click.echo(_create(client, options, stdin_once=options["interactive"]).id)


def _create(client: Client, options: dict[str, Any], *, stdin_once: bool) -> container_pb2.Container:
    container = container_pb2.Container(
        name=options["name"], labels=key_values(options["label"], "--label"), spec=_spec(options)
    )
    container.spec.stdin_once = stdin_once
    request = container_pb2.CreateContainerRequest(container=container, request_id=str(uuid.uuid4()))
    response = _with_image(client, request, options["pull"])
    for warning in response.warnings:
        click.echo(f"WARNING: {warning}", err=True)
    made: container_pb2.Container = response.container
    return made


def _with_image(
    client: Client, request: container_pb2.CreateContainerRequest, when: str
) -> container_pb2.CreateContainerResponse:
    """Create a container, its image pulled where that is missing, or always."""
    name = request.container.spec.image
    if when == "always":
        pull(client, name)
    try:
        return client.containers.CreateContainer(request)
    except grpc.RpcError as error:
        problem = Problem.of(error)
        missing = (problem.reason, problem.metadata.get("kind"), problem.metadata.get("name"))
        if when != "missing" or missing != ("NOT_FOUND", "image", name):  # of a mount, it is not ours to pull
            raise
    click.echo(f"there is no image {name} here: pulling it", err=True)
    pull(client, name)
    return client.containers.CreateContainer(request)


def _start(client: Client, made: container_pb2.Container, *, auto_remove: bool) -> None:
    try:
        client.containers.StartContainer(container_pb2.StartContainerRequest(container=made.id))
    except grpc.RpcError:
        if auto_remove:
            with contextlib.suppress(grpc.RpcError):
                request = container_pb2.DeleteContainerRequest(container=made.id, volumes=True)
                client.containers.DeleteContainer(request)
        raise


def _spec(options: dict[str, Any]) -> container_pb2.ContainerSpec:
    spec = container_pb2.ContainerSpec(
        image=options["image"],
        command=options["command"],
        env=parse_env(options["env"], options["env_file"]),
        working_dir=options["workdir"],
        user=options["user"],
        hostname=options["hostname"],
        domainname=options["domainname"],
        dns_servers=options["dns"],
        dns_search=options["dns_search"],
        dns_options=options["dns_option"],
        extra_hosts=options["add_host"],
        publish_all=options["publish_all"],
        exposed_ports=options["expose"],
        ports=[port for each in options["publish"] for port in parse_port(each, mesh=options["mesh"])],
        volumes_from=options["volumes_from"],
        mounts=[
            *_volumes(options),
            *(parse_mount(each) for each in options["mount"]),
            *(parse_tmpfs(each) for each in options["tmpfs"]),
        ],
        auto_remove=options["auto_remove"],
        read_only=options["read_only"],
        stop_signal=options["stop_signal"],
        restart_policy=parse_restart(options["restart"]),
        tty=options["tty"],
        open_stdin=options["interactive"],
    )
    if options["entrypoint"] is not None:
        spec.override_entrypoint = True
        spec.entrypoint.extend([options["entrypoint"]] if options["entrypoint"] else [])
    if options["stop_timeout"] is not None:
        spec.stop_timeout.CopyFrom(seconds(options["stop_timeout"], "--stop-timeout"))
    _add_networks(spec, options)
    return spec


def _volumes(options: dict[str, Any]) -> list[mount_pb2.MountSpec]:
    """Parse every -v; --volume-driver is for those alone, as Docker."""
    found = [parse_volume(each) for each in options["volume"]]
    for mount in found:
        if mount.type == mount_pb2.MOUNT_TYPE_VOLUME:
            mount.volume_driver = options["volume_driver"]
    return found


def _add_networks(spec: container_pb2.ContainerSpec, options: dict[str, Any]) -> None:
    joined = [each for each in options["network"] if each.startswith("container:")]
    if joined:
        spec.sandbox_container = _joined(joined[0], options)
        return
    spec.networks.extend(parse_network(each) for each in options["network"])
    flags = {"ipv4_address": options["ip"], "ipv6_address": options["ip6"], "mac_address": options["mac_address"]}
    limits = bandwidth(options["bandwidth_in"], options["bandwidth_out"])
    if not any((*flags.values(), *options["network_alias"], *options["link"], *options["link_local_ip"], *limits)):
        return
    if not spec.networks:
        spec.networks.add(network="bridge")
    first = spec.networks[0]
    for field, value in flags.items():
        if value and getattr(first, field):
            raise click.UsageError(f"--network gives {field} already: give it once")
        if value:
            setattr(first, field, value)
    first.options.update(limits)
    first.aliases.extend(options["network_alias"])
    first.links.extend(options["link"])
    first.link_local_addresses.extend(options["link_local_ip"])


_OF_NETWORKS = ("ip", "ip6", "mac_address", "network_alias", "link", "link_local_ip", "bandwidth_in", "bandwidth_out")


def _joined(network: str, options: dict[str, Any]) -> str:
    """Return the container of --network container:NAME, which goes with no flag of another network."""
    name = network.removeprefix("container:")
    if not name:
        raise click.UsageError(f"--network: {network!r} names no container: write container:NAME")
    if len(options["network"]) > 1:
        raise click.UsageError(f"--network {network} goes with no other network")
    for flag in _OF_NETWORKS:
        if options[flag]:
            raise click.UsageError(f"--{flag.replace('_', '-')}: not with --network {network}: give it there")
    return name


def join(
    client: Client, container: container_pb2.Container, terminal: Terminal, *,
    ready: Callable[[], object] = lambda: None,
) -> int | None:  # fmt: skip
    """Join a container's streams, call `ready` once that is done, and return its exit code; None when we left it."""
    start = container_pb2.AttachStart(container=container.id, stdin=terminal.stdin, size=terminal.size())
    with contextlib.nullcontext() if terminal.tty else _forwarding(client, container.id):
        return terminal.run(client.containers.AttachContainer, container_pb2.AttachContainerRequest(start=start), ready)


@contextlib.contextmanager
def _forwarding(client: Client, container_id: str) -> Iterator[None]:
    """Pass signals that we get on to a container."""

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(grpc.RpcError):
            request = container_pb2.KillContainerRequest(container=container_id, signal=str(number))
            client.containers.KillContainer(request)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, forward)
    yield


def _attend(client: Client, container_id: str) -> int:
    """Show a container's output until it ends, pass signals on, and return its exit code."""
    with _forwarding(client, container_id):
        ending = client.containers.WaitContainer.future(container_pb2.WaitContainerRequest(container=container_id))
        request = container_pb2.ReadLogsRequest(container=container_id, follow=True)
        try:
            for piece in client.containers.ReadLogs(request):
                target = sys.stderr if piece.stream == container_pb2.LOG_STREAM_STDERR else sys.stdout
                target.buffer.write(piece.data)
                target.buffer.flush()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:  # with --rm it may be gone already
                raise
        return int(ending.result().exit_code)
