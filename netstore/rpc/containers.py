"""ContainerService: messages in, manager calls, messages out."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from ipaddress import ip_address
from signal import Signals
from typing import Any

from google.protobuf.duration_pb2 import Duration

from netstore.api.v1 import container_pb2 as pb
from netstore.api.v1 import container_pb2_grpc
from netstore.errors import InvalidArgument
from netstore.launcher.creation import exposed
from netstore.launcher.manager import ContainerManager, Joined
from netstore.launcher.restarts import runs_again
from netstore.launcher.signals import parse_signal
from netstore.launcher.terminals import Size
from netstore.model import (
    Attachment,
    Container,
    ContainerSpec,
    ContainerState,
    Endpoint,
    Image,
    Network,
    Restart,
    Sandbox,
)
from netstore.rpc import endpoints as endpoint_messages
from netstore.rpc.endpoints import (
    check_aliases,
    check_endpoint_options,
    check_interface,
    check_link_local,
    check_links,
    check_mac,
    check_ports,
    check_static,
    check_twins,
)
from netstore.rpc.fields import (
    Filters,
    check_labels,
    check_name,
    check_request_id,
    check_servers,
    missing_allowed,
    page,
    timestamp,
)
from netstore.rpc.mounts import to_mount, to_mount_message, to_status_message, to_volumes_from
from netstore.rpc.streams import first_of, given, to_size

__all__ = ["ContainerServicer"]

_FILTERS = ("id", "name", "label", "status", "network", "volume", "ancestor")
_RESTARTING = "restarting"
_STATES = {
    ContainerState.CREATED: pb.CONTAINER_STATE_CREATED,
    ContainerState.RUNNING: pb.CONTAINER_STATE_RUNNING,
    _RESTARTING: pb.CONTAINER_STATE_RESTARTING,
    ContainerState.EXITED: pb.CONTAINER_STATE_EXITED,
}
_RESTARTS = {
    Restart.NO: pb.RESTART_MODE_NO,
    Restart.ON_FAILURE: pb.RESTART_MODE_ON_FAILURE,
    Restart.ALWAYS: pb.RESTART_MODE_ALWAYS,
    Restart.UNLESS_STOPPED: pb.RESTART_MODE_UNLESS_STOPPED,
}
_STREAMS = {"stdout": pb.LOG_STREAM_STDOUT, "stderr": pb.LOG_STREAM_STDERR}
_HOSTNAME = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?(\.[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)*")
_WORD = re.compile(r"[a-zA-Z0-9_.:-]{1,253}")
_USUAL = Size(24, 80)
_MAX_STOP_SECONDS = 24 * 3600.0


class ContainerServicer(container_pb2_grpc.ContainerServiceServicer):
    """Implements `netstore.v1.ContainerService`."""

    def __init__(self, manager: ContainerManager) -> None:
        self._containers = manager

    async def GetContainer(self, request: pb.GetContainerRequest, context: Any) -> pb.GetContainerResponse:
        return pb.GetContainerResponse(container=self._message(await self._containers.get(request.container)))

    async def ListContainers(self, request: pb.ListContainersRequest, context: Any) -> pb.ListContainersResponse:
        filters = Filters(request.filter, _FILTERS)
        for value in filters.values.get("status", []):
            if value not in _STATES:
                raise InvalidArgument("filter", f"status={value}", "created, running, restarting or exited")
        where, values = filters.where()
        every = request.all or "status" in filters.values
        found = [
            joined
            for joined in await self._containers.all(where, *values)
            if (every or _state(joined[0]) in (ContainerState.RUNNING, _RESTARTING)) and _matches(filters, joined)
        ]
        shown, token = page(found, request.page_size, request.page_token, lambda joined: joined[0])
        return pb.ListContainersResponse(containers=[self._message(each) for each in shown], next_page_token=token)

    async def CreateContainer(self, request: pb.CreateContainerRequest, context: Any) -> pb.CreateContainerResponse:
        wanted = request.container
        made, warnings = await self._containers.create(
            check_name("name", wanted.name) if wanted.name else "",
            _to_spec(wanted.spec),
            labels=check_labels(wanted.labels),
            request_id=check_request_id(request.request_id),
        )
        return pb.CreateContainerResponse(container=self._message(made), warnings=warnings)

    async def StartContainer(self, request: pb.StartContainerRequest, context: Any) -> pb.StartContainerResponse:
        return pb.StartContainerResponse(container=self._message(await self._containers.start(request.container)))

    async def StopContainer(self, request: pb.StopContainerRequest, context: Any) -> pb.StopContainerResponse:
        timeout, number = _ending(request)
        stopped = await self._containers.stop(request.container, timeout=timeout, signal_=number)
        return pb.StopContainerResponse(container=self._message(stopped))

    async def RestartContainer(self, request: pb.RestartContainerRequest, context: Any) -> pb.RestartContainerResponse:
        timeout, number = _ending(request)
        started = await self._containers.restart(request.container, timeout=timeout, signal_=number)
        return pb.RestartContainerResponse(container=self._message(started))

    async def KillContainer(self, request: pb.KillContainerRequest, context: Any) -> pb.KillContainerResponse:
        await self._containers.kill(request.container, parse_signal(request.signal or "SIGKILL"))
        return pb.KillContainerResponse()

    async def DeleteContainer(self, request: pb.DeleteContainerRequest, context: Any) -> pb.DeleteContainerResponse:
        with missing_allowed(allow=request.allow_missing):
            await self._containers.delete(request.container, force=request.force, volumes=request.volumes)
        return pb.DeleteContainerResponse()

    async def WaitContainer(self, request: pb.WaitContainerRequest, context: Any) -> pb.WaitContainerResponse:
        return pb.WaitContainerResponse(exit_code=await self._containers.wait(request.container))

    async def ReadLogs(self, request: pb.ReadLogsRequest, context: Any) -> AsyncIterator[pb.ReadLogsResponse]:
        tail = request.tail if request.HasField("tail") else None
        if tail is not None and tail < 0:
            raise InvalidArgument("tail", tail, "a number of lines, or nothing for all")
        since = request.since.ToNanoseconds() / 1e9 if request.HasField("since") else 0.0
        async for lines in self._containers.logs(request.container, follow_=request.follow, tail=tail, since=since):
            for line in lines:
                yield pb.ReadLogsResponse(stream=_STREAMS[line.stream], time=timestamp(line.time), data=line.data)

    async def ExecContainer(
        self, request: AsyncIterator[pb.ExecContainerRequest], context: Any
    ) -> AsyncIterator[pb.ExecContainerResponse]:
        requests = aiter(request)
        start = (await first_of(requests, "what to run")).start
        if not start.command or not start.command[0]:
            raise InvalidArgument("command", list(start.command), "a program and its arguments")
        size = to_size(start)
        if size and not start.tty:
            raise InvalidArgument("size", str(size), "nothing, without tty")
        if start.detach and (start.stdin or start.tty):
            raise InvalidArgument("detach", True, "false with stdin or tty: nobody is there to type")
        execution = await self._containers.exec(
            start.container,
            list(start.command),
            env=_check_env(start.env, "env"),
            working_dir=_check_directory(start.working_dir, "working_dir"),
            user=start.user,
            terminal=(size or _USUAL) if start.tty else None,
        )
        takes = given(requests, stdin=start.stdin, tty=start.tty) if start.stdin or start.tty else None
        async for stream, data in execution.detach() if start.detach else execution.run(takes):
            yield pb.ExecContainerResponse(**{stream: data})  # type: ignore[arg-type]
        yield pb.ExecContainerResponse(exit_code=execution.exit_code)

    async def AttachContainer(
        self, request: AsyncIterator[pb.AttachContainerRequest], context: Any
    ) -> AsyncIterator[pb.AttachContainerResponse]:
        requests = aiter(request)
        start = (await first_of(requests, "what to attach to")).start
        size = to_size(start)
        container, joining = await self._containers.attach(start.container, stdin=start.stdin, size=size)
        yield pb.AttachContainerResponse(attached=pb.Attached())
        attached = await joining
        tty = container.spec.tty
        brought = given(requests, stdin=start.stdin, tty=tty, size=size)
        async for stream, data in attached.run(brought, leaves=tty and start.stdin):
            yield pb.AttachContainerResponse(**{stream: data})  # type: ignore[arg-type]
        if not attached.left:
            yield pb.AttachContainerResponse(exit_code=await self._containers.wait(container.id))

    def _message(self, joined: Joined) -> pb.Container:
        return _to_message(*joined, log_path=self._containers.log_path(joined[0]))


def _to_spec(spec: pb.ContainerSpec) -> ContainerSpec:
    if not spec.image:
        raise InvalidArgument("spec.image", "", "the name or id of an image")
    if spec.hostname and (not _HOSTNAME.fullmatch(spec.hostname) or len(spec.hostname) > 64):
        raise InvalidArgument("spec.hostname", spec.hostname, "a host name (RFC 1123), at most 64 characters")
    if spec.domainname and not _HOSTNAME.fullmatch(spec.domainname):
        raise InvalidArgument("spec.domainname", spec.domainname, "a domain name (RFC 1123)")
    if spec.entrypoint and not spec.override_entrypoint:
        raise InvalidArgument("spec.override_entrypoint", False, "true, when an entrypoint is given")
    if spec.stop_signal:
        parse_signal(spec.stop_signal)
    restart = _check_restart(spec)
    return ContainerSpec(
        image=spec.image,
        command=tuple(spec.command),
        entrypoint=tuple(spec.entrypoint) if spec.override_entrypoint else None,
        env=tuple(_check_env(spec.env, "spec.env")),
        working_dir=_check_directory(spec.working_dir, "spec.working_dir"),
        user=spec.user,
        hostname=spec.hostname,
        domainname=spec.domainname,
        dns_servers=check_servers(spec.dns_servers, "spec.dns_servers"),
        dns_search=_check_words(spec.dns_search, "spec.dns_search", "a domain, or . for none"),
        dns_options=_check_words(spec.dns_options, "spec.dns_options", "an option of resolv.conf(5)"),
        extra_hosts=_check_hosts(spec.extra_hosts, "spec.extra_hosts"),
        publish_all=spec.publish_all,
        exposed_ports=_check_exposed(spec.exposed_ports, "spec.exposed_ports"),
        networks=tuple(_to_attachment(each, f"spec.networks[{i}]") for i, each in enumerate(spec.networks)),
        sandbox_container=spec.sandbox_container,
        ports=tuple(check_ports(spec.ports, "spec.ports")) if spec.ports else (),
        mounts=tuple(to_mount(mount, f"spec.mounts[{index}]") for index, mount in enumerate(spec.mounts)),
        volumes_from=to_volumes_from(spec.volumes_from, "spec.volumes_from"),
        auto_remove=spec.auto_remove,
        read_only=spec.read_only,
        stop_signal=spec.stop_signal,
        stop_timeout=_seconds(spec.stop_timeout, "spec.stop_timeout") if spec.HasField("stop_timeout") else 10.0,
        restart=restart,
        restart_limit=spec.restart_policy.max_retries,
        tty=spec.tty,
        open_stdin=spec.open_stdin,
        stdin_once=spec.stdin_once,
    )


def _check_restart(spec: pb.ContainerSpec) -> Restart:
    policy = spec.restart_policy
    modes = {message: mode for mode, message in _RESTARTS.items()} | {pb.RESTART_MODE_UNSPECIFIED: Restart.NO}
    mode = modes.get(policy.mode)
    if mode is None:
        raise InvalidArgument("spec.restart_policy.mode", policy.mode, "a RestartMode")
    if policy.max_retries < 0 or (policy.max_retries and mode is not Restart.ON_FAILURE):
        raise InvalidArgument(
            "spec.restart_policy.max_retries", policy.max_retries, "0, or more with on-failure (on-failure:N)"
        )
    if spec.auto_remove and mode is not Restart.NO:
        raise InvalidArgument("spec.restart_policy.mode", mode, "no: a container with auto_remove goes when it ends")
    return mode


def _to_attachment(attachment: pb.NetworkAttachment, field: str) -> Attachment:
    if not attachment.network:
        raise InvalidArgument(f"{field}.network", "", "the name or id of a network")
    check_twins(attachment.options, field, interface_name=attachment.interface_name, mac_address=attachment.mac_address)
    return Attachment(
        network=attachment.network,
        aliases=check_aliases(attachment.aliases, f"{field}.aliases"),
        **check_static(attachment.ipv4_address, attachment.ipv6_address, field),
        options=check_endpoint_options(attachment.options, f"{field}.options"),
        mac_address=check_mac(attachment.mac_address, f"{field}.mac_address"),
        interface_name=check_interface(attachment.interface_name, f"{field}.interface_name"),
        gateway_priority=attachment.gateway_priority,
        links=check_links(attachment.links, f"{field}.links"),
        link_local_addresses=check_link_local(attachment.link_local_addresses, f"{field}.link_local_addresses"),
    )


def _check_words(words: Sequence[str], field: str, accepted: str) -> tuple[str, ...]:
    if len(words) > 16:
        raise InvalidArgument(field, f"{len(words)} entries", "at most 16")
    for index, word in enumerate(words):
        if not _WORD.fullmatch(word):
            raise InvalidArgument(f"{field}[{index}]", word, accepted)
    return tuple(words)


def _check_hosts(hosts: Sequence[str], field: str) -> tuple[str, ...]:
    """Return lines of /etc/hosts, as NAME=ADDRESS."""
    checked = []
    for index, text in enumerate(hosts):
        name, _, address = text.partition("=" if "=" in text else ":")
        address = address.removeprefix("[").removesuffix("]")
        try:
            address = address if address == "host-gateway" else str(ip_address(address))
        except ValueError:
            address = ""
        if not address or not _WORD.fullmatch(name) or index >= 64:
            raise InvalidArgument(f"{field}[{index}]", text, "NAME:ADDRESS, or NAME:host-gateway; at most 64")
        checked.append(f"{name}={address}")
    return tuple(checked)


def _check_exposed(ports: Sequence[str], field: str) -> tuple[str, ...]:
    if len(ports) > 64:
        raise InvalidArgument(field, f"{len(ports)} ports", "at most 64")
    for index, text in enumerate(ports):
        if not list(exposed([text])):
            raise InvalidArgument(f"{field}[{index}]", text, "PORT[-PORT][/tcp|udp|sctp], ports 1 to 65535")
    return tuple(ports)


def _check_env(pairs: Sequence[str], field: str) -> list[str]:
    for index, pair in enumerate(pairs):
        if pair.startswith("=") or not pair or "\0" in pair:
            raise InvalidArgument(f"{field}[{index}]", pair, "KEY=value, or KEY to leave it out")
    return list(pairs)


def _check_directory(path: str, field: str) -> str:
    if path and (not path.startswith("/") or ".." in path.split("/")):
        raise InvalidArgument(field, path, "an absolute path without '..'")
    return path


def _ending(request: pb.StopContainerRequest | pb.RestartContainerRequest) -> tuple[float | None, Signals | None]:
    """Return how long a container that is asked to end is waited for, and by what signal it is asked."""
    timeout = _seconds(request.timeout, "timeout") if request.HasField("timeout") else None
    return timeout, parse_signal(request.signal) if request.signal else None


def _seconds(duration: Duration, field: str) -> float:
    seconds = duration.ToNanoseconds() / 1e9
    if not 0 <= seconds <= _MAX_STOP_SECONDS:
        raise InvalidArgument(field, seconds, "0 s to 24 h")
    return seconds


def _state(container: Container) -> str:
    """Return a container's state in Docker's words."""
    return _RESTARTING if runs_again(container, booted=False) else container.state


def _matches(filters: Filters, joined: Joined) -> bool:
    container, image, _, endpoints = joined
    networks = [network for _, network, _ in endpoints]
    return (
        filters.any("status", lambda value: value == _state(container))
        and filters.any("network", lambda value: any(value in (n.name, n.id) for n in networks))
        and filters.any("volume", lambda value: any(value in (m.volume, m.spec.target) for m in container.mounts))
        and filters.any("ancestor", lambda value: value in (image.name, image.name.split(":")[0], image.id))
    )


def _to_message(
    container: Container, image: Image, sandbox: Sandbox, endpoints: list[tuple[Endpoint, Network, Sandbox]], *,
    log_path: str,
) -> pb.Container:  # fmt: skip
    running = container.state is ContainerState.RUNNING
    return pb.Container(
        id=container.id,
        name=container.name,
        labels=container.labels,
        etag=str(container.revision),
        create_time=timestamp(container.create_time),
        spec=_to_spec_message(container.spec),
        status=pb.ContainerStatus(
            state=_STATES[_state(container)],
            pid=container.pid if running else 0,
            exit_code=container.exit_code,
            message=container.message,
            start_time=timestamp(container.start_time),
            finish_time=timestamp(container.finish_time),
            image_id=image.id,
            sandbox_path=sandbox.path,
            endpoints=[endpoint_messages.to_message(*each) for each in endpoints],
            mounts=[to_status_message(mount) for mount in container.mounts],
            args=container.args,
            log_path=log_path,
            restart_count=container.restart_count,
        ),
    )


def _to_spec_message(spec: ContainerSpec) -> pb.ContainerSpec:
    timeout = Duration()
    timeout.FromNanoseconds(int(spec.stop_timeout * 1e9))
    return pb.ContainerSpec(
        image=spec.image,
        command=spec.command,
        entrypoint=spec.entrypoint or (),
        override_entrypoint=spec.entrypoint is not None,
        env=spec.env,
        working_dir=spec.working_dir,
        user=spec.user,
        hostname=spec.hostname,
        domainname=spec.domainname,
        dns_servers=spec.dns_servers,
        dns_search=spec.dns_search,
        dns_options=spec.dns_options,
        extra_hosts=spec.extra_hosts,
        publish_all=spec.publish_all,
        exposed_ports=spec.exposed_ports,
        networks=[
            pb.NetworkAttachment(
                network=each.network,
                aliases=each.aliases,
                ipv4_address=each.ipv4_address,
                ipv6_address=each.ipv6_address,
                options=each.options,
                mac_address=each.mac_address,
                interface_name=each.interface_name,
                gateway_priority=each.gateway_priority,
                links=each.links,
                link_local_addresses=each.link_local_addresses,
            )
            for each in spec.networks
        ],
        sandbox_container=spec.sandbox_container,
        ports=[endpoint_messages.to_port_message(port) for port in spec.ports],
        mounts=[to_mount_message(mount) for mount in spec.mounts],
        volumes_from=spec.volumes_from,
        auto_remove=spec.auto_remove,
        read_only=spec.read_only,
        stop_signal=spec.stop_signal,
        stop_timeout=timeout,
        restart_policy=pb.RestartPolicy(mode=_RESTARTS[spec.restart], max_retries=spec.restart_limit),
        tty=spec.tty,
        open_stdin=spec.open_stdin,
        stdin_once=spec.stdin_once,
    )
