"""The way of spans to the collector: a bounded queue, and a thread that empties it. Serving never waits for it.

Not the SDK's BatchSpanProcessor: its shutdown may hold a process for half a minute when the collector does not answer,
and it tells of the spans it drops by a log line only, one in twenty seconds.
"""

from __future__ import annotations

import logging
import threading
from collections import deque

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from prometheus_client import Counter

log = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0
"""What delivering the rest may take when a service ends."""
_GRACE_SECONDS = 0.5
"""What an export that was cut short may take to return."""

SPANS_LOST = Counter("baton_spans_lost_total", "Spans that never reached the collector, by why", ["why"])
_QUEUE_FULL = SPANS_LOST.labels("queue_full")
_NOT_DELIVERED = SPANS_LOST.labels("not_delivered")


class SpanQueue(SpanProcessor):
    """Exports ended spans in batches. Every span it takes is delivered or counted as lost.

    Args:
        exporter: used by the queue's own thread; shutting it down must end an export that is under way.
        size: spans that may wait; one that finds no room is dropped.
        batch: spans of one export at most; when so many wait, they go at once.
        interval: seconds between exports otherwise.
    """

    def __init__(self, exporter: SpanExporter, size: int = 4096, batch: int = 512, interval: float = 0.5) -> None:
        self._exporter = exporter
        self._size = size
        self._batch = batch
        self._interval = interval
        self._waiting: deque[ReadableSpan] = deque()
        self._wake = threading.Event()
        self._ending = False
        self._given_up = False
        # A daemon: whatever the collector does, the process can end.
        self._thread = threading.Thread(target=self._run, name="span-queue", daemon=True)
        self._thread.start()

    def on_end(self, span: ReadableSpan) -> None:
        """Take a span. Never blocks."""
        if span.context is None or not span.context.trace_flags.sampled:
            return
        if self._ending:
            _NOT_DELIVERED.inc()
            return
        if len(self._waiting) >= self._size:
            _QUEUE_FULL.inc()
            return
        self._waiting.append(span)
        if len(self._waiting) >= self._batch and not self._wake.is_set():
            self._wake.set()

    def shutdown(self) -> None:
        """Deliver what waits, for FLUSH_SECONDS at most; the rest is lost."""
        self._ending = True
        self._wake.set()
        self._thread.join(FLUSH_SECONDS)
        self._given_up = True
        self._exporter.shutdown()
        self._thread.join(_GRACE_SECONDS)
        if left := len(self._waiting):
            _NOT_DELIVERED.inc(left)
            log.warning("%d spans were not delivered: the collector did not answer in time", left)

    def _run(self) -> None:
        while not self._given_up and (self._waiting or not self._ending):
            if len(self._waiting) < self._batch and not self._ending:
                self._wake.wait(self._interval)
                self._wake.clear()
            self._export([self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))])

    def _export(self, spans: list[ReadableSpan]) -> None:
        if not spans:
            return
        try:
            delivered = self._exporter.export(spans) is SpanExportResult.SUCCESS
        except Exception:  # the rim of this thread: it must live to count, and to try the next
            log.warning("an export of spans failed", exc_info=True)
            delivered = False
        if not delivered:
            _NOT_DELIVERED.inc(len(spans))
