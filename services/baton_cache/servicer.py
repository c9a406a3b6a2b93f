"""The life of a lookup, and of a fill.

1. The key is checked; one that lacks something is refused, one whose answers differ from time to time is a miss.
2. Its digests are computed: the entry's name, and the proof that an entry is the right one.
3. Redis is asked. Whatever goes wrong with it, this is a miss.
4. What came is verified. What does not hold is removed, and is a miss too.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import grpc

from baton.internal.v1 import response_cache_pb2, response_cache_pb2_grpc
from baton.rpc.interceptor import adopt_request_id
from baton.telemetry import tracing
from baton.telemetry.ledger import Timeline
from baton.v1 import ledger_pb2
from baton_cache.checks import check_answer, check_key, ttl_ms, uncacheable
from baton_cache.key import KeyDigests, digests
from baton_cache.metrics import FILLS, LOOKUPS, READ_BYTES, WRITTEN_BYTES
from baton_cache.store import NotAValue, Store, StoreFailed
from baton_cache.value import CorruptValue, OtherVersion, decode, encode

Context = grpc.aio.ServicerContext[Any, Any]

_OUTCOMES: Final = {
    response_cache_pb2.MISS_REASON_UNSPECIFIED: "hit",
    response_cache_pb2.MISS_REASON_ABSENT: "absent",
    response_cache_pb2.MISS_REASON_STORE_FAILED: "store_failed",
    response_cache_pb2.MISS_REASON_CORRUPT: "corrupt",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds an entry."""

    default_ttl_seconds: float
    max_ttl_seconds: float
    max_value_bytes: int


class ResponseCacheServicer(response_cache_pb2_grpc.ResponseCacheServicer):
    """The cache's API.

    Args:
        store: where the entries are.
        prefix: what every entry's name begins with.
        limits: of an entry.
    """

    def __init__(self, store: Store, prefix: str, limits: Limits) -> None:
        self._store = store
        self._prefix = prefix
        self._limits = limits

    async def Lookup(
        self, request: response_cache_pb2.LookupRequest, context: Context
    ) -> response_cache_pb2.LookupResponse:
        """Look an answer up."""
        timeline = Timeline(ledger_pb2.HOP_CACHE, ledger_pb2.KIND_CACHE)
        adopt_request_id(context)
        check_key(request)
        response = response_cache_pb2.LookupResponse(miss_reason=response_cache_pb2.MISS_REASON_ABSENT)
        if uncacheable(request.key) is None:
            response = await self._find(request.key, timeline)
        LOOKUPS.labels(_OUTCOMES[response.miss_reason]).inc()
        response.timing.CopyFrom(timeline.timing())
        return response

    async def Fill(self, request: response_cache_pb2.FillRequest, context: Context) -> response_cache_pb2.FillResponse:
        """Store an answer."""
        adopt_request_id(context)
        check_key(request)
        if (refusal := uncacheable(request.key)) is not None:
            raise refusal
        check_answer(request.answer)
        ttl = ttl_ms(request, self._limits.default_ttl_seconds, self._limits.max_ttl_seconds)
        outcome = await self._keep(request, ttl)
        FILLS.labels(outcome).inc()
        return response_cache_pb2.FillResponse(stored=outcome == "stored")

    async def _find(self, key: response_cache_pb2.CacheKey, timeline: Timeline) -> response_cache_pb2.LookupResponse:
        timeline.enter(ledger_pb2.KIND_SERIALIZE)
        digest = digests(key)
        timeline.enter(ledger_pb2.KIND_CACHE)
        try:
            with tracing.phase("cache get"):
                value = await self._store.get(self._name(digest))
            if value is None:
                return _miss(response_cache_pb2.MISS_REASON_ABSENT)
            READ_BYTES.inc(len(value))
            timeline.enter(ledger_pb2.KIND_SERIALIZE)
            return response_cache_pb2.LookupResponse(hit=True, answer=decode(value, digest.proof))
        except StoreFailed:
            return _miss(response_cache_pb2.MISS_REASON_STORE_FAILED)
        except OtherVersion:
            return _miss(response_cache_pb2.MISS_REASON_ABSENT)
        except (CorruptValue, NotAValue):
            timeline.enter(ledger_pb2.KIND_CACHE)
            with suppress(StoreFailed):  # it will be found corrupt again
                await self._store.remove(self._name(digest))
            return _miss(response_cache_pb2.MISS_REASON_CORRUPT)
        finally:
            timeline.enter(ledger_pb2.KIND_CACHE)

    async def _keep(self, request: response_cache_pb2.FillRequest, ttl: int) -> str:
        """Store it; the outcome in a word."""
        digest = digests(request.key)
        value = encode(request.answer, digest.proof)
        if len(value) > self._limits.max_value_bytes:
            return "too_large"
        try:
            with tracing.phase("cache put", {"baton.cache.bytes": len(value)}):
                await self._store.set(self._name(digest), value, ttl)
        except StoreFailed:
            return "store_failed"
        WRITTEN_BYTES.inc(len(value))
        return "stored"

    def _name(self, digest: KeyDigests) -> str:
        return self._prefix + digest.name


def _miss(reason: response_cache_pb2.MissReason.ValueType) -> response_cache_pb2.LookupResponse:
    return response_cache_pb2.LookupResponse(miss_reason=reason)
