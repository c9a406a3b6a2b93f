"""The sending half of a handoff: what is ready goes out in order, and control messages overtake it."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final

from baton.engine.layout import PoolLayout
from baton.handoff import codec
from baton.handoff.encoding import Message
from baton.handoff.wire import Chunk, StreamDigest, chunk_checksum, chunk_tokens, first_moved, range_checksum
from baton.internal.v1 import kv_pb2, prefill_pb2
from baton.rpc.patience import patience
from baton.v1 import inference_pb2


@dataclass(slots=True, eq=False)
class _Range:
    """Tokens [start, stop) of a layer, ready so long after the sender began."""

    slot: int
    layer: int
    start: int
    stop: int
    since_began_ns: int


RANGES_BYTES = 8 * 1024 * 1024
"""Most KV bytes that one KvRanges names before the first token is out, which may have to wait until they are read."""

_WORTH_TELLING: Final = 2 * 1024 * 1024
"""Fewer KV bytes of a step wait for its next layers: a message costs as much as to copy them."""

STALL_SECONDS: Final = 10.0
"""Longest wait for a sign that the caller still takes KV, once all of it is ready. A caller whose event loop hangs
answers keepalive pings, and would hold its slot until the deadline. One that lives gives up a silent call, or gets on,
several times sooner."""

SLOWEST_READ: Final = 100e6
"""KV bytes per second, of a gigabit link. Who reads the pool says nothing until it has read all it was told of."""


class CallerSilent(Exception):
    """The caller has neither said nor taken anything for as long as one that lives may take."""


class CallerLeft(Exception):
    """The caller closed its side before it had chosen a transport, or granted credit, for all KV."""


class KvSender:
    """Turns "these tokens of this layer are ready" into a stream of messages.

    Nothing is copied before it is sent: a queued range is five numbers, its bytes stay in the pool. What follows a
    range that still waits joins it, so that a backlog leaves in larger messages. Where only places leave, those of a
    few small layers share a message; none waits for the next step. What is queued, and what was sent and might have to
    be sent again, is bounded by layers x chunks of one prompt. Tasks of one event loop feed it (`ready`, `control`,
    `finish`, and for the caller `choose`, `credit`, `close`) and read `messages`.

    Args:
        layout: of the pool that is read.
        memory: the pool's bytes.
        tokens: of the prompt.
        credit_bytes: KV bytes that may be sent in messages before `credit` grants more.
        codec: of chunks, where it can say what they hold.

    Attributes:
        began_ns: when it was made, which is when PrefillAccepted goes out; CLOCK_MONOTONIC.
        transport: the caller's choice.
        digest: of what was sent since then.
    """

    def __init__(
        self,
        layout: PoolLayout,
        memory: memoryview,
        tokens: int,
        credit_bytes: int,
        codec: codec.Codec = kv_pb2.KV_CODEC_RAW,
    ) -> None:
        self._layout = layout
        self._memory = memory
        self._first = [first_moved(layout, layer, 0, tokens) for layer in range(len(layout.layers))]
        self._codec = codec
        self._first_credit = self._credit = credit_bytes
        self._control: deque[prefill_pb2.PrefillResponse] = deque()
        self._queued: deque[_Range] = deque()
        self._sent: list[_Range] = []
        self._last: dict[int, _Range] = {}  # of those queued, by layer
        self._finished = False
        self._step_ended = False  # what is queued waits for no further layer
        self._told_all = False  # that nothing more comes by this transport
        self._closed = False
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()
        self.transport = inference_pb2.TRANSPORT_UNSPECIFIED
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
        if layer == len(self._first) - 1:
            self._step_ended = True
            self._changed.set()
        first = max(start, self._first[layer])
        if first >= stop:
            return
        last = self._last.get(layer)
        if last is not None and (last.slot, last.stop) == (slot, first):
            last.stop = stop
        else:
            self._last[layer] = _Range(slot, layer, first, stop, self.since_began_ns())
            self._queued.append(self._last[layer])
        self._changed.set()

    def choose(self, transport: inference_pb2.Transport.ValueType) -> None:
        """The caller wants all KV by this transport, also what went out by another one."""
        self.transport = transport
        self._queued.extendleft(reversed(self._sent))
        self._step_ended = bool(self._queued)
        self._sent.clear()
        self._told_all = False
        self._credit = self._first_credit
        self.digest = StreamDigest()
        self._changed.set()

    def credit(self, size: int) -> None:
        """The caller allows `size` more bytes."""
        self._credit += size
        self._changed.set()

    def drop_queued(self) -> None:
        """Forget the KV not yet sent: the caller does not need it any more."""
        self._queued.clear()
        self._sent.clear()
        self._last.clear()
        self._told_all = True

    def done(self) -> prefill_pb2.Done:
        """What was sent since the last choice."""
        return prefill_pb2.Done(chunks=self.digest.chunks, bytes=self.digest.bytes, checksum=self.digest.value())

    def finish(self) -> None:
        """Nothing more will become ready."""
        self._finished = True
        self._changed.set()

    def close(self) -> None:
        """The caller will say nothing more: `messages` ends when the queue is empty."""
        self._closed = True
        self._changed.set()

    def fail(self, error: BaseException) -> None:
        """`messages` raises this instead of going on."""
        self._failure = error
        self._changed.set()

    def fail_with(self, task: asyncio.Task[None]) -> None:
        """As `fail`, if a task that feeds the sender ended in an error. For `add_done_callback`."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    async def messages(self) -> AsyncIterator[Message]:
        """Messages to send, in order, until `finish`, `close` and an empty queue.

        Raises:
            CallerLeft: what is queued can never be sent.
            CallerSilent: everything is ready, and nothing can be sent before the caller says something.
        """
        while True:
            if self._failure is not None:
                raise self._failure
            if self._control:
                yield self._control.popleft()
            elif (message := self._next_kv()) is not None:
                yield message
            elif self._closed and self._queued:
                raise CallerLeft
            elif self._closed and self._finished:
                return
            else:
                self._changed.clear()
                await self._wait()

    async def _wait(self) -> None:
        """Until something has changed; once everything is ready, that is up to the caller alone."""
        if not self._finished:
            await self._changed.wait()
            return
        by_call = self.transport in (inference_pb2.TRANSPORT_UNSPECIFIED, inference_pb2.TRANSPORT_GRPC)
        seconds = STALL_SECONDS if by_call else STALL_SECONDS + self.digest.bytes / SLOWEST_READ
        try:
            async with patience(seconds):
                await self._changed.wait()
        except TimeoutError:
            raise CallerSilent(f"the caller said nothing for {seconds:g} s") from None

    def _next_kv(self) -> Message | None:
        """The next message with KV in it, or its places; None: none may go."""
        if self.transport == inference_pb2.TRANSPORT_UNSPECIFIED:
            return None
        if self.transport != inference_pb2.TRANSPORT_GRPC:
            return self._ranges()
        if not self._queued:
            return None
        first = self._queued[0]
        tokens = min(first.stop - first.start, chunk_tokens(self._layout, first.layer))
        if codec.data_size(kv_pb2.KV_CODEC_RAW, self._layout, first.layer, tokens) > self._credit:
            return None
        return self._chunk(self._take(tokens))

    def _ranges(self) -> Message | None:
        """Where lies what is queued; with the last of it, or behind it, what was sent in all."""
        last = self._finished and not self._told_all
        if not self._queued and not last:
            self._step_ended = False
            return None
        if not self._finished and not self._step_ended and self._queued_bytes() < _WORTH_TELLING:
            return None
        ranges = prefill_pb2.KvRanges(transport=self.transport)
        size, most_bytes = 0, sys.maxsize if self._finished else RANGES_BYTES
        while self._queued and size < most_bytes:
            layer = self._queued[0].layer
            most = max(1, (most_bytes - size) // sum(self._layout.token_bytes(layer)))
            place, place_bytes = self._range(self._take(most))
            ranges.ranges.append(place)
            size += place_bytes
        if last:
            ranges.sent.CopyFrom(self.done())
            self._told_all = True
        return prefill_pb2.PrefillResponse(ranges=ranges)

    def _queued_bytes(self) -> int:
        return sum((one.stop - one.start) * sum(self._layout.token_bytes(one.layer)) for one in self._queued)

    def _take(self, most_tokens: int) -> _Range:
        """The first tokens of what is queued; they count as sent."""
        first = self._queued[0]
        cut = min(first.stop, first.start + most_tokens)
        taken = _Range(first.slot, first.layer, first.start, cut, first.since_began_ns)
        first.start = cut
        if first.start == first.stop:
            self._queued.popleft()
            if self._last.get(first.layer) is first:
                del self._last[first.layer]
        self._sent.append(taken)
        return taken

    def _chunk(self, item: _Range) -> Chunk:
        chunk = make_chunk(self._layout, self._memory, item.layer, item.slot, item.start, item.stop, self._codec)
        chunk.header.since_accepted_ns = item.since_began_ns
        size = chunk.size
        self._credit -= size
        self.digest.add(chunk.header.checksum, size)
        return chunk

    def _range(self, item: _Range) -> tuple[kv_pb2.KvRange, int]:
        """Where it lies, and its bytes."""
        spans = self._layout.spans(item.layer, item.slot, item.start, item.stop)
        (key_offset, key_bytes), (value_offset, value_bytes) = spans
        place = kv_pb2.KvRange(
            layer=item.layer,
            start=item.start,
            tokens=item.stop - item.start,
            key_offset=key_offset,
            value_offset=value_offset,
            since_accepted_ns=item.since_began_ns,
        )
        self.digest.add(range_checksum(place), key_bytes + value_bytes)
        return place, key_bytes + value_bytes


def make_chunk(
    layout: PoolLayout, memory: memoryview, layer: int, slot: int, start: int, stop: int, wanted: codec.Codec
) -> Chunk:
    """Tokens [start, stop) of one layer and slot, in the wanted codec if it can hold them, else raw, not copied."""
    used: codec.Codec = kv_pb2.KV_CODEC_RAW
    parts: Sequence[bytes | memoryview] | None = None
    if wanted == kv_pb2.KV_CODEC_INT8:
        parts = codec.encode_int8(layout, memory, layer, slot, start, stop)
        used = wanted if parts is not None else used
    parts = parts or layout.rows(memory, layer, slot, start, stop)
    header = kv_pb2.KvChunk(
        layer=layer, start=start, tokens=stop - start, codec=used, checksum=chunk_checksum(layer, start, parts)
    )
    return Chunk(header, parts)
