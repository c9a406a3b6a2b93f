"""One call of `ResponseCache.Join`, from a flight's side: who the flight is, and what it tells the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, Final

import grpc

from baton.internal.v1 import response_cache_pb2
from baton.rpc.channel import read_status
from baton.rpc.errors import BatonError, PoisonRequest, Unavailable, WorkerLost
from baton_router.flight import Flight

log = logging.getLogger(__name__)

JoinRequest = response_cache_pb2.JoinRequest
JoinResponse = response_cache_pb2.JoinResponse

LAST_WORD_SECONDS: Final = 2.0
"""How long the end of an answer may take to get to the cache."""


class CacheLost(Exception):
    """The cache service ended the call, or says nothing any more."""


class Join:
    """A call in which the cache has told us our seat.

    Args:
        flight: whose answer it is about.
        start: first message.
    """

    def __init__(self, flight: Flight, start: response_cache_pb2.JoinStart) -> None:
        self._flight = flight
        self._start = start
        self._messages: AsyncIterator[JoinResponse] | None = None
        self._known_chunks = self._known_tokens = 0  # of the flight, that the cache has: we got or gave them
        self._wanted = False
        self._last_word: JoinRequest | None = None
        self._closed = False
        self._stirred = asyncio.Event()  # there may be something to say
        self._over = asyncio.Event()
        self._taken = False  # our last word
        self.seat = response_cache_pb2.JoinSeat()

    async def speak(self, call: Any) -> None:
        """Send `requests`. In a task of its own, to be cancelled: a write into a call that ended may wait for ever, and
        gRPC's own task for an iterator of requests waits with it.
        """
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it ended: whoever reads it knows why
            async with aclosing(self.requests()) as requests:
                async for request in requests:
                    await call.write(request)
            await call.done_writing()

    async def requests(self) -> AsyncGenerator[JoinRequest, None]:
        """What we say: start; as a leader the chunks while they are wanted, and the last word."""
        yield JoinRequest(start=self._start)
        answer = self._flight.log
        while True:
            if self._wanted and self._known_chunks < len(answer.items):
                batch = answer.items[self._known_chunks :]
                yield JoinRequest(chunks=response_cache_pb2.JoinChunks(index=self._known_tokens, chunks=batch))
                self._know(batch)
            elif self._last_word is not None:
                yield self._last_word
                return
            elif self._closed:
                return
            elif self._wanted:
                await answer.changed()
            else:  # not woken by chunks: a leader whom nobody follows has nothing to do for them
                self._stirred.clear()
                await self._stirred.wait()

    async def take_seat(self, messages: AsyncIterator[JoinResponse]) -> None:
        """Read the first message.

        Raises:
            CacheLost: it is not what it should be.
        """
        self._messages = messages
        first = await anext(messages, None)
        if first is None or first.WhichOneof("message") != "seat":
            raise CacheLost("no seat was given")
        self.seat = first.seat

    async def follow(self, silence: float) -> response_cache_pb2.JoinEnd | None:
        """Push the leader's chunks into the flight, to their end. None: from now on this flight leads.

        Args:
            silence: seconds without any message after which the leader is given up.

        Raises:
            CacheLost: somebody else must go on.
            BatonError: the generation failed, and would here too.
        """
        assert self._messages is not None
        try:
            while True:
                async with asyncio.timeout(silence):
                    message = await anext(self._messages, None)
                match message.WhichOneof("message") if message is not None else None:
                    case "chunks":
                        assert message is not None
                        self._push(message.chunks)
                    case "seat":
                        return None
                    case "end":
                        assert message is not None
                        return message.end
                    case "failed":
                        assert message is not None
                        raise _shared_error(message.failed)
                    case _:
                        raise CacheLost("the call ended early")
        except TimeoutError:
            raise CacheLost(f"nothing came for {silence:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise CacheLost(f"{error.code().name}: {error.details()}") from error

    @asynccontextmanager
    async def leading(self) -> AsyncIterator[None]:
        """Tell the flight for the length of the block whether it is wanted elsewhere."""
        listening = asyncio.create_task(self._listen())
        try:
            yield
        finally:
            listening.cancel()
            await asyncio.wait([listening])

    async def done(self, answer: response_cache_pb2.CachedAnswer, ttl_seconds: float | None) -> None:
        """The answer is complete: store it, and tell those who follow.

        Raises:
            CacheLost: it may not have got there.
        """
        done = response_cache_pb2.JoinDone(answer=answer)
        if ttl_seconds is not None:
            done.ttl.FromNanoseconds(int(ttl_seconds * 1e9))
        await self._say(JoinRequest(done=done))

    async def failed(self, error: BatonError) -> None:
        """Nobody else will do better."""
        with suppress(CacheLost):
            failed = response_cache_pb2.JoinFailed(reason=error.reason, message=str(error))
            await self._say(JoinRequest(failed=failed))

    async def leave(self) -> None:
        """The answer is complete; read on to the call's status, or both sides take it for cancelled."""
        assert self._messages is not None
        self.close()
        await read_status(self._messages)

    def close(self) -> None:
        """End our side, so that the task that writes it ends."""
        self._closed = True
        self._wanted = False
        self._stir()

    def _stir(self) -> None:
        """Have `requests` look at what changed."""
        self._stirred.set()
        self._flight.log.notify()

    async def _say(self, last_word: JoinRequest) -> None:
        """Say it and wait until the cache has ended the call."""
        self._last_word = last_word
        self._stir()
        try:
            async with asyncio.timeout(LAST_WORD_SECONDS):
                await self._over.wait()
        except TimeoutError:
            raise CacheLost(f"the last word was not taken within {LAST_WORD_SECONDS:g} s") from None
        if not self._taken:
            raise CacheLost("the call broke")

    async def _listen(self) -> None:
        """Read what a leader is told, to the end of the call."""
        assert self._messages is not None
        try:
            async for message in self._messages:
                if message.WhichOneof("message") == "interest":
                    self._wanted = message.interest.wanted
                    self._stir()
                    self._flight.wanted_elsewhere(self._wanted)
            self._taken = self._last_word is not None
        except grpc.aio.AioRpcError as error:
            log.debug("the cache left a leader: %s", error.code().name)
        finally:
            self._over.set()
            self._wanted = False
            self._flight.wanted_elsewhere(False)

    def _push(self, chunks: response_cache_pb2.JoinChunks) -> None:
        """Into the flight.

        Raises:
            CacheLost: there is a gap.
        """
        if chunks.index != self._flight.tokens:
            raise CacheLost(f"token {chunks.index} instead of {self._flight.tokens}")
        self._flight.catch_up(chunks.chunks)
        self._know(chunks.chunks)

    def _know(self, chunks: Sequence[response_cache_pb2.CachedChunk]) -> None:
        self._known_chunks += len(chunks)
        self._known_tokens += sum(len(chunk.token_ids) for chunk in chunks)


def _shared_error(failed: response_cache_pb2.JoinFailed) -> BatonError:
    if failed.reason == PoisonRequest.reason:
        return PoisonRequest()
    return WorkerLost(failed.message) if failed.reason == WorkerLost.reason else Unavailable(failed.message)
