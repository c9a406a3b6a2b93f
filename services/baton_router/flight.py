"""One answer on its way to everyone who asked for it at the same time.

A flight has one source, which writes the answer, and any number of readers. It lives as long as somebody wants it:
when the last reader leaves, and no other router follows, its source is cancelled, and with it everything below. Every
request reads from a flight; one that must not share has one of its own. What waits for a reader when it gets to read is
given to it in one piece: a reader that keeps up gets every chunk by itself, at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from baton.rpc.errors import BatonError, DeadlineExceeded, SlowReader, Unavailable
from baton.rpc.stream_log import StreamLog
from baton.v1 import inference_pb2, ledger_pb2, sampling_pb2
from baton_router.account import Account
from baton_router.chunks import CachedChunk, joined, message_from, weight
from baton_router.metrics import FLIGHTS


@dataclass(slots=True)
class Ending:
    """How an answer came about and ended: what its readers' summaries say."""

    finish_reason: sampling_pb2.FinishReason.ValueType
    usage: sampling_pb2.Usage
    cache_status: inference_pb2.CacheStatus.ValueType
    cache_similarity: float | None = None
    cache_entry: str = ""
    prefill_placement: inference_pb2.Placement.ValueType = inference_pb2.PLACEMENT_UNSPECIFIED
    transport: inference_pb2.Transport.ValueType = inference_pb2.TRANSPORT_UNSPECIFIED
    migrations: int = 0
    preemptions: int = 0

    @property
    def stored(self) -> bool:
        """Whether the answer was read from the response cache."""
        return self.cache_status in (inference_pb2.CACHE_STATUS_HIT, inference_pb2.CACHE_STATUS_SEMANTIC)


@dataclass(eq=False, slots=True)
class Reader:
    """One request's place in a flight.

    Args:
        account: of the request; it stalls from the flight's end on.
        deadline: of the request, on the event loop's clock.
        limit: tokens that may wait for it; None: any number.
    """

    account: Account
    deadline: float
    limit: int | None
    joins: bool = True
    """It gets what waits for it in one piece; otherwise chunk by chunk, as it was generated."""
    position: int = 0
    """Chunks it has read."""
    boarded_at: int = 0
    """Chunks that were there when it boarded, or came at once while it was up to date: not to have read those is not
    slow."""
    unread_tokens: int = 0
    """That came since. A chunk without any counts as one."""
    error: BatonError | None = None
    """Why it may not read on."""


class Flight:
    """See above.

    Attributes:
        request_id: of the request it was started for.
        log: the answer so far.
        ending: how it ended; None while it flies, and when it failed.
        accepted: nothing is known that keeps its readers from an answer: it has a place at the workers, or needs none.
        tokens: in the log.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.log: StreamLog[CachedChunk] = StreamLog()
        self.ending: Ending | None = None
        self.tokens = 0
        self.accepted = False
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._readers: set[Reader] = set()
        self._wanted_elsewhere = False
        self._task: asyncio.Task[None] | None = None

    @property
    def boardable(self) -> bool:
        """Whether its answer is still to be had here."""
        return not self.log.ended and self._task is not None and not self._task.cancelling()

    def deadline(self) -> float | None:
        """The latest of its readers', on the event loop's clock; None: it has no readers."""
        return max((reader.deadline for reader in self._readers), default=None)

    def since_start_us(self) -> int:
        """Microseconds since it began."""
        return int((self._loop.time() - self._began) * 1e6)

    async def reached(self, since_start_us: int) -> None:
        """Wait until so long after it began."""
        await asyncio.sleep(self._began + since_start_us / 1e6 - self._loop.time())

    def token_ids(self) -> list[int]:
        """The answer's tokens so far."""
        return [token_id for chunk in self.log.items for token_id in chunk.token_ids]

    def launch(self, source: Source, group: asyncio.TaskGroup, over: Callable[[], object]) -> None:
        """Start the source in a task of its own, owned by `group`; `over` is called when that is gone."""
        self._task = group.create_task(self._fly(source))
        self._task.add_done_callback(lambda task: over())  # a task cancelled before its first step runs nothing else

    def stop(self) -> None:
        """Cancel the source, whoever reads."""
        if self._task is not None:
            self._task.cancel()

    def wanted_elsewhere(self, wanted: bool) -> None:
        """Whether another router follows it, from now on."""
        self._wanted_elsewhere = wanted
        self._stop_if_unwanted()

    def accept(self) -> None:
        """Its readers may be told that there will be an answer."""
        if not self.accepted:
            self.accepted = True
            self.log.notify()

    async def wait_accepted(self, reader: Reader) -> None:
        """Until its readers may be told so. One that is refused gets its status and nothing before: then gRPC's own
        retries may take it elsewhere.

        Raises:
            BatonError: there will be no answer, or the reader may not read on.
        """
        while not self.accepted and not self.log.ended and reader.error is None:
            await self.log.changed()
        if not self.accepted and (error := reader.error or self.log.error) is not None:
            raise error.with_traceback(None)

    def push(self, chunk: CachedChunk) -> None:
        """The next chunk, from the source as it is generated. A reader that is too far behind may not read on."""
        self.log.extend([chunk])
        self.tokens += len(chunk.token_ids)
        for reader in list(self._readers):
            self._wait_for(reader, weight(chunk))

    def catch_up(self, chunks: Sequence[CachedChunk]) -> None:
        """The next chunks, which were generated elsewhere and come at once, perhaps long after they were. A reader that
        has read all there was is not late for these, however many; one that has not is as late as for any other.
        """
        before = len(self.log.items)
        self.log.extend(chunks)
        if chunks:  # what is generated here later goes on in the time of who began
            self._began = min(self._began, self._loop.time() - chunks[-1].since_start_us / 1e6)
        self.tokens += sum(len(chunk.token_ids) for chunk in chunks)
        tokens = sum(weight(chunk) for chunk in chunks)
        for reader in list(self._readers):
            if reader.position >= before:
                reader.boarded_at = len(self.log.items)
            else:
                self._wait_for(reader, tokens)

    def replay(self, chunks: Iterable[CachedChunk]) -> None:
        """A whole stored answer. It is in memory in any case, so no reader is late for it."""
        self.log.extend(chunks)
        self.tokens = sum(len(chunk.token_ids) for chunk in self.log.items)

    def land(self, ending: Ending) -> None:
        """The answer is complete: from now on its readers' time is their clients' reading."""
        self.ending = ending
        self._end(None)

    def fail(self, error: BaseException) -> None:
        """The answer will not be complete."""
        self._end(error)

    @asynccontextmanager
    async def reading(self, reader: Reader) -> AsyncIterator[AsyncGenerator[CachedChunk, None]]:
        """The answer's chunks for one reader. The last one to leave ends what nobody wants, and waits until it has."""
        reader.boarded_at = len(self.log.items)
        self._readers.add(reader)
        timer = self._loop.call_at(reader.deadline, self._refuse, reader, DeadlineExceeded("the deadline passed"))
        try:
            async with aclosing(self._chunks(reader)) as chunks:
                yield chunks
        finally:
            timer.cancel()
            self._readers.discard(reader)
            self._stop_if_unwanted()
            if self._task is not None and self._task.cancelling():
                await asyncio.wait([self._task])

    async def _chunks(self, reader: Reader) -> AsyncGenerator[CachedChunk, None]:
        log = self.log
        while True:
            while reader.error is None and reader.position < len(log.items):
                chunks = message_from(log.items, reader.position) if reader.joins else [log.items[reader.position]]
                came_since = chunks[max(0, reader.boarded_at - reader.position) :]
                reader.unread_tokens -= sum(weight(chunk) for chunk in came_since)
                reader.position += len(chunks)
                yield joined(chunks)
            if (error := reader.error or log.error) is not None:
                raise error.with_traceback(None)  # many raise it: each would add its own to one ever longer
            if log.ended:
                return
            await log.changed()

    async def _fly(self, source: Source) -> None:
        try:
            await source(self)
        except Exception as error:  # noqa: BLE001 handed to the readers, which raise it
            self._end(error)
        finally:
            self._end(Unavailable("this router is stopping"))  # if it did not end before

    def _wait_for(self, reader: Reader, tokens: int) -> None:
        """So many tokens more wait for it."""
        reader.unread_tokens += tokens
        if reader.limit is not None and reader.unread_tokens > reader.limit:
            self._refuse(reader, SlowReader(f"the client does not read: {reader.unread_tokens} tokens wait for it"))

    def _refuse(self, reader: Reader, error: BatonError) -> None:
        """It may not read on, and does not keep the flight going any more."""
        if reader in self._readers:
            reader.error = error
            self._readers.discard(reader)
            self.log.notify()
            self._stop_if_unwanted()
            reader.account.settle(bookable=self._task is not None and bool(self._task.cancelling()))

    def _end(self, error: BaseException | None) -> None:
        if not self.log.ended:
            for reader in self._readers:
                reader.account.enter(ledger_pb2.KIND_STALL)
            self.log.end(error)

    def _stop_if_unwanted(self) -> None:
        if not self._readers and not self._wanted_elsewhere and not self.log.ended:
            self.stop()


Source = Callable[[Flight], Coroutine[None, None, None]]
"""Writes an answer into a flight until it lands; raises what its readers are to raise."""


class Flights:
    """All flights of this router, and the tasks that are their sources."""

    def __init__(self) -> None:
        self._shared: dict[bytes, Flight] = {}
        self._live: set[Flight] = set()
        self._group: asyncio.TaskGroup | None = None

    @asynccontextmanager
    async def owned(self) -> AsyncIterator[None]:
        """Own the sources for the length of the block. What still flies at its end is stopped; what has landed gets its
        time, which is bounded, to be stored.
        """
        async with asyncio.TaskGroup() as self._group:
            try:
                yield
            finally:
                for flight in self._live:
                    if not flight.log.ended:
                        flight.stop()
        self._group = None

    def boardable(self, key: bytes) -> Flight | None:
        """The flight that brings the answer to `key`."""
        flight = self._shared.get(key)
        return flight if flight is not None and flight.boardable else None

    def launch(self, source: Source, request_id: str, key: bytes | None) -> Flight:
        """A new flight; without a key nobody else boards it."""
        assert self._group is not None, "not open"
        flight = Flight(request_id)
        self._live.add(flight)
        if key is not None:
            self._shared[key] = flight
            FLIGHTS.set(len(self._shared))

        def over() -> None:
            self._live.discard(flight)
            if key is not None and self._shared.get(key) is flight:
                del self._shared[key]
                FLIGHTS.set(len(self._shared))

        flight.launch(source, self._group, over)
        return flight
