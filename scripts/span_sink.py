"""A collector for measurements, in a process of its own: counts spans, or takes them and never answers.

    python scripts/span_sink.py [--stuck]

Prints its address, and once its standard input ends, how many spans came.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class SpanSink(trace_service_pb2_grpc.TraceServiceServicer):
    """Counts what comes."""

    def __init__(self, *, stuck: bool) -> None:
        self.spans = 0
        self._stuck = stuck

    async def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Take spans."""
        self.spans += sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)
        if self._stuck:
            await asyncio.Event().wait()
        return trace_service_pb2.ExportTraceServiceResponse()


async def main(*, stuck: bool) -> None:
    """Serve until standard input ends."""
    sink = SpanSink(stuck=stuck)
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(sink, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"http://127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)
    print(sink.spans)


if __name__ == "__main__":
    asyncio.run(main(stuck="--stuck" in sys.argv[1:]))
