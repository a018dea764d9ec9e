"""The connection to one netstored, opened at first use, and the stubs of its services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar, cast, overload

import grpc

from netstore.client.problems import Problem

if TYPE_CHECKING:  # a stub's module is imported when it is used: most of a short program's time is imports
    from netstore.api.v1.archive_pb2_grpc import ArchiveServiceAsyncStub, ArchiveServiceStub
    from netstore.api.v1.common_pb2 import Event
    from netstore.api.v1.container_pb2_grpc import ContainerServiceAsyncStub, ContainerServiceStub
    from netstore.api.v1.endpoint_pb2_grpc import EndpointServiceAsyncStub, EndpointServiceStub
    from netstore.api.v1.image_pb2_grpc import ImageServiceAsyncStub, ImageServiceStub
    from netstore.api.v1.mount_pb2_grpc import MountServiceAsyncStub, MountServiceStub
    from netstore.api.v1.network_pb2_grpc import NetworkServiceAsyncStub, NetworkServiceStub
    from netstore.api.v1.node_pb2_grpc import NodeServiceAsyncStub, NodeServiceStub
    from netstore.api.v1.policy_pb2_grpc import PolicyServiceAsyncStub, PolicyServiceStub
    from netstore.api.v1.service_pb2_grpc import ServiceServiceAsyncStub, ServiceServiceStub
    from netstore.api.v1.snapshot_pb2_grpc import SnapshotServiceAsyncStub, SnapshotServiceStub
    from netstore.api.v1.system_pb2_grpc import SystemServiceAsyncStub, SystemServiceStub
    from netstore.api.v1.volume_pb2_grpc import VolumeServiceAsyncStub, VolumeServiceStub

__all__ = ["DEFAULT_ADDRESS", "AddressError", "BlockingClient", "Client", "pages"]

DEFAULT_ADDRESS = "unix:///run/netstore/netstore.sock"
_PAGE, _RECONNECT_SECONDS = 500, 0.2
_OPTIONS = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000))
"""A netstored that restarts is found again within a second, also by those that call rarely."""

B = TypeVar("B")
A = TypeVar("A")
T = TypeVar("T")
Request = TypeVar("Request")


class Paged(Protocol):
    """The response of a List."""

    @property
    def next_page_token(self) -> str:
        """Where the next page begins, "" after the last one."""


Page = TypeVar("Page", bound=Paged)


class AddressError(ValueError):
    """The address, or a file of the certificates, cannot be used."""


class _Service(Generic[B, A]):
    """The stub of a service: `B` of a blocking client, `A` of an asynchronous one."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self._noun = "policy" if name == "policies" else name.removesuffix("s") if name != "system" else name

    @overload
    def __get__(self, client: BlockingClient, owner: type) -> B: ...
    @overload
    def __get__(self, client: Client, owner: type) -> A: ...
    def __get__(self, client: BlockingClient | Client, owner: type) -> B | A:
        module = import_module(f"netstore.api.v1.{self._noun}_pb2_grpc")
        stub = getattr(module, f"{self._noun.title()}ServiceStub")(client.channel)
        vars(client)[self._name] = stub  # found there from now on
        return cast("B | A", stub)


class _Connection:
    """What both clients have: the address, the certificates, and the services."""

    networks: _Service[NetworkServiceStub, NetworkServiceAsyncStub] = _Service()
    endpoints: _Service[EndpointServiceStub, EndpointServiceAsyncStub] = _Service()
    policies: _Service[PolicyServiceStub, PolicyServiceAsyncStub] = _Service()
    services: _Service[ServiceServiceStub, ServiceServiceAsyncStub] = _Service()
    volumes: _Service[VolumeServiceStub, VolumeServiceAsyncStub] = _Service()
    snapshots: _Service[SnapshotServiceStub, SnapshotServiceAsyncStub] = _Service()
    archives: _Service[ArchiveServiceStub, ArchiveServiceAsyncStub] = _Service()
    mounts: _Service[MountServiceStub, MountServiceAsyncStub] = _Service()
    containers: _Service[ContainerServiceStub, ContainerServiceAsyncStub] = _Service()
    images: _Service[ImageServiceStub, ImageServiceAsyncStub] = _Service()
    nodes: _Service[NodeServiceStub, NodeServiceAsyncStub] = _Service()
    system: _Service[SystemServiceStub, SystemServiceAsyncStub] = _Service()

    def __init__(self, address: str = DEFAULT_ADDRESS, certificates: tuple[str, str, str] = ("", "", "")) -> None:
        """`address` is unix:///path, a path, or tcp://host:port, which takes mutual TLS alone: `certificates` are files
        (PEM), the authority's, ours, and our key.
        """
        self.address = address if "://" in address else f"unix://{address}"
        self._certificates = certificates

    def _open(self, plain: Callable[..., T], secure: Callable[..., T]) -> T:
        scheme, _, rest = self.address.partition("://")
        if scheme == "unix":
            return plain(f"unix:{rest}", options=_OPTIONS)
        if scheme == "tcp":
            return secure(rest, self._credentials(), options=_OPTIONS)
        raise AddressError(f"{self.address!r} is not unix:///path or tcp://host:port")

    def _credentials(self) -> grpc.ChannelCredentials:
        if "" in self._certificates:
            raise AddressError(f"{self.address} takes mutual TLS alone, and no certificates are given")
        try:
            authority, certificate, key = (Path(name).read_bytes() for name in self._certificates)
        except OSError as error:
            raise AddressError(f"{self.address} takes mutual TLS alone: {error.strerror}: {error.filename}") from error
        return grpc.ssl_channel_credentials(authority, key, certificate)


class BlockingClient(_Connection):
    """A client whose calls block; safe to share between threads."""

    @cached_property
    def channel(self) -> grpc.Channel:
        """The channel, opened now.

        Raises:
            AddressError: there can be none.
        """
        return self._open(grpc.insecure_channel, grpc.secure_channel)


class Client(_Connection):
    """A client for asyncio, used in the loop that first calls it; leave it with `async with` or `close`."""

    @cached_property
    def channel(self) -> grpc.aio.Channel:
        """The channel, opened now.

        Raises:
            AddressError: there can be none.
        """
        return self._open(grpc.aio.insecure_channel, grpc.aio.secure_channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls that run are cancelled."""
        if "channel" in vars(self):
            await self.channel.close()

    async def pages(
        self,
        call: grpc.aio.UnaryUnaryMultiCallable[Request, Page],
        request: Request,
        pick: Callable[[Page], Iterable[T]],
    ) -> AsyncIterator[T]:
        """Give the items of every page of a list: `client.pages(stub.ListNetworks, request, lambda r: r.networks)`."""
        asked: Any = request
        asked.page_size = asked.page_size or _PAGE
        while True:
            response = await call(request)
            for item in pick(response):
                yield item
            if not response.next_page_token:
                return
            asked.page_token = response.next_page_token

    async def events(self, *, revision: int | None = None, filter: Sequence[str] = ()) -> AsyncIterator[Event]:
        """Give every change after a revision, or from now on, for ever: it waits while netstored is away, and goes on
        where it was.

        Raises:
            grpc.aio.AioRpcError: the filter is not accepted, or the history does not reach back to the revision
                (OUT_OF_RANGE: list everything, then begin anew).
        """
        from netstore.api.v1.system_pb2 import GetInfoRequest, WatchEventsRequest

        if revision is None:
            revision = (await self.system.GetInfo(GetInfoRequest(), wait_for_ready=True)).revision
        while True:
            request = WatchEventsRequest(revision=revision, filter=filter)
            try:
                async for response in self.system.WatchEvents(request, wait_for_ready=True):
                    revision = response.event.revision
                    yield response.event
            except grpc.aio.AioRpcError as error:
                if not Problem.of(error).unreachable:
                    raise
            await asyncio.sleep(_RECONNECT_SECONDS)


def pages(call: Callable[[Any], Any], request: Any, field: str) -> list[Any]:
    """Return the items of every page of a list, blocking."""
    items: list[Any] = []
    request.page_size = request.page_size or _PAGE
    while True:
        response = call(request)
        items += getattr(response, field)
        if not response.next_page_token:
            return items
        request.page_token = response.next_page_token
