"""Streams of a process: what comes after the first request of ExecContainer and AttachContainer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TypeVar

from netstore.api.v1 import container_pb2 as pb
from netstore.errors import InvalidArgument
from netstore.launcher.terminals import Input, Size

__all__ = ["first_of", "given", "to_size"]

_LARGEST = 65535
R = TypeVar("R", pb.ExecContainerRequest, pb.AttachContainerRequest)
_Sized = pb.ExecStart | pb.AttachStart | pb.ExecContainerRequest | pb.AttachContainerRequest


async def first_of(requests: AsyncIterator[R], says: str) -> R:
    """Return the first request, which says what it is about."""
    first = await anext(requests, None)
    if first is None or first.WhichOneof("request") != "start":
        raise InvalidArgument("start", "", f"a first request that says {says}")
    return first


def to_size(message: _Sized) -> Size | None:
    """Return the size of a message's terminal, None where it has none."""
    if not message.HasField("size"):
        return None
    size = Size(message.size.rows, message.size.columns)
    if not all(1 <= each <= _LARGEST for each in size):
        raise InvalidArgument("size", f"{size.rows} rows, {size.columns} columns", f"1 to {_LARGEST} of each")
    return size


async def given(
    requests: AsyncIterator[pb.ExecContainerRequest] | AsyncIterator[pb.AttachContainerRequest], *,
    stdin: bool, tty: bool, size: Size | None = None,
) -> AsyncIterator[Input]:  # fmt: skip
    """Yield a first size, then what further requests bring: input, and sizes of the terminal."""
    if size:
        yield size
    async for request in requests:
        if request.WhichOneof("request") == "stdin" and stdin:
            yield request.stdin
        elif tty and (changed := to_size(request)):
            yield changed
        else:
            accepted = " or ".join([*(["input"] if stdin else []), *(["a size"] if tty else [])])
            raise InvalidArgument("request", request.WhichOneof("request"), accepted or "no further request")
