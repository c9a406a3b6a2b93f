"""OpenTelemetry: standard gRPC spans with W3C context on every hop, exported by OTLP when an endpoint is configured.

Without an endpoint nothing is installed: no interceptor, no span, no cost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from baton import __version__
from baton.telemetry.rpc_conventions import ERROR_TYPE, METHOD, SERVER_ERRORS, STATUS_CODE, SYSTEM, server_attributes
from baton.telemetry.span_queue import SpanQueue

CallT = TypeVar("CallT")
Attribute = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]

_propagator = TraceContextTextMapPropagator()
_provider: TracerProvider | None = None
_of_baton: trace.Tracer | None = None  # kept: to get one costs as much as a span


# Services that are asked all the time, or by operators, about no request: spans of these would only be noise.
_QUIET = frozenset(
    {
        "baton.internal.v1.Worker",
        "baton.internal.v1.Observe",
        "baton.internal.v1.CacheAdmin",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
)


def configure(service: str, endpoint: str, ratio: float) -> None:
    """Export spans to the OTLP gRPC receiver at `endpoint` ("host:port"); empty: tracing stays off.

    The export queue is bounded and drops when full: serving never waits for a collector.
    """
    global _provider, _of_baton
    if not endpoint:
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    resource = Resource.create(
        {"service.name": f"baton-{service}", "service.namespace": "baton", "service.version": __version__}
    )
    # What is queued is flushed by `shutdown`; at the exit of a process that ends some other way nothing may wait.
    _provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(ratio)), shutdown_on_exit=False)
    _provider.add_span_processor(SpanQueue(OTLPSpanExporter(endpoint=endpoint, insecure=True, timeout=2)))
    _of_baton = _provider.get_tracer("baton", __version__)
    trace.set_tracer_provider(_provider)


def enabled() -> bool:
    """Whether spans are recorded."""
    return _provider is not None


class ServerSpan:
    """The span of one served call."""

    __slots__ = ("_ended", "_span")

    def __init__(self, span: trace.Span | None) -> None:
        self._span = span
        self._ended = span is None

    def ended(self, code: grpc.StatusCode, reason: str = "") -> None:
        """The call ends with this status; `reason` is the mesh's own word for it. Only the first end counts."""
        if self._ended or self._span is None:
            return
        self._ended = True
        self._span.set_attribute(STATUS_CODE, code.name)
        if reason:
            self._span.set_attribute("baton.error.reason", reason)
        if code in SERVER_ERRORS:
            _failed(self._span, code.name)


_NO_SPAN = ServerSpan(None)


@contextmanager
def server_span(method: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> Iterator[ServerSpan]:
    """Serve a call ("/package.Service/Method") inside the block; its span is current there, a child of the caller's."""
    if _provider is None or method.lstrip("/").partition("/")[0] in _QUIET:
        yield _NO_SPAN
        return
    carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
    parent = _propagator.extract(carrier)
    with _tracer().start_as_current_span(
        method.lstrip("/"),
        context=parent,
        kind=trace.SpanKind.SERVER,
        attributes={SYSTEM: "grpc", METHOD: method.lstrip("/")},
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        served = ServerSpan(span)
        try:
            yield served
            served.ended(grpc.StatusCode.OK)
        except asyncio.CancelledError:
            served.ended(grpc.StatusCode.CANCELLED)
            raise
        finally:
            # What gRPC makes of an exception that nobody gave a status.
            served.ended(grpc.StatusCode.UNKNOWN)


def _failed(span: trace.Span, error: str) -> None:
    span.set_attribute(ERROR_TYPE, error)
    span.set_status(trace.StatusCode.ERROR)


class PhaseSpan:
    """The span of one phase of a call. Never the current one: phases are streamed through generators, and overlap."""

    __slots__ = ("_span",)

    def __init__(self, span: trace.Span | None) -> None:
        self._span = span

    def set(self, attributes: Mapping[str, Attribute]) -> None:
        """What is known of it by now."""
        if self._span is not None:
            self._span.set_attributes(attributes)

    def end(self, error: str = "") -> None:
        """It is over; `error` in a word if it failed. Only the first end counts."""
        if self._span is not None:
            if error:
                _failed(self._span, error)
            self._span.end()
            self._span = None


@contextmanager
def phase(name: str, attributes: Mapping[str, Attribute] | None = None) -> Iterator[PhaseSpan]:
    """A child of the call's span for the length of the block."""
    span = PhaseSpan(None if _provider is None else _tracer().start_span(name, attributes=attributes))
    try:
        yield span
    except (asyncio.CancelledError, GeneratorExit):
        span.end("CANCELLED")
        raise
    except Exception as error:
        span.end(type(error).__name__)
        raise
    finally:
        span.end()


def record(name: str, start_ns: int, end_ns: int, attributes: Mapping[str, Attribute] | None = None) -> None:
    """A child of the call's span for something that is over; times are of this host's CLOCK_MONOTONIC."""
    if _provider is not None:
        offset = time.time_ns() - time.monotonic_ns()
        span = _tracer().start_span(name, attributes=attributes, start_time=start_ns + offset)
        span.end(end_ns + offset)


def set_call_attributes(attributes: Mapping[str, Attribute]) -> None:
    """Attributes of the call's own span."""
    if _provider is not None:
        trace.get_current_span().set_attributes(attributes)


def _tracer() -> trace.Tracer:
    assert _of_baton is not None
    return _of_baton


def call(method: str, start: Callable[..., CallT], request: Any, timeout: float | None, target: str) -> CallT:
    """Start a call of another service ("package.Service/Method") in a client span that ends when the call does.

    Not an interceptor: those handle every message of a stream once more, which costs several times what the spans do.

    Args:
        method: full name.
        start: the stub's method.
        request: message, or iterator of messages.
        timeout: seconds; None: no deadline.
        target: gRPC name of the called service.
    """
    if _provider is None:
        return start(request, timeout=timeout)
    span = _tracer().start_span(
        method,
        kind=trace.SpanKind.CLIENT,
        attributes={SYSTEM: "grpc", METHOD: method, **server_attributes(target)},
    )
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, context=trace.set_span_in_context(span))
    started = start(request, timeout=timeout, metadata=tuple(carrier.items()))

    def end(done: Any) -> None:
        # A done callback runs in the call's own task or after it; the status is known without waiting.
        code = _code_of(done)
        span.set_attribute(STATUS_CODE, code.name)
        if code is not grpc.StatusCode.OK:
            _failed(span, code.name)
        span.end()

    started.add_done_callback(end)  # type: ignore[attr-defined]
    return started


def _code_of(call: Any) -> grpc.StatusCode:
    """The status of a finished call: its `code` coroutine returns without suspending then."""
    waiting = call.code()
    try:
        waiting.send(None)
    except StopIteration as done:
        code: grpc.StatusCode = done.value
        return code
    waiting.close()
    return grpc.StatusCode.UNKNOWN


def shutdown() -> None:
    """Deliver what is queued, for about two seconds at most, and stop exporting."""
    global _provider, _of_baton
    if _provider is not None:
        _provider.shutdown()
        _provider = _of_baton = None
