"""The rim of every service: who may call, one span per call, and the one place where a Python exception becomes a gRPC
status.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.message import DecodeError

from baton.rpc.access import Who
from baton.rpc.caller import ANONYMOUS, Caller, calling_as
from baton.rpc.drain import Drain
from baton.rpc.errors import BatonError, InvalidArgument, Overloaded, PermissionDenied, Unauthenticated, to_status
from baton.rpc.gate import OPEN, Gate, Identity
from baton.rpc.metrics import REFUSED
from baton.rpc.request_id import HEADER, usable
from baton.telemetry.tracing import ServerSpan, server_span

log = logging.getLogger(__name__)

MAX_UNKNOWN_STREAMS: Final = 1024
"""Streams of health and reflection at once on one port."""

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
    """What every call of every service goes through: a gate, a server span, and exceptions mapped to statuses.

    Streaming handlers are async generators. They are driven here, and closed here when the call ends in any way, so a
    handler's `async with` blocks have run when the call is over.

    Args:
        drain: of this process; it refuses late calls. None: one that never begins.
        gate: of the server's port. Services name theirs; the default lets everybody in, for servers inside of a test.
    """

    def __init__(self, drain: Drain | None = None, gate: Gate = OPEN) -> None:
        self._drain = drain or Drain()
        self._gate = gate
        self._unknown = _Unknown()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        rim = _Rim(self._drain, self._gate, self._unknown, handler_call_details.method)
        try:
            identity = self._gate.examine(rim.method, handler_call_details.invocation_metadata or ())
        except BatonError as refusal:
            # Before the message is parsed: it may be large, and comes from nobody.
            return _refusing(handler, rim, refusal)
        parse, serialize = _parser(handler.request_deserializer), handler.response_serializer
        # One message is parsed within the rim, which says what is wrong; of a stream each as it is read in there.
        if handler.unary_unary:
            behavior = rim.unary(_parsing(handler.unary_unary, parse), identity)
            return grpc.unary_unary_rpc_method_handler(behavior, None, serialize)
        if handler.unary_stream:
            behavior = rim.stream(_parsing(handler.unary_stream, parse), identity)
            return grpc.unary_stream_rpc_method_handler(behavior, None, serialize)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(rim.unary(handler.stream_unary, identity), parse, serialize)
        return grpc.stream_stream_rpc_method_handler(rim.stream(handler.stream_stream, identity), parse, serialize)


def _parser(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    def parse(message: bytes) -> Any:
        try:
            return message if deserialize is None else deserialize(message)
        except DecodeError:
            raise InvalidArgument("request", "is no message of this method") from None

    return parse


def _parsing(behavior: Any, parse: Callable[[bytes], Any]) -> Any:
    """A handler that takes the message as bytes."""
    return lambda message, context: behavior(parse(message), context)


def _refusing(
    handler: grpc.RpcMethodHandler[Any, Any], rim: _Rim, refusal: BatonError
) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of the same kind that refuses, and parses nothing."""

    async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        adopt_request_id(context)
        raise refusal

    async def refuse_stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        adopt_request_id(context)
        raise refusal
        yield  # a generator, as what it stands for

    if handler.unary_unary:
        return grpc.unary_unary_rpc_method_handler(rim.unary(refuse, None))
    if handler.unary_stream:
        return grpc.unary_stream_rpc_method_handler(rim.stream(refuse_stream, None))
    if handler.stream_unary:
        return grpc.stream_unary_rpc_method_handler(rim.unary(refuse, None))
    return grpc.stream_stream_rpc_method_handler(rim.stream(refuse_stream, None))


class _Unknown:
    """Bounds the streams of those whom nobody knows, of health and reflection: they may last for ever, and cost nothing
    to open.
    """

    def __init__(self) -> None:
        self._streams = 0

    @contextmanager
    def holding(self, identity: Identity | None) -> Iterator[None]:
        """Count a stream for the length of the block. Raises Overloaded when there are too many."""
        if identity is None or Who.ANYONE not in identity.who:
            yield
            return
        if self._streams >= MAX_UNKNOWN_STREAMS:
            raise Overloaded(f"{self._streams} streams of unknown callers are open")
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1


class _Rim:
    """Wraps the handlers of one method.

    Args:
        drain: of the process.
        gate: asks for the certificate.
        unknown: bounds the streams of callers without credentials.
        method: full name.
    """

    def __init__(self, drain: Drain, gate: Gate, unknown: _Unknown, method: str) -> None:
        self._drain = drain
        self._gate = gate
        self._unknown = unknown
        self.method = method

    def unary(self, behavior: Any, identity: Identity | None) -> Any:
        """`identity` is what the gate made of the metadata; None: it has refused already."""

        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            with server_span(self.method, context.invocation_metadata()) as span:
                try:
                    with calling_as(self._caller(identity, context)):
                        async with self._drain.serving(self.method):
                            return await behavior(request, context)
                except Exception as error:  # noqa: BLE001 the rim: everything below raises, only this catches
                    await _abort(error, context, self.method, span)

        return guarded

    def stream(self, behavior: Any, identity: Identity | None) -> Any:
        """As `unary`."""

        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            with server_span(self.method, context.invocation_metadata()) as span:
                try:
                    with self._unknown.holding(identity), calling_as(self._caller(identity, context)):
                        async with self._drain.serving(self.method), aclosing(behavior(request, context)) as responses:
                            async for response in responses:
                                await context.write(response)
                except Exception as error:  # noqa: BLE001 the rim: everything below raises, only this catches
                    await _abort(error, context, self.method, span)

        return guarded

    def _caller(self, identity: Identity | None, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
        if identity is None:
            return ANONYMOUS
        if not self._gate.reads_certificates:
            return identity.caller
        return self._gate.admit(identity, context.auth_context())


async def _abort(
    error: Exception, context: grpc.aio.ServicerContext[Any, Any], method: str, span: ServerSpan
) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        span.ended(context.code())
        raise error  # gRPC's own way of ending a call
    request_id = current_request_id.get()
    if isinstance(error, BatonError):
        if isinstance(error, Unauthenticated | PermissionDenied):
            REFUSED.labels(method, error.reason).inc()
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
