"""netstore completion: shell completion, and names completed by asking the daemon."""

from __future__ import annotations

from typing import Any

import click

from netstore.cli.commands import Command

__all__ = ["command", "names"]


def names(kind: str) -> Any:
    """Return a completer of the names of networks, volumes, containers or images; silent when nobody answers."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        from netstore.cli.client import Client

        root = ctx.find_root()
        client = root.obj or Client(root.params.get("host") or "unix:///run/netstore/netstore.sock")
        try:
            found = _ask(client, kind)
        except Exception:
            return []
        return [name for name in found if name.startswith(incomplete)]

    return complete


def _ask(client: Any, kind: str) -> list[str]:
    from netstore.api.v1 import container_pb2, image_pb2, network_pb2, node_pb2, policy_pb2, service_pb2, volume_pb2

    match kind:
        case "network":
            return [n.name for n in client.networks.ListNetworks(network_pb2.ListNetworksRequest(), timeout=1).networks]
        case "policy":
            return [p.name for p in client.policies.ListPolicies(policy_pb2.ListPoliciesRequest(), timeout=1).policies]
        case "service":
            request = service_pb2.ListServicesRequest()
            return [s.name for s in client.services.ListServices(request, timeout=1).services]
        case "volume":
            return [v.name for v in client.volumes.ListVolumes(volume_pb2.ListVolumesRequest(), timeout=1).volumes]
        case "node":
            return [n.name for n in client.nodes.ListNodes(node_pb2.ListNodesRequest(), timeout=1).nodes]
        case "image":
            return [i.name for i in client.images.ListImages(image_pb2.ListImagesRequest(), timeout=1).images]
        case _:
            everything = container_pb2.ListContainersRequest(all=True)
            return [c.name for c in client.containers.ListContainers(everything, timeout=1).containers]


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print a completion script: `source <(netstore completion bash)`."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(ctx.find_root().command, {}, "netstore", "_NETSTORE_COMPLETE").source())
