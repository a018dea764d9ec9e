"""The sockets on which dockerd calls: JSON over HTTP, as its plugin protocol has it.

What cannot be read is an HTTP error, what is refused is 200 with "Err" (libnetwork's remote.md, "Errors").
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog
from aiohttp import web

from netstore.adapters.docker.ipam import IpamDriver
from netstore.adapters.docker.messages import (
    AddressRequest,
    EndpointCall,
    NetworkAllocation,
    NetworkCall,
    NetworkCreate,
    Nothing,
    PoolRequest,
    VolumeCall,
    VolumeCreate,
)
from netstore.adapters.docker.network import NetworkDriver
from netstore.adapters.docker.swarm import SwarmDriver
from netstore.adapters.docker.volume import VolumeDriver
from netstore.adapters.sockets import bind_private, unbind
from netstore.errors import NetstoreError
from netstore.networks.manager import NetworkManager
from netstore.volumes.manager import VolumeManager

__all__ = ["serve", "serve_swarm"]

_MOST, _BACKLOG, _FINISH_SECONDS = 1 << 20, 4096, 10.0
_TYPE = "application/vnd.docker.plugins.v1.1+json"

log = structlog.get_logger(__name__)
M = TypeVar("M", bound=msgspec.Struct)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serve(networks: NetworkManager, volumes: VolumeManager, path: Path) -> AsyncIterator[None]:
    """Answer a dockerd's calls on a socket that is root's alone. In the end what has begun runs to its end.

    Raises:
        OSError: the socket cannot be made.
    """
    async with _listen([*_network_routes(NetworkDriver(networks), networks), *_volume_routes(volumes)], path):
        yield


@asynccontextmanager
async def serve_swarm(networks: NetworkManager, path: Path) -> AsyncIterator[None]:
    """Answer, likewise, what is called for the networks of a swarm.

    Raises:
        OSError: the socket cannot be made.
    """
    swarm = SwarmDriver(networks)
    own = [
        _route("NetworkDriver.AllocateNetwork", NetworkAllocation, swarm.allocate),
        _route("NetworkDriver.FreeNetwork", NetworkCall, swarm.free),
    ]
    async with _listen([*_network_routes(swarm, networks), *own], path):
        yield


@asynccontextmanager
async def _listen(routes: list[web.RouteDef], path: Path) -> AsyncIterator[None]:
    app = web.Application(client_max_size=_MOST, middlewares=[_errors])
    app.add_routes(routes)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=_FINISH_SECONDS)
    await runner.setup()
    path.parent.mkdir(parents=True, exist_ok=True)
    await web.SockSite(runner, bind_private(path), backlog=_BACKLOG).start()
    try:
        yield
    finally:
        unbind(path)
        await runner.cleanup()


def _network_routes(network: NetworkDriver, networks: NetworkManager) -> list[web.RouteDef]:
    ipam = IpamDriver(networks)
    return [
        _route("NetworkDriver.GetCapabilities", Nothing, network.capabilities),
        _route("NetworkDriver.CreateNetwork", NetworkCreate, network.create),
        _route("NetworkDriver.DeleteNetwork", NetworkCall, network.delete),
        _route("NetworkDriver.CreateEndpoint", EndpointCall, network.create_endpoint),
        _route("NetworkDriver.DeleteEndpoint", EndpointCall, network.delete_endpoint),
        _route("NetworkDriver.EndpointOperInfo", EndpointCall, network.information),
        _route("NetworkDriver.Join", EndpointCall, network.join),
        _route("NetworkDriver.Leave", EndpointCall, network.leave),
        _route("NetworkDriver.ProgramExternalConnectivity", EndpointCall, network.publish),
        _route("NetworkDriver.RevokeExternalConnectivity", EndpointCall, network.unpublish),
        _route("NetworkDriver.DiscoverNew", Nothing, network.discover),
        _route("NetworkDriver.DiscoverDelete", Nothing, network.discover),
        _route("IpamDriver.GetCapabilities", Nothing, ipam.capabilities),
        _route("IpamDriver.GetDefaultAddressSpaces", Nothing, ipam.spaces),
        _route("IpamDriver.RequestPool", PoolRequest, ipam.request_pool),
        _route("IpamDriver.ReleasePool", AddressRequest, ipam.release_pool),
        _route("IpamDriver.RequestAddress", AddressRequest, ipam.request_address),
        _route("IpamDriver.ReleaseAddress", AddressRequest, ipam.release_address),
    ]


def _volume_routes(volumes: VolumeManager) -> list[web.RouteDef]:
    volume = VolumeDriver(volumes)
    return [
        _route("Plugin.Activate", Nothing, _activate),
        _route("VolumeDriver.Capabilities", Nothing, volume.capabilities),
        _route("VolumeDriver.Create", VolumeCreate, volume.create),
        _route("VolumeDriver.Remove", VolumeCall, volume.remove),
        _route("VolumeDriver.Mount", VolumeCall, volume.mount),
        _route("VolumeDriver.Unmount", VolumeCall, volume.unmount),
        _route("VolumeDriver.Path", VolumeCall, volume.path),
        _route("VolumeDriver.Get", VolumeCall, volume.get),
        _route("VolumeDriver.List", Nothing, volume.list),
    ]


async def _activate(_: Nothing) -> dict[str, Any]:
    return {"Implements": ["NetworkDriver", "IpamDriver", "VolumeDriver"]}


def _route(method: str, message: type[M], verb: Callable[[M], Awaitable[dict[str, Any]]]) -> web.RouteDef:
    async def handle(request: web.Request) -> web.Response:
        structlog.contextvars.bind_contextvars(method=method)
        body = await request.read()
        call = message() if message is Nothing else msgspec.json.decode(body, type=message)
        return _response(await verb(call))

    return web.post(f"/{method}", handle)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except NetstoreError as error:
        log.info("refused", error=str(error))
        return _response({"Err": str(error)})
    except (msgspec.DecodeError, RecursionError) as error:
        return _response({"Err": f"the call is not accepted: {error}"}, status=400)
    except web.HTTPRequestEntityTooLarge:
        return _response({"Err": f"the call is longer than {_MOST >> 20} MiB"}, status=413)
    except web.HTTPException as error:
        return _response({"Err": f"{request.method} {request.path[:200]}: {error.reason}"}, status=error.status)
    except Exception as error:
        log.exception("defect")
        return _response({"Err": f"a defect in netstored, please report it: {error!r}"}, status=500)


def _response(answer: dict[str, Any], *, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(answer), status=status, content_type=_TYPE)
