"""What a container engine does: attach a network namespace of its own to a network: attach.py ADDRESS NETWORK NETNS."""

import sys

import grpc

from netstore.api.v1 import endpoint_pb2, endpoint_pb2_grpc

address, network, netns = sys.argv[1:4]
with grpc.insecure_channel(address) as channel:
    endpoints = endpoint_pb2_grpc.EndpointServiceStub(channel)
    sandbox = endpoint_pb2.SandboxRef(netns_path=netns)
    spec = endpoint_pb2.EndpointSpec(network=network, sandbox=sandbox, name="engine")
    request = endpoint_pb2.AttachEndpointRequest(endpoint=endpoint_pb2.Endpoint(spec=spec))
    status = endpoints.AttachEndpoint(request).endpoint.status
    print(status.interface_name, status.addresses[0], "via", status.gateway)
