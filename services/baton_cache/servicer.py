"""The life of a lookup, and of a fill.

1. The key is checked; one that lacks something is refused, one whose answers differ from time to time is a miss.
2. Its digests are computed: the entry's name, and the proof that an entry is the right one.
3. Redis is asked. Whatever goes wrong with it, this is a miss.
4. What came is verified. What does not hold is removed, and is a miss too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import grpc

from baton.internal.v1 import response_cache_pb2, response_cache_pb2_grpc
from baton.rpc.interceptor import adopt_request_id
from baton.telemetry.ledger import Timeline
from baton.v1 import ledger_pb2
from baton_cache.answers import Answers, Missing
from baton_cache.checks import check_answer, check_key, ttl_ms, uncacheable
from baton_cache.key import Keys
from baton_cache.metrics import LOOKUPS

Context = grpc.aio.ServicerContext[Any, Any]

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


class ResponseCacheServicer(response_cache_pb2_grpc.ResponseCacheServicer):
    """The cache's API.

    Args:
        keys: digests of keys.
        answers: what is stored.
        lifetimes: of an entry.
    """

    def __init__(self, keys: Keys, answers: Answers, lifetimes: Lifetimes) -> None:
        self._keys = keys
        self._answers = answers
        self._lifetimes = lifetimes

    async def Lookup(
        self, request: response_cache_pb2.LookupRequest, context: Context
    ) -> response_cache_pb2.LookupResponse:
        """Look an answer up."""
        timeline = Timeline(ledger_pb2.HOP_CACHE, ledger_pb2.KIND_CACHE)
        adopt_request_id(context)
        check_key(request)
        return await self._find(request.key, timeline)

    async def Fill(self, request: response_cache_pb2.FillRequest, context: Context) -> response_cache_pb2.FillResponse:
        """Store an answer."""
        adopt_request_id(context)
        check_key(request)
        if (refusal := uncacheable(request.key)) is not None:
            raise refusal
        check_answer(request.answer)
        ttl = ttl_ms(request, self._lifetimes.default, self._lifetimes.longest)
        stored = await self._answers.keep(self._keys.digests(request.key), request.answer, ttl)
        return response_cache_pb2.FillResponse(stored=stored)

    async def _find(self, key: response_cache_pb2.CacheKey, timeline: Timeline) -> response_cache_pb2.LookupResponse:
        response = response_cache_pb2.LookupResponse(miss_reason=response_cache_pb2.MISS_REASON_ABSENT)
        if uncacheable(key) is None:
            timeline.enter(ledger_pb2.KIND_SERIALIZE)
            digest = self._keys.digests(key)
            found = await self._answers.find(digest, timeline)
            if isinstance(found, Missing):
                response.miss_reason = found.reason
            else:
                response = response_cache_pb2.LookupResponse(hit=True, answer=found, entry=digest.name)
        LOOKUPS.labels(_OUTCOMES[response.miss_reason]).inc()
        response.timing.CopyFrom(timeline.timing())
        return response
