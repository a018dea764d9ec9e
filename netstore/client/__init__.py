"""The client of netstored for Python programs: the stubs of the contract, typed, over one connection.

    async with Client("unix:///run/netstore/netstore.sock") as client:
        request = network_pb2.CreateNetworkRequest(network=network_pb2.Network(name="app"))
        try:
            network = (await client.networks.CreateNetwork(request)).network
        except grpc.aio.AioRpcError as error:
            print(Problem.of(error).hint)

`BlockingClient` is the same without asyncio; the CLI is made with it. See docs/howto/use-the-python-client.md.
"""

from netstore.client.connection import DEFAULT_ADDRESS, AddressError, BlockingClient, Client, pages
from netstore.client.problems import Problem

__all__ = ["DEFAULT_ADDRESS", "AddressError", "BlockingClient", "Client", "Problem", "pages"]
