"""The rim of every service: one span per call, and the one place where a Python exception becomes a gRPC status."""

from __future__ import annotations

import inspect
import logging
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, NoReturn

import grpc

from baton.rpc.drain import Drain
from baton.rpc.errors import BatonError, to_status
from baton.rpc.request_id import HEADER, usable
from baton.telemetry.tracing import ServerSpan, server_span

log = logging.getLogger(__name__)

_INTERNAL = "internal error; the server's log has the details under this request id"


current_request_id: ContextVar[str] = ContextVar("current_request_id", default="-")


def adopt_request_id(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The request id of this call: the caller's own if it is usable, else a new one. Errors carry it."""
    request_id = _sent_request_id(context) or uuid.uuid4().hex
    current_request_id.set(request_id)
    return request_id


def _sent_request_id(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == HEADER and isinstance(value, str) and usable(value):
            return value
    return ""


class RimInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """What every call of every service goes through: a server span, and exceptions mapped to statuses.

    Streaming handlers are async generators. They are driven here, and closed here when the call ends in any way, so a
    handler's `async with` blocks have run when the call is over.

    Args:
        drain: of this process; it refuses late calls. None: one that never begins.
    """

    def __init__(self, drain: Drain | None = None) -> None:
        self._drain = drain or Drain()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        codec = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(_guard_unary(handler.unary_unary, method, self._drain), *codec)
        if handler.unary_stream and inspect.isasyncgenfunction(handler.unary_stream):
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(handler.unary_stream, method, self._drain), *codec
            )
        if handler.stream_stream and inspect.isasyncgenfunction(handler.stream_stream):
            return grpc.stream_stream_rpc_method_handler(
                _guard_stream(handler.stream_stream, method, self._drain), *codec
            )
        return handler


def _guard_unary(behavior: Any, method: str, drain: Drain) -> Any:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        with server_span(method, context.invocation_metadata()) as span:
            try:
                async with drain.serving(method):
                    return await behavior(request, context)
            except Exception as error:  # noqa: BLE001 the rim: everything below raises, only this catches
                await _abort(error, context, method, span)

    return guarded


def _guard_stream(behavior: Any, method: str, drain: Drain) -> Any:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        with server_span(method, context.invocation_metadata()) as span:
            try:
                async with drain.serving(method), aclosing(behavior(request, context)) as responses:
                    async for response in responses:
                        await context.write(response)
            except Exception as error:  # noqa: BLE001 the rim: everything below raises, only this catches
                await _abort(error, context, method, span)

    return guarded


async def _abort(
    error: Exception, context: grpc.aio.ServicerContext[Any, Any], method: str, span: ServerSpan
) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        span.ended(context.code())
        raise error  # gRPC's own way of ending a call
    request_id = current_request_id.get()
    if isinstance(error, BatonError):
        span.ended(error.code, error.reason)
        status = to_status(error, request_id)
        # A status with details brings trailers of its own; the handler's go out as well.
        trailers = (*(context.trailing_metadata() or ()), *status.trailing_metadata)
        await context.abort(status.code, status.details, trailers)
    if isinstance(error, NotImplementedError):
        span.ended(grpc.StatusCode.UNIMPLEMENTED, "UNIMPLEMENTED")
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not served here")
    log.error("unexpected error in %s", method, exc_info=error, extra={"request_id": request_id})
    span.ended(grpc.StatusCode.INTERNAL, type(error).__name__)
    await context.abort(grpc.StatusCode.INTERNAL, _INTERNAL)
