"""The program netstore-csi: CSI's three services on one socket, for the orchestrator's agent on the node."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import click
import grpc
import structlog
from google.protobuf.wrappers_pb2 import BoolValue

from netstore import __version__, logs, systemd
from netstore.adapters.csi.controller import Controller
from netstore.adapters.csi.node import Node
from netstore.adapters.csi.pb import csi_pb2 as csi
from netstore.adapters.csi.pb import csi_pb2_grpc
from netstore.api.v1.system_pb2 import GetInfoRequest
from netstore.client import DEFAULT_ADDRESS, Client
from netstore.networks.context import KeyedLocks
from netstore.rpc.errors import ErrorInterceptor

__all__ = ["main"]

_NAME = "netstore.csi"
_PROBE_SECONDS = 1.0

log = structlog.get_logger(__name__)


class Identity(csi_pb2_grpc.IdentityServicer):
    """Implements `csi.v1.Identity`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def GetPluginInfo(self, request: Any, context: Any) -> csi.GetPluginInfoResponse:
        return csi.GetPluginInfoResponse(name=_NAME, vendor_version=__version__)

    async def GetPluginCapabilities(self, request: Any, context: Any) -> csi.GetPluginCapabilitiesResponse:
        service, expansion = csi.PluginCapability.Service, csi.PluginCapability.VolumeExpansion
        return csi.GetPluginCapabilitiesResponse(
            capabilities=[
                csi.PluginCapability(service=service(type=service.CONTROLLER_SERVICE)),
                csi.PluginCapability(service=service(type=service.VOLUME_ACCESSIBILITY_CONSTRAINTS)),
                csi.PluginCapability(volume_expansion=expansion(type=expansion.ONLINE)),
            ]
        )

    async def Probe(self, request: Any, context: Any) -> csi.ProbeResponse:
        try:
            await self._client.system.GetInfo(GetInfoRequest(), timeout=_PROBE_SECONDS, wait_for_ready=True)
        except grpc.aio.AioRpcError:
            return csi.ProbeResponse(ready=BoolValue(value=False))
        return csi.ProbeResponse(ready=BoolValue(value=True))


async def _serve(endpoint: str, address: str) -> None:
    async with Client(address) as client:
        node_id = (await client.system.GetInfo(GetInfoRequest(), wait_for_ready=True)).node_id
        errors, locks = ErrorInterceptor("csi.v1.", hints=True), KeyedLocks()
        server = grpc.aio.server(interceptors=[errors])
        csi_pb2_grpc.add_IdentityServicer_to_server(Identity(client), server)
        csi_pb2_grpc.add_ControllerServicer_to_server(Controller(client, node_id, locks), server)
        csi_pb2_grpc.add_NodeServicer_to_server(Node(client, node_id, locks), server)
        mask = os.umask(0o177)
        try:
            server.add_insecure_port(endpoint.replace("unix://", "unix:"))
        finally:
            os.umask(mask)
        await server.start()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        log.info("netstore-csi is ready", version=__version__, endpoint=endpoint, node=node_id)
        systemd.notify("READY=1")
        await stop.wait()
        await server.stop(grace=5)
        await errors.finish()


@click.command()
@click.option("--endpoint", envvar="CSI_ENDPOINT", default="unix:///run/netstore/csi.sock", show_default=True,
              help="unix:///PATH on which CSI is answered; also $CSI_ENDPOINT.")  # fmt: skip
@click.option("-H", "--host", "address", envvar="NETSTORE_HOST", default=DEFAULT_ADDRESS, show_default=True,
              help="The socket of netstored; also $NETSTORE_HOST.")  # fmt: skip
@click.option("--log-format", type=click.Choice(["json", "console"]), default="console", show_default=True)
@click.version_option(__version__)
def main(endpoint: str, address: str, log_format: str) -> None:
    """Answer the Container Storage Interface for the volumes of this node's netstored."""
    logs.configure(log_format, "info")
    if not endpoint.startswith("unix:///"):
        click.echo(f"netstore-csi: --endpoint: {endpoint!r} is not accepted: unix:///PATH", err=True)
        sys.exit(2)
    path = Path(endpoint.removeprefix("unix://"))
    path.unlink(missing_ok=True)
    try:
        asyncio.run(_serve(endpoint, address))
    finally:
        path.unlink(missing_ok=True)
