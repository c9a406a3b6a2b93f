"""The sending half of a handoff: what is ready goes out in order, under credits, and control messages overtake it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator

from baton.engine.layout import PoolLayout
from baton.handoff.wire import StreamDigest, chunk_tokens, read_chunk
from baton.internal.v1 import kv_pb2, prefill_pb2

_Range = tuple[int, int, int, int, int]  # slot, layer, start, stop, and nanoseconds after the sender began


class KvSender:
    """Turns "these tokens of this layer are ready" into a stream of messages.

    Nothing is copied before it is sent: a queued range is five numbers, its bytes stay in the pool. The queue is
    bounded by layers x chunks of one prompt. One task feeds it (`ready`, `control`, `finish`, `credit`), one task reads
    `messages`; both on the same event loop.

    Args:
        layout: of the pool that is read.
        memory: the pool's bytes.
        credit_bytes: KV bytes that may be sent before `credit` grants more.

    Attributes:
        began_ns: when it was made, which is when PrefillAccepted goes out; CLOCK_MONOTONIC.
        digest: of what was sent.
    """

    def __init__(self, layout: PoolLayout, memory: memoryview, credit_bytes: int) -> None:
        self._layout = layout
        self._memory = memory
        self._credit = credit_bytes
        self._control: deque[prefill_pb2.PrefillResponse] = deque()
        self._ranges: deque[_Range] = deque()
        self._finished = False
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()
        self.digest = StreamDigest()
        self.began_ns = time.monotonic_ns()

    def since_began_ns(self) -> int:
        """Nanoseconds since it was made."""
        return time.monotonic_ns() - self.began_ns

    def control(self, message: prefill_pb2.PrefillResponse) -> None:
        """Queue a message that goes out before any KV still queued."""
        self._control.append(message)
        self._changed.set()

    def ready(self, slot: int, layer: int, start: int, stop: int) -> None:
        """Tokens [start, stop) of a layer lie in the pool and will not change."""
        step = chunk_tokens(self._layout, layer)
        since_began = self.since_began_ns()
        for first in range(start, stop, step):
            self._ranges.append((slot, layer, first, min(first + step, stop), since_began))
        self._changed.set()

    def credit(self, size: int) -> None:
        """The receiver allows `size` more bytes."""
        self._credit += size
        self._changed.set()

    def drop_queued(self) -> None:
        """Forget the KV not yet sent: the receiver does not need it any more."""
        self._ranges.clear()

    def finish(self) -> None:
        """Nothing more will become ready; `messages` ends when the queue is empty."""
        self._finished = True
        self._changed.set()

    def fail(self, error: BaseException) -> None:
        """`messages` raises this instead of going on."""
        self._failure = error
        self._changed.set()

    def fail_with(self, task: asyncio.Task[None]) -> None:
        """As `fail`, if a task that feeds the sender ended in an error. For `add_done_callback`."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    async def messages(self) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        """Messages to send, in order, until `finish` and an empty queue. Waits for readiness and for credit."""
        while True:
            if self._failure is not None:
                raise self._failure
            if self._control:
                yield self._control.popleft()
            elif self._ranges and self._fits(self._ranges[0]):
                yield prefill_pb2.PrefillResponse(chunk=self._take())
            elif self._finished and not self._ranges:
                return
            else:
                self._changed.clear()
                await self._changed.wait()

    def _fits(self, item: _Range) -> bool:
        _, layer, start, stop, _ = item
        return sum(self._layout.token_bytes(layer)) * (stop - start) <= self._credit

    def _take(self) -> kv_pb2.KvChunk:
        slot, layer, start, stop, since_began = self._ranges.popleft()
        chunk = read_chunk(self._layout, self._memory, slot, layer, start, stop)
        chunk.since_accepted_ns = since_began
        self._credit -= len(chunk.data)
        self.digest.add(chunk)
        return chunk
