"""A collector that does not answer costs spans, each of them counted, and nothing else."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from baton.telemetry.span_queue import SPANS_LOST, SpanQueue
from tests.fixtures.otlp import receiver

FILL_AND_END = """
import json, sys, time
from baton.telemetry import tracing

tracing.configure("test", sys.argv[1], 1.0)
for _ in range(6000):
    with tracing.phase("span"):
        pass
began = time.monotonic()
tracing.shutdown()
print(json.dumps(time.monotonic() - began))
"""


async def test_a_process_with_a_full_queue_ends_in_two_seconds() -> None:
    async with receiver() as collector:
        collector.slow_seconds = 600.0
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", FILL_AND_END, collector.address, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        took = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
        ended = time.monotonic()
        await asyncio.wait_for(process.wait(), 60)
        assert process.returncode == 0
        assert took < 2.7
        # Nothing that runs at the exit of the process waits once more.
        assert time.monotonic() - ended < 1
        assert collector.arrived()


def lost(why: str) -> float:
    """The count of lost spans."""
    return next(
        s.value for m in SPANS_LOST.collect() for s in m.samples if s.labels == {"why": why} and "_total" in s.name
    )


def end_spans(provider: TracerProvider, count: int) -> None:
    """Begin and end so many spans."""
    tracer = provider.get_tracer("test")
    for _ in range(count):
        tracer.start_span("span").end()


async def test_every_dropped_span_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    """The queue fills while the collector hangs; all that it took goes out later, so what never came was dropped."""
    full, undelivered = lost("queue_full"), lost("not_delivered")
    async with receiver() as collector:
        collector.slow_seconds = 600.0
        provider = TracerProvider(shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=collector.address, insecure=True, timeout=1)
        provider.add_span_processor(SpanQueue(exporter, size=1000, batch=100, interval=0.05))
        end_spans(provider, 100)
        async with asyncio.timeout(5):
            while not collector.requests:  # noqa: ASYNC110 another thread sends
                await asyncio.sleep(0.01)
        await asyncio.gather(*(asyncio.to_thread(end_spans, provider, 1000) for _ in range(4)))
        collector.slow_seconds = 0.0
        await asyncio.to_thread(provider.shutdown)
    dropped = lost("queue_full") - full
    assert dropped == 4100 - collector.arrived()
    assert dropped >= 2900
    assert lost("not_delivered") - undelivered == collector.arrived() - len(collector.spans) == 100
    assert len(caplog.records) <= 2, caplog.text


async def test_what_is_left_at_the_end_is_counted() -> None:
    full, undelivered = lost("queue_full"), lost("not_delivered")
    async with receiver() as collector:
        collector.slow_seconds = 600.0
        provider = TracerProvider(shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=collector.address, insecure=True, timeout=60)
        provider.add_span_processor(SpanQueue(exporter, size=1000, batch=100))
        end_spans(provider, 3000)
        await asyncio.to_thread(provider.shutdown)
    assert lost("queue_full") - full + lost("not_delivered") - undelivered == 3000


class Broken(SpanExporter):
    """Raises, then keeps what it gets."""

    def __init__(self) -> None:
        self.tries = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.tries += 1
        if self.tries == 1:
            raise RuntimeError("broken")
        return SpanExportResult.SUCCESS


def test_an_exporter_that_raises_loses_one_batch() -> None:
    undelivered, exporter = lost("not_delivered"), Broken()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SpanQueue(exporter, batch=100))
    end_spans(provider, 300)
    provider.shutdown()
    assert exporter.tries >= 3
    assert 0 < lost("not_delivered") - undelivered <= 100
