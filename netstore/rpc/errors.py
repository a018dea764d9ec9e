"""The one place where errors become gRPC statuses, with details that a program can read (google.rpc, AIP-193)."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from netstore.client import Problem
from netstore.errors import InvalidArgument, NetstoreError

__all__ = ["DOMAIN", "ErrorInterceptor", "status_of"]

DOMAIN = "netstore"
_REQUEST_ID = "x-request-id"
_FINISH_SECONDS = 10.0
_READS = ("Get", "List", "Wait", "Watch")

log = structlog.get_logger(__name__)


def status_of(error: NetstoreError) -> status_pb2.Status:
    """Return the status that a client sees: the message, ErrorInfo with the hint, BadRequest for fields."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    if error.hint:
        info.metadata["hint"] = error.hint
    details = [AnyMessage()]
    details[0].Pack(info)
    if isinstance(error, InvalidArgument):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        details.append(AnyMessage())
        details[1].Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    code = getattr(grpc.StatusCode, error.code).value[0]
    return status_pb2.Status(code=code, message=error.what, details=details)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps what servicers raise, and gives every request an id that each of its log lines carries.

    What changes something runs to its end when its caller goes away: done wholly or undone wholly, never left between.
    """

    def __init__(self, package: str = "netstore.", *, hints: bool = False) -> None:
        """`package` is whose methods are meant. With `hints` messages say what to do: some callers read no details."""
        self._prefix = f"/{package}"
        self._hints = hints
        self._running: set[asyncio.Task[Any]] = set()

    async def finish(self) -> None:
        """Wait for what still runs without its caller, for a while."""
        if self._running:
            await asyncio.wait(self._running, timeout=_FINISH_SECONDS)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method's handler."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        method = handler_call_details.method.rsplit("/", 1)[1]
        given = next((v for k, v in handler_call_details.invocation_metadata or () if k == _REQUEST_ID), "")
        kind = ("stream" if handler.request_streaming else "unary", "stream" if handler.response_streaming else "unary")
        make = getattr(grpc, f"{kind[0]}_{kind[1]}_rpc_method_handler")
        inner = getattr(handler, "_".join(kind))
        if handler.response_streaming:
            inner = self._wrap_stream(inner, method, str(given))
        else:
            detached = not handler.request_streaming and not method.startswith(_READS)
            inner = self._wrap_unary(inner, method, str(given), detached=detached)
        return make(inner, handler.request_deserializer, handler.response_serializer)

    def _wrap_unary(self, inner: Any, method: str, given: str, *, detached: bool) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            _bind(method, given)
            try:
                if not detached:
                    return await inner(request, context)
                task = asyncio.create_task(inner(request, context), name=method)
                self._running.add(task)
                task.add_done_callback(self._running.discard)
                return await asyncio.shield(task)
            except Exception as error:
                await self._abort(context, error)

        return call

    def _wrap_stream(self, inner: Any, method: str, given: str) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            _bind(method, given)
            try:
                async with aclosing(inner(request, context)) as responses:  # ends at once when the caller goes away
                    async for response in responses:
                        yield response
            except Exception as error:
                await self._abort(context, error)

        return call

    async def _abort(self, context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if isinstance(error, grpc.aio.AioRpcError):  # of the netstored that an adapter asked: as it said
            problem = Problem.of(error)
            await context.abort(problem.code, f"{problem.message}: {problem.hint}" if problem.hint else problem.message)
        if not isinstance(error, NetstoreError):
            request_id = structlog.contextvars.get_contextvars().get("request_id", "")
            log.exception("defect")
            error = NetstoreError(
                f"a defect in netstore: {type(error).__name__}: {error}", reason="DEFECT", request_id=request_id,
                hint=f"please report it with the log lines of request {request_id}",
            )  # fmt: skip
        else:
            log.info("refused", code=error.code, reason=error.reason, error=str(error))
        status = status_of(error)
        status.message = str(error) if self._hints else error.what
        await context.abort_with_status(rpc_status.to_status(status))
        raise AssertionError("abort returned")


def _bind(method: str, given: str) -> None:
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=given[:64] or uuid.uuid4().hex[:16], method=method)
