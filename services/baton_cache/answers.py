"""The stored answers: how one is found, verified, and kept. Redis failing is a miss."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from baton.internal.v1 import response_cache_pb2
from baton.telemetry import tracing
from baton.telemetry.ledger import Timeline
from baton.v1 import ledger_pb2
from baton_cache.key import KeyDigests
from baton_cache.metrics import FILLS, READ_BYTES, WRITTEN_BYTES
from baton_cache.names import Names
from baton_cache.store import NotAValue, Store, StoreFailed
from baton_cache.value import CorruptValue, OtherVersion, decode, encode

MissReason = response_cache_pb2.MissReason


@dataclass(frozen=True, slots=True)
class Missing:
    """There is no answer, and why."""

    reason: MissReason.ValueType


class Answers:
    """Answers by the digests of their keys.

    Args:
        store: where they are.
        names: what things are called there.
        max_value_bytes: of one entry; a larger one is not stored.
    """

    def __init__(self, store: Store, names: Names, max_value_bytes: int) -> None:
        self._store = store
        self._names = names
        self._max_value_bytes = max_value_bytes

    async def find(self, digest: KeyDigests, timeline: Timeline) -> response_cache_pb2.CachedAnswer | Missing:
        """The answer of a key. What does not hold is removed."""
        timeline.enter(ledger_pb2.KIND_CACHE)
        try:
            with tracing.phase("cache get"):
                value = await self._store.get(self._name(digest))
            if value is None:
                return Missing(response_cache_pb2.MISS_REASON_ABSENT)
            READ_BYTES.inc(len(value))
            timeline.enter(ledger_pb2.KIND_SERIALIZE)
            return decode(value, digest.proof)
        except StoreFailed:
            return Missing(response_cache_pb2.MISS_REASON_STORE_FAILED)
        except OtherVersion:
            return Missing(response_cache_pb2.MISS_REASON_ABSENT)
        except (CorruptValue, NotAValue):
            timeline.enter(ledger_pb2.KIND_CACHE)
            with suppress(StoreFailed):  # it will be found corrupt again
                await self._store.remove(self._name(digest))
            return Missing(response_cache_pb2.MISS_REASON_CORRUPT)
        finally:
            timeline.enter(ledger_pb2.KIND_CACHE)

    async def keep(self, digest: KeyDigests, answer: response_cache_pb2.CachedAnswer, ttl_ms: int) -> bool:
        """Store an answer; whether that worked."""
        outcome = await self._keep(digest, answer, ttl_ms)
        FILLS.labels(outcome).inc()
        return outcome == "stored"

    async def _keep(self, digest: KeyDigests, answer: response_cache_pb2.CachedAnswer, ttl_ms: int) -> str:
        """Store it; the outcome in a word."""
        value = encode(answer, digest.proof)
        if len(value) > self._max_value_bytes:
            return "too_large"
        try:
            with tracing.phase("cache put", {"baton.cache.bytes": len(value)}):
                await self._store.set(self._name(digest), value, ttl_ms)
        except StoreFailed:
            return "store_failed"
        WRITTEN_BYTES.inc(len(value))
        return "stored"

    def _name(self, digest: KeyDigests) -> str:
        return self._names.answer(digest.name)
