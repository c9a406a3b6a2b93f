"""One prompt's KV on its way into its slot: by which transport, and by the next one when that fails."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator

from prometheus_client import Counter

from baton.handoff import transport
from baton.handoff.cost import Handoff
from baton.handoff.receiver import KvReceiver
from baton.handoff.sources import Source, Sources
from baton.handoff.transport import Transport, TransportFailed
from baton.handoff.wire import Chunk, HandoffCorrupt
from baton.internal.v1 import prefill_pb2
from baton.v1 import inference_pb2

log = logging.getLogger(__name__)

FALLBACKS = Counter(
    "baton_handoff_fallbacks_total",
    "Transports given up during a handoff for the next one, by the one given up",
    ["transport"],
)
for _transport in transport.FASTEST_FIRST:
    FALLBACKS.labels(transport.name(_transport))  # a zero is a figure, no data is a question


class NoTransport(Exception):
    """No transport that both ends allow works between them."""


class Reception:
    """Chooses, reads, and tells the prefill service what it must know.

    Args:
        receiver: of the slot.
        sources: the pools that can be read from here.
        wanted: transports, the most wanted first.
        handoff: what it costs goes in here.

    Attributes:
        failed: transports that were given up.
        memory: name of the pool that was read, if that can be named the next time.
    """

    def __init__(self, receiver: KvReceiver, sources: Sources, wanted: tuple[Transport, ...], handoff: Handoff) -> None:
        self._receiver = receiver
        self._sources = sources
        self._wanted = wanted
        self._handoff = handoff
        self._left: deque[Transport] = deque()
        self._accepted = prefill_pb2.PrefillAccepted()
        self._source: Source | None = None
        self.failed: list[Transport] = []
        self.memory = ""
        self._closed = False
        # A choice for each transport, and at most one credit per chunk in flight: those are bounded by the credit.
        self._requests: asyncio.Queue[prefill_pb2.PrefillRequest | None] = asyncio.Queue()

    async def requests(self, start: prefill_pb2.Start) -> AsyncIterator[prefill_pb2.PrefillRequest]:
        """Our side of the call, until it is closed.

        The prefill service ends a call only after that: a credit written into a call that has just ended would fail,
        and gRPC would then keep the call for ever if nobody reads it to its end.
        """
        yield prefill_pb2.PrefillRequest(start=start)
        if self._wanted == (inference_pb2.TRANSPORT_GRPC,) and self._receiver.all_granted:
            self.close()  # there is nothing to choose: Done need not wait for a word of ours to cross a slow link
        while (request := await self._requests.get()) is not None:
            yield request

    def close(self) -> None:
        """We say nothing more."""
        if not self._closed:
            self._closed = True
            self._requests.put_nowait(None)

    async def accepted(self, message: prefill_pb2.PrefillAccepted) -> None:
        """The prefill service took the prompt and offers transports.

        Raises:
            NoTransport: none of them works.
        """
        self._handoff.accepted_ns = time.monotonic_ns()
        self._accepted = message
        self._left.extend(transport.shared(self._wanted, message.transports))
        await self._choose()

    def chunk(self, chunk: Chunk) -> None:
        """KV came.

        Raises:
            HandoffCorrupt: it is not what it should be.
        """
        if self._handoff.transport != inference_pb2.TRANSPORT_GRPC:
            raise HandoffCorrupt("KV came in the call, which was not asked for")
        came_ns = time.monotonic_ns()
        granted = self._receiver.accept(chunk)
        self._handoff.chunk(chunk.header.since_accepted_ns, came_ns, time.monotonic_ns())
        if granted:
            self._requests.put_nowait(prefill_pb2.PrefillRequest(credit=prefill_pb2.Credit(bytes=granted)))
        if self._receiver.all_granted:
            self.close()

    async def ranges(self, message: prefill_pb2.KvRanges) -> bool:
        """KV lies in the prefill service's pool: read it. If that fails, all of it comes by the next transport.

        Returns:
            Whether all KV is here, verified, and was held until it was: Done, when it comes, says nothing new.

        Raises:
            HandoffCorrupt: a range is not what it should be.
            NoTransport: there is no next one.
        """
        if message.transport != self._handoff.transport or self._source is None:
            return False  # of a transport that was given up
        came_ns = time.monotonic_ns()
        pieces = [self._receiver.pieces(item) for item in message.ranges]
        try:
            if pieces:
                await self._source.read([piece for pair in pieces for piece in pair])
        except TransportFailed as error:
            self._given_up(self._handoff.transport, error)
            self._receiver.restart()
            await self._choose()
            return False
        now_ns = time.monotonic_ns()
        for item in message.ranges:
            self._receiver.took(item)
            self._handoff.chunk(item.since_accepted_ns, came_ns, now_ns)
        if self._receiver.whole:
            self.close()
        if not message.HasField("sent"):
            return False
        self._receiver.verify(message.sent)
        return self._source.held(self._accepted.lease)

    async def _choose(self) -> None:
        """Take the next transport that can be used, and say so."""
        while self._left:
            chosen = self._left.popleft()
            try:
                if chosen == inference_pb2.TRANSPORT_GRPC:
                    self._source = None
                else:
                    self._source = await self._sources.open(chosen, self._accepted)
            except TransportFailed as error:
                self._given_up(chosen, error)
                continue
            self._handoff.transport = chosen
            if chosen == inference_pb2.TRANSPORT_SHM:
                self.memory = self._accepted.shared_memory.name
            if transport.needs_choice(self._accepted.transports) and chosen != self._accepted.chosen:
                choice = prefill_pb2.Choice(transport=chosen)
                self._requests.put_nowait(prefill_pb2.PrefillRequest(choice=choice))
            if chosen == inference_pb2.TRANSPORT_GRPC and self._receiver.all_granted:
                self.close()
            return
        names = ", ".join(transport.name(one) for one in self._wanted)
        raise NoTransport(f"no transport works of those this worker allows: {names}")

    def _given_up(self, given_up: Transport, error: TransportFailed) -> None:
        self.failed.append(given_up)
        FALLBACKS.labels(transport.name(given_up)).inc()
        # Between two hosts that is as it should be, every ten seconds at most.
        log.info("transport %s given up: %s", transport.name(given_up), error)
