"""netstore inspect: any resource by name or id."""

from __future__ import annotations

from typing import Any

import click
import grpc

from netstore.api.v1 import container_pb2, image_pb2, network_pb2, policy_pb2, service_pb2, volume_pb2
from netstore.cli.client import Client, fail, pass_client
from netstore.cli.commands import Command
from netstore.cli.completion import names
from netstore.cli.format import show_objects

__all__ = ["command"]

_KINDS = ("container", "image", "network", "volume", "policy", "service")


@click.command("inspect", cls=Command)
@click.argument("resources", nargs=-1, required=True, shell_complete=names("container"))
@click.option("--type", "kind", type=click.Choice(_KINDS), help="Only this kind.")
@click.option("-f", "--format", "template", default="json", help="'json' (default), or a template.")
@pass_client
def command(client: Client, resources: tuple[str, ...], kind: str | None, template: str) -> None:
    """Show containers, images, networks, volumes, policies or services in full: the first kind that has the name."""
    show_objects([_find(client, each, (kind,) if kind else _KINDS) for each in resources], template)


def _find(client: Client, name: str, kinds: tuple[str, ...]) -> Any:
    calls: dict[str, Any] = {
        "container": lambda: (
            client.containers.GetContainer(container_pb2.GetContainerRequest(container=name)).container
        ),
        "image": lambda: client.images.GetImage(image_pb2.GetImageRequest(image=name)).image,
        "network": lambda: client.networks.GetNetwork(network_pb2.GetNetworkRequest(network=name)).network,
        "volume": lambda: client.volumes.GetVolume(volume_pb2.GetVolumeRequest(volume=name)).volume,
        "policy": lambda: client.policies.GetPolicy(policy_pb2.GetPolicyRequest(policy=name)).policy,
        "service": lambda: client.services.GetService(service_pb2.GetServiceRequest(service=name)).service,
    }
    for kind in kinds:
        try:
            return calls[kind]()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND or (kind == kinds[-1] and len(kinds) == 1):
                fail(error, client)
    raise click.ClickException(f"no such container, image, network, volume, policy or service: {name}")
