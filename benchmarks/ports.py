"""Publishing a port through gRPC with 0, 1,000 and 20,000 ports published: what it costs, and that it stays flat."""

from __future__ import annotations

import sys
from pathlib import Path

from common import measure, sh, show, start_netstore

from netstore.api.v1 import common_pb2, endpoint_pb2, network_pb2

BATCH, ROUNDS = 500, 100


def main() -> None:
    """Print the table."""
    client = start_netstore(Path(sys.argv[1]))
    client.networks.CreateNetwork(network_pb2.CreateNetworkRequest(network={"name": "bench"}))
    endpoints = client.endpoints
    made = []
    for index in range(41):  # a row of an endpoint carries its ports: 500 on each
        sh(f"ip netns add c{index}")
        spec = {"network": "bench", "sandbox": {"netns_path": f"/run/netns/c{index}"}}
        made.append(endpoints.AttachEndpoint(endpoint_pb2.AttachEndpointRequest(endpoint={"spec": spec})).endpoint.id)

    def fill(first: int, last: int) -> None:
        for start in range(first, last, BATCH):
            ports = [
                common_pb2.PortMapping(host_port=10000 + n, container_port=80) for n in range(start, start + BATCH)
            ]
            endpoints.PublishPorts(endpoint_pb2.PublishPortsRequest(endpoint=made[start // BATCH], ports=ports))

    print(f"{'ms':<52}{'p50':>9}{'min':>9}{'p95':>9}")
    figures = []
    for before, there in ((0, 0), (0, 1000), (1000, 20000)):
        fill(before, there)
        offset = 40000 + there // 100
        batch = [common_pb2.PortMapping(host_port=offset + n, container_port=80) for n in range(ROUNDS)]

        def publish(index: int, ports: list[common_pb2.PortMapping] = batch) -> None:
            request = endpoint_pb2.PublishPortsRequest(endpoint=made[-1], ports=[ports[index]])
            endpoints.PublishPorts(request)

        figures.append(show(f"publish with {there} ports published (to hold: 2)", measure(publish, ROUNDS)))
        endpoints.UnpublishPorts(endpoint_pb2.UnpublishPortsRequest(endpoint=made[-1], ports=batch))
    print(f"{'':<52}{figures[2] / figures[0]:>9.2f} with 20,000 against with none")


main()
