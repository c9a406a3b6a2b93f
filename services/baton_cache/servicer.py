"""The life of a lookup, of a fill, and of a call that joins others.

1. The key is checked; one that lacks something is refused, one whose answers differ from time to time is a miss.
2. Its digests are computed: the entry's name, and the proof that an entry is the right one.
3. Redis is asked. Whatever goes wrong with it, this is a miss.
4. What came is verified. What does not hold is removed, and is a miss too.
5. After a miss, a caller that allows it gets the answer of a similar question (`semantic/`), if there is one.
6. After that, a caller that joins takes its seat in the flight that brings the answer (`flight.py`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import grpc

from baton.internal.v1 import response_cache_pb2, response_cache_pb2_grpc
from baton.rpc.errors import BatonError, FailedPrecondition, InvalidArgument
from baton.rpc.interceptor import adopt_request_id
from baton.rpc.start import receive_start
from baton.telemetry.ledger import Timeline
from baton.v1 import ledger_pb2
from baton_cache.answers import Answers, Missing
from baton_cache.checks import check_answer, check_key, ttl_ms, uncacheable
from baton_cache.flights import Flights
from baton_cache.key import KeyDigests, Keys
from baton_cache.metrics import JOINS, LOOKUPS
from baton_cache.seat import Misbehaved, Seat
from baton_cache.semantic.semantic import SemanticCache

Context = grpc.aio.ServicerContext[Any, Any]
Asked = response_cache_pb2.LookupRequest | response_cache_pb2.FillRequest | response_cache_pb2.JoinStart

_OUTCOMES: Final = {
    response_cache_pb2.MISS_REASON_UNSPECIFIED: "hit",
    response_cache_pb2.MISS_REASON_ABSENT: "absent",
    response_cache_pb2.MISS_REASON_STORE_FAILED: "store_failed",
    response_cache_pb2.MISS_REASON_CORRUPT: "corrupt",
}


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long an entry lives, seconds."""

    default: float
    longest: float

    def draw(self, request: response_cache_pb2.FillRequest | response_cache_pb2.JoinDone) -> int:
        """Milliseconds that an answer may be served."""
        return ttl_ms(request, self.default, self.longest, random.random())


class ResponseCacheServicer(response_cache_pb2_grpc.ResponseCacheServicer):
    """The cache's API.

    Args:
        keys: digests of keys.
        answers: what is stored.
        flights: what is being generated.
        lifetimes: of an entry.
        semantic: finds answers of similar questions; None: nobody may have them.
    """

    def __init__(
        self,
        keys: Keys,
        answers: Answers,
        flights: Flights,
        lifetimes: Lifetimes,
        semantic: SemanticCache | None = None,
    ) -> None:
        self._keys = keys
        self._answers = answers
        self._flights = flights
        self._lifetimes = lifetimes
        self._semantic = semantic

    async def Lookup(
        self, request: response_cache_pb2.LookupRequest, context: Context
    ) -> response_cache_pb2.LookupResponse:
        """Look an answer up."""
        timeline = Timeline(ledger_pb2.HOP_CACHE, ledger_pb2.KIND_CACHE)
        adopt_request_id(context)
        check_key(request)
        return await self._find(request, self._digests(request.key, timeline), timeline)

    async def Fill(self, request: response_cache_pb2.FillRequest, context: Context) -> response_cache_pb2.FillResponse:
        """Store an answer."""
        adopt_request_id(context)
        check_key(request)
        if (refusal := uncacheable(request.key)) is not None:
            raise refusal
        check_answer(request.answer)
        ttl = self._lifetimes.draw(request)
        stored = await self._keep(request, self._keys.digests(request.key), request.answer, ttl)
        return response_cache_pb2.FillResponse(stored=stored)

    async def Join(
        self, request_iterator: AsyncIterator[response_cache_pb2.JoinRequest], context: Context
    ) -> AsyncGenerator[response_cache_pb2.JoinResponse, None]:
        """Look an answer up, or share its generation."""
        timeline = Timeline(ledger_pb2.HOP_CACHE, ledger_pb2.KIND_CACHE)
        adopt_request_id(context)
        start = (await receive_start(request_iterator)).start
        check_key(start)
        if (refusal := uncacheable(start.key)) is not None:
            raise refusal
        digest = self._digests(start.key, timeline)
        lookup = response_cache_pb2.LookupResponse(miss_reason=response_cache_pb2.MISS_REASON_ABSENT)
        if self._flights.under_way(digest.name) is None:
            lookup = await self._find(start, digest, timeline)
        if lookup.hit:
            JOINS.labels("hit").inc()
            seat = response_cache_pb2.JoinSeat(role=response_cache_pb2.JOIN_ROLE_HIT, lookup=lookup)
            yield response_cache_pb2.JoinResponse(seat=seat)
            return
        flight = self._flights.under_way(digest.name) or self._flights.start(
            digest,
            # Redis has just cost the caller its timeout: to ask once more would cost another, and more than it waits.
            here_only=lookup.miss_reason == response_cache_pb2.MISS_REASON_STORE_FAILED,
        )
        seat_here = flight.take_seat(partial(self._keep, start, digest))
        listening = asyncio.create_task(self._listen(request_iterator, seat_here))
        try:
            first = True
            async for response in seat_here.responses():
                if first:
                    first = False
                    lookup.timing.CopyFrom(timeline.timing())
                    response.seat.lookup.CopyFrom(lookup)
                yield response
        finally:
            seat_here.leave()
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def _listen(self, requests: AsyncIterator[response_cache_pb2.JoinRequest], seat: Seat) -> None:
        """Take what a leader says."""
        try:
            async for request in requests:
                match request.WhichOneof("message"):
                    case "chunks":
                        seat.chunks(request.chunks)
                    case "done":
                        check_answer(request.done.answer)
                        seat.done(request.done.answer, self._lifetimes.draw(request.done))
                    case "failed":
                        seat.failed(request.failed)
                    case _:
                        raise InvalidArgument("start", "came twice")
        except Misbehaved as error:
            seat.refuse(FailedPrecondition(str(error)))
        except BatonError as error:
            seat.refuse(error)

    def _digests(self, key: response_cache_pb2.CacheKey, timeline: Timeline) -> KeyDigests:
        timeline.enter(ledger_pb2.KIND_SERIALIZE)
        digests = self._keys.digests(key)
        timeline.enter(ledger_pb2.KIND_CACHE)
        return digests

    async def _keep(
        self, asked: Asked, digest: KeyDigests, answer: response_cache_pb2.CachedAnswer, ttl_ms: int
    ) -> bool:
        """Store an answer, to be found by its key and, where the caller allowed it, by similar questions."""
        stored = await self._answers.keep(digest, answer, ttl_ms)
        if stored and self._semantic is not None and asked.HasField("question"):
            await self._semantic.add(asked.question, asked.key, answer, ttl_ms)
        return stored

    async def _find(self, asked: Asked, digest: KeyDigests, timeline: Timeline) -> response_cache_pb2.LookupResponse:
        response = response_cache_pb2.LookupResponse(miss_reason=response_cache_pb2.MISS_REASON_ABSENT)
        if uncacheable(asked.key) is None:
            found = await self._answers.find(digest, timeline)
            if isinstance(found, Missing):
                response = await self._find_similar(asked, found, timeline)
            else:
                response = response_cache_pb2.LookupResponse(hit=True, answer=found, entry=digest.name)
        outcome = "similar" if response.HasField("similarity") else _OUTCOMES[response.miss_reason]
        LOOKUPS.labels(outcome).inc()
        response.timing.CopyFrom(timeline.timing())
        return response

    async def _find_similar(
        self, asked: Asked, missing: Missing, timeline: Timeline
    ) -> response_cache_pb2.LookupResponse:
        """The answer of a similar question, where the caller allows it."""
        match = None
        # A Redis that has just cost the caller its timeout has no similar question's answer either.
        failed = missing.reason == response_cache_pb2.MISS_REASON_STORE_FAILED
        if self._semantic is not None and asked.HasField("question") and not failed:
            match = await self._semantic.find(asked.question, asked.key, timeline)
        if match is None:
            return response_cache_pb2.LookupResponse(miss_reason=missing.reason)
        return response_cache_pb2.LookupResponse(
            hit=True, answer=match.answer, entry=match.entry, similarity=match.similarity
        )
