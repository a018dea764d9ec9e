"""Requests with a bad value: the answer names field and value, and nothing changes; for tests of them."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
from conftest import Node
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from netstore.api.v1 import common_pb2
from netstore.client import BlockingClient as Client

__all__ = [
    "ABORTED",
    "EXHAUSTED",
    "EXISTS",
    "INVALID",
    "MISSING",
    "PRECONDITION",
    "UNIMPLEMENTED",
    "mask",
    "port",
    "refused",
    "state",
]

INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
PRECONDITION, EXISTS = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ALREADY_EXISTS
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
UNIMPLEMENTED, ABORTED = grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.ABORTED


def port(**fields):
    return [common_pb2.PortMapping(**{"container_port": 80, **fields})]


def mask(*paths: str) -> FieldMask:
    return FieldMask(paths=paths)


def _call(stub: object, method: str, request: object) -> None:
    rpc = getattr(stub, method)
    answer = rpc(iter(request)) if isinstance(request, list) else rpc(request)
    if isinstance(answer, Iterator):
        list(answer)


def state(node: Node) -> str:
    """Everything that a refused request must not change."""
    kernel = node.host.sh("ip -o link | sed 's/ <.*//; s/^[0-9]*//; s/@.*//'; nft list ruleset; ls -R /run/netns")
    files = [
        str(path)
        for name in ("state/volumes", "state/uploads", "state/containers", "run/netns")
        for path in (node.place / name).rglob("*")
    ]
    newest = node.out("system", "info", "-f", "{{.Revision}}")
    return "\n".join([kernel, *sorted(files), newest])


def refused(node: Node, client: Client, service: str, table: list) -> None:
    """Make requests of a service: (method, request, code, what is named) of each."""
    node.host.netns("c")
    before = state(node)
    stub = getattr(client, service)
    problems = []
    for method, request, code, named in table:
        try:
            _call(stub, method, request)
            problems.append(f"{method} {request}: accepted")
            continue
        except grpc.RpcError as error:
            status = rpc_status.from_call(error)
            info = error_details_pb2.ErrorInfo()
            if error.code() is not code or status is None or not status.details[0].Unpack(info):
                problems.append(f"{method} {request}: {error.code()} {error.details()}")
            elif named not in f"{error.details()} {dict(info.metadata)}" or info.domain != "netstore":
                problems.append(f"{method} {request}: does not name {named}: {error.details()}")
    assert problems == []
    assert state(node) == before
