"""An engine's first steps, with netstore.client: client.py ADDRESS NETWORK NETNS.

Lists networks, makes one, attaches a network namespace, watches what happened, takes everything away.
"""

import asyncio
import sys

from netstore.api.v1 import common_pb2, endpoint_pb2, network_pb2
from netstore.client import Client


async def main(address: str, name: str, netns: str) -> None:
    async with Client(address) as client:
        pages = client.pages(
            client.networks.ListNetworks, network_pb2.ListNetworksRequest(), lambda page: page.networks
        )
        print("networks:", *[network.name async for network in pages])
        network = network_pb2.Network(name=name, labels={"made-by": "python"})
        created = await client.networks.CreateNetwork(network_pb2.CreateNetworkRequest(network=network))
        print("created", created.network.name)

        spec = endpoint_pb2.EndpointSpec(network=name, sandbox=endpoint_pb2.SandboxRef(netns_path=netns))
        request = endpoint_pb2.AttachEndpointRequest(endpoint=endpoint_pb2.Endpoint(spec=spec))
        endpoint = (await client.endpoints.AttachEndpoint(request)).endpoint
        print("attached", endpoint.status.interface_name, *endpoint.status.addresses)

        async for event in client.events(revision=0):
            if event.resource_id in (created.network.id, endpoint.id):
                print("event", common_pb2.ResourceKind.Name(event.kind), event.action)
            if event.resource_id == endpoint.id:
                break
        await client.endpoints.DetachEndpoint(endpoint_pb2.DetachEndpointRequest(endpoint=endpoint.id))
        await client.networks.DeleteNetwork(network_pb2.DeleteNetworkRequest(network=name))
        print("removed", name)


asyncio.run(main(*sys.argv[1:4]))
