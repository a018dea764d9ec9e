"""The connection to netstored, and how its errors are shown.

Exit statuses: 0 success; 1 netstored refused or failed; 2 usage; 3 netstored is not reachable; for run and exec 125
when netstore failed, 126 and 127 when the command cannot be run or is not found, else the command's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
import grpc

__all__ = ["FAILED", "UNREACHABLE", "Client", "details", "fail", "pages", "pass_client", "tolerant"]

FAILED, UNREACHABLE = 1, 3
T = TypeVar("T")


class Client:
    """A channel to one netstored, opened at first use; stubs are made by their service's name."""

    def __init__(self, address: str, certificates: tuple[str, str, str] = ("", "", "")) -> None:
        """`certificates` are files (PEM) for TCP: the authority's, ours, and our key."""
        self.address = address if "://" in address else f"unix://{address}"
        self._certificates = certificates
        self._channel: grpc.Channel | None = None

    @property
    def channel(self) -> grpc.Channel:
        """The channel: a unix socket, or TCP with mutual TLS."""
        if self._channel is None:
            scheme, _, rest = self.address.partition("://")
            if scheme == "unix":
                self._channel = grpc.insecure_channel(f"unix:{rest}")
            elif scheme == "tcp":
                self._channel = grpc.secure_channel(rest, self._credentials())
            else:
                raise click.UsageError(f"--host: {self.address!r} is not unix:///path or tcp://host:port")
        return self._channel

    def _credentials(self) -> grpc.ChannelCredentials:
        try:
            authority, certificate, key = (Path(name).read_bytes() for name in self._certificates)
        except OSError as error:
            raise click.UsageError(
                f"{self.address} takes mutual TLS alone: {error.strerror}: {error.filename or 'no file given'}; give "
                "--tlscacert, --tlscert and --tlskey, or NETSTORE_CERT_PATH with ca.pem, cert.pem and key.pem"
            ) from error
        return grpc.ssl_channel_credentials(authority, key, certificate)

    @property
    def networks(self) -> Any:
        """The NetworkService."""
        from netstore.api.v1.network_pb2_grpc import NetworkServiceStub

        return NetworkServiceStub(self.channel)

    @property
    def endpoints(self) -> Any:
        """The EndpointService."""
        from netstore.api.v1.endpoint_pb2_grpc import EndpointServiceStub

        return EndpointServiceStub(self.channel)

    @property
    def policies(self) -> Any:
        """The PolicyService."""
        from netstore.api.v1.policy_pb2_grpc import PolicyServiceStub

        return PolicyServiceStub(self.channel)

    @property
    def volumes(self) -> Any:
        """The VolumeService."""
        from netstore.api.v1.volume_pb2_grpc import VolumeServiceStub

        return VolumeServiceStub(self.channel)

    @property
    def snapshots(self) -> Any:
        """The SnapshotService."""
        from netstore.api.v1.snapshot_pb2_grpc import SnapshotServiceStub

        return SnapshotServiceStub(self.channel)

    @property
    def archives(self) -> Any:
        """The ArchiveService."""
        from netstore.api.v1.archive_pb2_grpc import ArchiveServiceStub

        return ArchiveServiceStub(self.channel)

    @property
    def containers(self) -> Any:
        """The ContainerService."""
        from netstore.api.v1.container_pb2_grpc import ContainerServiceStub

        return ContainerServiceStub(self.channel)

    @property
    def images(self) -> Any:
        """The ImageService."""
        from netstore.api.v1.image_pb2_grpc import ImageServiceStub

        return ImageServiceStub(self.channel)

    @property
    def mounts(self) -> Any:
        """The MountService."""
        from netstore.api.v1.mount_pb2_grpc import MountServiceStub

        return MountServiceStub(self.channel)

    @property
    def nodes(self) -> Any:
        """The NodeService."""
        from netstore.api.v1.node_pb2_grpc import NodeServiceStub

        return NodeServiceStub(self.channel)

    @property
    def system(self) -> Any:
        """The SystemService."""
        from netstore.api.v1.system_pb2_grpc import SystemServiceStub

        return SystemServiceStub(self.channel)


pass_client = click.make_pass_decorator(Client)


def details(error: grpc.RpcError) -> tuple[str, dict[str, str]]:
    """Return an error's message and the metadata of its ErrorInfo, `hint` and `reason` among them."""
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status

    status = rpc_status.from_call(error)
    metadata: dict[str, str] = {}
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            metadata = {**info.metadata, "reason": info.reason}
    return error.details() or str(error.code()), metadata


def fail(error: grpc.RpcError, client: Client, *, status: int = FAILED) -> NoReturn:
    """Show an error and leave."""
    sys.exit(show(error, client, status=status))


def show(error: grpc.RpcError, client: Client, *, status: int = FAILED) -> int:
    """Show an error on standard error and return the exit status that goes with it."""
    message, metadata = details(error)
    if error.code() is grpc.StatusCode.UNAVAILABLE and not metadata:
        message = f"netstored is not reachable at {client.address}"
        metadata = {"hint": "start it (systemctl start netstored), or name another with --host or NETSTORE_HOST"}
        status = UNREACHABLE if status == FAILED else status
    click.echo(f"netstore: {message}", err=True)
    if metadata.get("hint"):
        click.echo(f"  hint: {metadata['hint']}", err=True)
    return status


@contextmanager
def tolerant(client: Client) -> Iterator[Callable[[Callable[[], object]], bool]]:
    """Give a function that runs one of several calls, shows its error and says whether it succeeded.

    When one failed, the exit status is 1 in the end.
    """
    statuses: list[int] = []

    def attempt(call: Callable[[], object]) -> bool:
        try:
            call()
        except grpc.RpcError as error:
            statuses.append(show(error, client))
            return False
        return True

    yield attempt
    if statuses:
        sys.exit(statuses[0])


def pages(call: Callable[[Any], Any], request: Any, field: str) -> list[Any]:
    """Return the items of every page of a list."""
    items: list[Any] = []
    request.page_size = 500
    while True:
        response = call(request)
        items += getattr(response, field)
        if not response.next_page_token:
            return items
        request.page_token = response.next_page_token
