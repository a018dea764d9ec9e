"""netstored: reads the configuration, builds the parts, serves until it is told to stop.

Stopping it, or killing it, never stops a container: traffic, names, published ports and open files go on. Only when
systemd stops it because the machine goes down, it stops them, so that they end in their own time.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import grp
import os
import platform
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import click
import grpc
import msgspec
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from netstore import __version__, logs, systemd, threads
from netstore.adapters import programs
from netstore.adapters.cni.plugin import Plugin
from netstore.adapters.netavark.command import Netavark
from netstore.adapters.oci.hook import Hook
from netstore.api.v1 import (
    archive_pb2,
    archive_pb2_grpc,
    container_pb2,
    container_pb2_grpc,
    endpoint_pb2,
    endpoint_pb2_grpc,
    image_pb2,
    image_pb2_grpc,
    mount_pb2,
    mount_pb2_grpc,
    network_pb2,
    network_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    policy_pb2,
    policy_pb2_grpc,
    service_pb2,
    service_pb2_grpc,
    snapshot_pb2,
    snapshot_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
    volume_pb2,
    volume_pb2_grpc,
)
from netstore.config import Config, load
from netstore.errors import NetstoreError
from netstore.kernel import quota
from netstore.launcher.manager import ContainerManager
from netstore.model import Finding, new_id
from netstore.networks.manager import NetworkManager
from netstore.networks.watch import Drift
from netstore.resolver.upstream import split_server
from netstore.rpc.archives import ArchiveServicer
from netstore.rpc.containers import ContainerServicer
from netstore.rpc.endpoints import EndpointServicer
from netstore.rpc.errors import ErrorInterceptor
from netstore.rpc.images import ImageServicer
from netstore.rpc.mount_service import MountServicer
from netstore.rpc.networks import NetworkServicer
from netstore.rpc.nodes import NodeServicer, cluster_info
from netstore.rpc.policies import PolicyServicer
from netstore.rpc.services import ServiceServicer
from netstore.rpc.snapshots import SnapshotServicer
from netstore.rpc.system import Node, SystemServicer, Usage
from netstore.rpc.volumes import VolumeServicer
from netstore.store import Store, Transaction
from netstore.volumes.archives import Archives
from netstore.volumes.manager import VolumeManager
from netstore.volumes.watch import DiskWatch

__all__ = ["Daemon", "main"]

_SERVICES = {
    network_pb2: "NetworkService",
    endpoint_pb2: "EndpointService",
    policy_pb2: "PolicyService",
    service_pb2: "ServiceService",
    volume_pb2: "VolumeService",
    snapshot_pb2: "SnapshotService",
    archive_pb2: "ArchiveService",
    container_pb2: "ContainerService",
    image_pb2: "ImageService",
    mount_pb2: "MountService",
    node_pb2: "NodeService",
    system_pb2: "SystemService",
}
_GRACE_SECONDS = 5.0

log = structlog.get_logger(__name__)


class Daemon:
    """The parts of one netstored, built in `run`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._state_dir = Path(config.state_dir)
        self._run_dir = Path(config.run_dir)
        self._stopping = asyncio.Event()
        self._interceptor = ErrorInterceptor()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            NetstoreError: another netstored uses the state directory, or an address cannot be listened on.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stopping.set)
        threads.prepare()
        async with AsyncExitStack() as stack:
            self._prepare(stack)
            self._store = Store(self._state_dir / "netstore.db", group=_group(self._config.group))
            stack.push_async_callback(self._store.close)
            self._node_id = await self._store.write(_node_id)
            self._networks = NetworkManager(
                self._store, self._run_dir, self._state_dir / "wireguard.key",
                node_id=self._node_id, pools=self._config.address_pools(), resolver=_resolver_command(self._config),
                docker_user=self._config.admits_docker, cluster=self._config.cluster,
                options=self._config.default_network_opts,
            )  # fmt: skip
            stack.push_async_callback(self._networks.close)
            await self._networks.start()
            self._volumes = VolumeManager(
                self._store, self._state_dir, msgspec.structs.asdict(self._config.volumes),
                trash_seconds=self._config.volumes.trash_seconds(),
            )  # fmt: skip
            await self._volumes.start()
            self._containers = ContainerManager(
                self._store, self._networks, self._volumes, self._state_dir, self._run_dir
            )
            stack.push_async_callback(self._containers.close)
            await self._containers.start_up()
            await self._volumes.settle()
            await self._containers.start_again()
            await stack.enter_async_context(self._volumes.chores.running())
            stack.enter_context(Drift(self._networks))
            stack.enter_context(DiskWatch(self._volumes))
            server, checks = self._build()
            await self._listen(server)
            await self._serve_engines(stack)
            await server.start()
            log.info(
                "netstored is ready", version=__version__, listen=self._addresses(), state_dir=str(self._state_dir)
            )
            systemd.notify("READY=1")
            systemd.keep_alive()
            # What was made up to here stays for good: the collector need not walk it at every request.
            gc.freeze()
            gc.set_threshold(10_000, 20, 20)
            await self._stopping.wait()
            systemd.notify("STOPPING=1")
            if await systemd.goes_down():
                log.info("the machine goes down: containers are stopped")
                await self._containers.shut_down()
            else:
                log.info("netstored stops; containers and their traffic go on")
            await checks.enter_graceful_shutdown()
            await server.stop(_GRACE_SECONDS)
            await self._interceptor.finish()

    async def _serve_engines(self, stack: AsyncExitStack) -> None:
        """Listen for the engines whose adapters are configured."""
        adapters = self._config.adapters
        if adapters.cni:
            await stack.enter_async_context(programs.serve(Plugin(self._networks), self._run_dir / "cni.sock"))
        if adapters.netavark:
            netavark = Netavark(self._networks)
            await stack.enter_async_context(programs.serve(netavark, self._run_dir / "netavark.sock"))
        if adapters.hook:
            hook = Hook(self._networks, self._containers.places)
            await stack.enter_async_context(programs.serve(hook, self._run_dir / "hook.sock"))
        if adapters.docker:
            from netstore.adapters.docker import server as docker  # an HTTP server is many modules

            path = Path(adapters.docker.socket)
            await stack.enter_async_context(docker.serve(self._networks, self._volumes, path))
            if self._config.cluster:
                path = self._run_dir / "docker-swarm.sock"
                await stack.enter_async_context(docker.serve_swarm(self._networks, path))

    def _prepare(self, stack: AsyncExitStack) -> None:
        self._state_dir.mkdir(parents=True, exist_ok=True, mode=0o711)
        self._run_dir.mkdir(parents=True, exist_ok=True, mode=0o755)
        lock = stack.enter_context((self._state_dir / "lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise NetstoreError(
                f"another netstored uses {self._state_dir}", hint="stop it, or give this one another --state-dir"
            ) from error
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        quota.heed()

    def _build(self) -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
        server = grpc.aio.server(interceptors=[self._interceptor])
        network_pb2_grpc.add_NetworkServiceServicer_to_server(NetworkServicer(self._networks), server)
        endpoint_pb2_grpc.add_EndpointServiceServicer_to_server(EndpointServicer(self._networks), server)
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(PolicyServicer(self._networks, self._stopping), server)
        service_pb2_grpc.add_ServiceServiceServicer_to_server(ServiceServicer(self._networks), server)
        volume_pb2_grpc.add_VolumeServiceServicer_to_server(VolumeServicer(self._volumes, self._node_id), server)
        snapshot_pb2_grpc.add_SnapshotServiceServicer_to_server(SnapshotServicer(self._volumes), server)
        archives = Archives(self._volumes, self._state_dir)
        self._volumes.chores.sweeps.append(archives.expire)
        archive_pb2_grpc.add_ArchiveServiceServicer_to_server(ArchiveServicer(self._volumes, archives), server)
        container_pb2_grpc.add_ContainerServiceServicer_to_server(ContainerServicer(self._containers), server)
        mount_pb2_grpc.add_MountServiceServicer_to_server(MountServicer(self._containers.places), server)
        node_pb2_grpc.add_NodeServiceServicer_to_server(NodeServicer(self._networks), server)
        image_pb2_grpc.add_ImageServiceServicer_to_server(ImageServicer(self._containers.images), server)
        node = Node(self._info, self._check, self._usage, self._stopping)
        system_pb2_grpc.add_SystemServiceServicer_to_server(SystemServicer(self._store, node), server)
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        names = [module.DESCRIPTOR.services_by_name[name].full_name for module, name in _SERVICES.items()]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        for name in ("", *names):
            checks._server_status[name] = health_pb2.HealthCheckResponse.SERVING
        return server, checks

    def _addresses(self) -> list[str]:
        return self._config.listen or [f"unix://{self._run_dir}/netstore.sock"]

    async def _listen(self, server: grpc.aio.Server) -> None:
        for address in self._addresses():
            scheme, _, rest = address.partition("://")
            try:
                if scheme == "unix":
                    _listen_unix(server, Path(rest), self._config.group)
                elif scheme == "tcp":
                    server.add_secure_port(rest, self._credentials(address))
                else:
                    raise NetstoreError(f"listen: {address!r} is not accepted", hint="unix:///path or tcp://host:port")
            except RuntimeError as error:
                raise NetstoreError(f"listening on {address}: {error}", hint="is something else there?") from error

    def _credentials(self, address: str) -> grpc.ServerCredentials:
        tls = self._config.tls
        if tls is None:
            raise NetstoreError(
                f"listen: {address} needs certificates", hint="give [tls] cert, key and ca in the configuration"
            )
        pair = (Path(tls.key).read_bytes(), Path(tls.cert).read_bytes())
        return grpc.ssl_server_credentials([pair], Path(tls.ca).read_bytes(), require_client_auth=True)

    async def _check(self, repair: bool) -> list[Finding]:  # noqa: FBT001
        return [
            *await self._networks.check(repair=repair),
            *await self._volumes.check(repair=repair),
            *await self._containers.check(repair=repair),
        ]

    async def _usage(self) -> Sequence[Usage]:
        return [Usage(*row) for row in await self._containers.usage()]

    async def _info(self) -> system_pb2.GetInfoResponse:
        def count(tx: Transaction) -> dict[str, int]:
            return {
                "networks": tx.networks.count(),
                "endpoints": tx.endpoints.count(),
                "volumes": tx.volumes.count(),
                "containers": tx.containers.count(),
                "containers_running": tx.containers.count("json_extract(body, '$.state') = 'running'"),
                "images": tx.images.count(),
                "revision": tx.revision(),
            }

        connected = self._networks.resolver.connected
        warnings = [] if connected else ["netstore-resolver is not connected: names are not answered (start it)"]
        runtime = self._containers.runtime_version
        if not runtime:
            warnings.append("no OCI runtime: install crun and conmon to run containers")
        cluster = self._networks.cluster
        if cluster:
            warnings += await cluster.warnings()
        return system_pb2.GetInfoResponse(
            version=__version__,
            node_id=self._node_id,
            node_name=socket.gethostname(),
            kernel=platform.release(),
            network_drivers=self._networks.drivers,
            volume_drivers=self._volumes.drivers,
            runtime=runtime,
            state_dir=str(self._state_dir),
            run_dir=str(self._run_dir),
            resolver_connected=connected,
            warnings=warnings,
            cluster=await cluster_info(cluster) if cluster else None,
            **await self._store.read(count),
        )


def _resolver_command(config: Config) -> list[str]:
    """Return what starts netstore-resolver, [] where somebody else does.

    Raises:
        NetstoreError: an upstream is no address.
    """
    wanted = config.resolver
    for server in wanted.upstream:
        try:
            split_server(server)
        except (ValueError, OSError) as error:
            raise NetstoreError(
                f"resolver: upstream {server!r} is no name server", hint='write "10.0.0.53" or "[fd00::53]:5353"'
            ) from error
    if not wanted.manage:
        return []
    flags = {"state-dir": config.state_dir, "run-dir": config.run_dir, "group": config.group, "user": wanted.user,
             "resolv-conf": wanted.resolv_conf, "log-format": config.log_format}  # fmt: skip
    pairs = [*flags.items(), *(("upstream", server) for server in wanted.upstream)]
    program = Path(sys.executable).parent / "netstore-resolver"
    return [str(program), *(f"--{name}={value}" for name, value in pairs)]


def _node_id(tx: Transaction) -> str:
    if not tx.meta("node_id"):
        tx.set_meta("node_id", new_id())
    return tx.meta("node_id")


def _listen_unix(server: grpc.aio.Server, path: Path, group: str) -> None:
    """Listen on a socket that only root and the group may use, from the moment it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    mask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
    finally:
        os.umask(mask)
    os.chown(path, 0, _group(group))
    os.chmod(path, 0o660)


def _group(name: str) -> int:
    """Return the number of the group that may use us, root's where there is none."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        log.info("no such group: only root may use netstore", group=name)
        return 0


@click.command(context_settings={"max_content_width": 100})
@click.option(
    "--config", type=click.Path(path_type=Path), help="Configuration [default: /etc/netstore/netstored.toml]."
)
@click.option("--state-dir", help="Where durable state is [default: /var/lib/netstore].")
@click.option("--run-dir", help="Where sockets and pinned namespaces are [default: /run/netstore].")
@click.option("--listen", multiple=True, help="unix:///path or tcp://host:port; repeatable.")
@click.option("--log-format", type=click.Choice(["json", "console"]), help="Format of log lines.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Least level of log lines.")
@click.version_option(__version__)
def main(config: Path | None, listen: tuple[str, ...], **flags: str | None) -> None:
    """Give containers their networks and volumes."""
    try:
        settings = load(config or Path("/etc/netstore/netstored.toml"), required=config is not None)
        given = {name: value for name, value in flags.items() if value}
        settings = msgspec.structs.replace(settings, **given, **({"listen": list(listen)} if listen else {}))
        logs.configure(settings.log_format, settings.log_level)
        # Threads hand work to each other many times a request; the default lets one keep the others waiting for 5 ms.
        sys.setswitchinterval(0.0002)
        asyncio.run(Daemon(settings).run())
    except NetstoreError as error:
        click.echo(f"netstored: {error.what}", err=True)
        if error.hint:
            click.echo(f"  hint: {error.hint}", err=True)
        sys.exit(1)
