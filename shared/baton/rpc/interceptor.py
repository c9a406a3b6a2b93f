"""Server interceptor: the one place where a Python exception becomes a gRPC status."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc

from baton.rpc.errors import BatonError, to_status

log = logging.getLogger(__name__)

_INTERNAL = "internal error; the server's log has the details under this request id"


current_request_id: ContextVar[str] = ContextVar("current_request_id", default="-")


def adopt_request_id(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The request id of this call: the caller's x-request-id if it is usable, else a new one. Errors will carry it."""
    request_id = _sent_request_id(context) or uuid.uuid4().hex
    current_request_id.set(request_id)
    return request_id


def _sent_request_id(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == "x-request-id" and isinstance(value, str) and 0 < len(value) <= 128 and value.isprintable():
            return value
    return ""


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps BatonError to its status, and anything unexpected to INTERNAL with a fixed text."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                _guard_unary(handler.unary_unary, method), handler.request_deserializer, handler.response_serializer
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(handler.unary_stream, method), handler.request_deserializer, handler.response_serializer
            )
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(
                _guard_stream(handler.stream_stream, method), handler.request_deserializer, handler.response_serializer
            )
        return handler


async def _abort(error: Exception, context: grpc.aio.ServicerContext[Any, Any], method: str) -> None:
    request_id = current_request_id.get()
    if isinstance(error, BatonError):
        await context.abort_with_status(to_status(error, request_id))
    log.exception("unexpected error in %s", method, exc_info=error, extra={"request_id": request_id})
    await context.abort(grpc.StatusCode.INTERNAL, _INTERNAL)


def _expected(error: Exception) -> bool:
    """Errors gRPC itself raises to end a call (abort) pass through untouched."""
    return isinstance(error, grpc.aio.AbortError)


def _guard_unary(behavior: Any, method: str) -> Any:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behavior(request, context)
        except Exception as error:  # noqa: BLE001 the rim: everything below raises, only this catches
            if _expected(error):
                raise
            await _abort(error, context, method)

    return guarded


def _guard_stream(behavior: Any, method: str) -> Any:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        responses = behavior(request, context)
        try:
            async for response in responses:
                yield response
        except Exception as error:  # noqa: BLE001 the rim: everything below raises, only this catches
            if _expected(error):
                raise
            await _abort(error, context, method)
        finally:
            # A cancelled call must run the handler's own clean-up now, not when the generator is collected.
            await responses.aclose()

    return guarded
