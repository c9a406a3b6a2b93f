"""Book the engine's own account of a request into the front's timeline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from baton.engine.messages import Output, Progress
from baton.internal.v1 import timing_pb2
from baton.telemetry import tracing
from baton.telemetry.ledger import Timeline
from baton.telemetry.tracing import Attribute
from baton.v1 import ledger_pb2

TELL_SECONDS = 0.1
"""So old may the account be that a caller has of a request, should it never finish."""


class EngineTime:
    """Splits the time a front waits for its engine into the engine's compute and queue time.

    The engine reports cumulative sums. It may work while the front is busy with an earlier token; what a wait can hold
    is at most the wait itself, so only that is carved out of it: the rest was hidden.

    Args:
        timeline: of the request.
        hop: the front's hop.
    """

    def __init__(self, timeline: Timeline, hop: ledger_pb2.Hop.ValueType) -> None:
        self._timeline = timeline
        self._hop = hop
        self._compute_ns = 0
        self._queue_ns = 0
        self._waited_ns = 0
        self._began = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The front waits for the engine inside the block."""
        self._timeline.enter(ledger_pb2.KIND_OVERHEAD)
        started = time.monotonic_ns()
        try:
            yield
        finally:
            self._waited_ns += time.monotonic_ns() - started

    def attributes(self) -> dict[str, Attribute]:
        """For a span: the engine's account so far."""
        return {"baton.engine.compute_ms": self._compute_ns / 1e6, "baton.engine.queue_ms": self._queue_ns / 1e6}

    def began(self) -> None:
        """The engine is computing it: something came of it."""
        self._began = True

    def so_far(self) -> timing_pb2.HopTiming:
        """The account until now.

        Of what the engine did since it last told, only this is known: before it began, the request was in its queue.
        """
        timeline = self._timeline.copy()
        kind = ledger_pb2.KIND_COMPUTE if self._began else ledger_pb2.KIND_QUEUE
        timeline.carve((self._hop, ledger_pb2.KIND_OVERHEAD), {(self._hop, kind): self._waited_ns})
        return timeline.timing()

    def book(self, output: Output | Progress) -> None:
        """Attribute the waits since the last call to what the engine did meanwhile."""
        self.began()
        compute = min(output.compute_ns - self._compute_ns, self._waited_ns)
        queue = min(output.queue_ns - self._queue_ns, self._waited_ns - compute)
        self._compute_ns, self._queue_ns, self._waited_ns = output.compute_ns, output.queue_ns, 0
        self._timeline.carve(
            (self._hop, ledger_pb2.KIND_OVERHEAD),
            {(self._hop, ledger_pb2.KIND_COMPUTE): compute, (self._hop, ledger_pb2.KIND_QUEUE): queue},
        )


def trace_chunks(output: Output | Progress) -> None:
    """A span for each chunk of the prompt that the engine computed."""
    for chunk in output.chunks:
        tracing.record("prefill chunk", chunk.start_ns, chunk.end_ns, {"baton.tokens": chunk.tokens})
