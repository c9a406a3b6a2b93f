"""OpenTelemetry: standard gRPC spans with W3C context on every hop, exported by OTLP when an endpoint is configured.

Without an endpoint nothing is installed: no interceptor, no span, no cost.
"""

from __future__ import annotations

import grpc
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from baton import __version__

_provider: TracerProvider | None = None


def configure(service: str, endpoint: str, ratio: float) -> None:
    """Export spans to the OTLP gRPC receiver at `endpoint` ("host:port"); empty: tracing stays off.

    The export queue is bounded and drops when full: serving never waits for a collector.
    """
    global _provider
    if not endpoint:
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    resource = Resource.create(
        {"service.name": f"baton-{service}", "service.namespace": "baton", "service.version": __version__}
    )
    _provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(ratio)))
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=True, timeout=2)
    _provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=4096, schedule_delay_millis=500))
    trace.set_tracer_provider(_provider)


def enabled() -> bool:
    """Whether spans are recorded."""
    return _provider is not None


def server_interceptors() -> list[grpc.aio.ServerInterceptor]:
    """Interceptors that open a server span per call, as a child of the caller's span."""
    if _provider is None:
        return []
    from opentelemetry.instrumentation.grpc import aio_server_interceptor

    return [aio_server_interceptor(tracer_provider=_provider)]


def client_interceptors() -> list[grpc.aio.ClientInterceptor]:
    """Interceptors that open a client span per call and send its context along."""
    if _provider is None:
        return []
    from opentelemetry.instrumentation.grpc import aio_client_interceptors

    return list(aio_client_interceptors(tracer_provider=_provider))


def shutdown() -> None:
    """Flush what is queued, for two seconds at most, and stop exporting."""
    global _provider
    if _provider is not None:
        _provider.force_flush(2000)
        _provider.shutdown()
        _provider = None
