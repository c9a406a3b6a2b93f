"""The stored answers: how one is found, verified, and kept. Redis failing is a miss."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from baton.internal.v1 import response_cache_pb2
from baton.telemetry import tracing
from baton.telemetry.ledger import Timeline
from baton.v1 import ledger_pb2
from baton_cache.key import KeyDigests
from baton_cache.local import LocalTier
from baton_cache.metrics import ANSWER_BYTES, FILLS, HITS, READ_BYTES, REJECTED, WRITTEN_BYTES
from baton_cache.names import Names
from baton_cache.store import NotAValue, Read, Store, StoreFailed
from baton_cache.value import OVERHEAD, CorruptValue, OtherVersion, TooLarge, decode, encode, inspect

_LARGE: Final = 64 * 1024
"""Bytes of an answer that is compressed in a thread: it takes a millisecond, in which others would wait."""

MissReason = response_cache_pb2.MissReason


@dataclass(frozen=True, slots=True)
class Missing:
    """There is no answer, and why."""

    reason: MissReason.ValueType


class Answers:
    """Answers by the digests of their keys.

    Args:
        store: where they are.
        local: where those that were read lately are, too.
        names: what things are called.
        most_bytes: of one answer; a larger one is neither stored nor read.
    """

    def __init__(self, store: Store, local: LocalTier, names: Names, most_bytes: int) -> None:
        self._store = store
        self._local = local
        self._names = names
        self._most_bytes = most_bytes

    async def find(self, digest: KeyDigests, timeline: Timeline) -> response_cache_pb2.CachedAnswer | Missing:
        """The answer of a key. What does not hold is removed."""
        timeline.enter(ledger_pb2.KIND_CACHE)
        name = self._names.answer(digest.name)
        try:
            with tracing.phase("cache get"):
                value = self._local.get(name)
                tier = "local"
                if value is None:
                    value = await self._read(name)
                    tier = "redis"
            if value is None:
                return Missing(response_cache_pb2.MISS_REASON_ABSENT)
            timeline.enter(ledger_pb2.KIND_SERIALIZE)
            answer = decode(value, digest.proof, self._most_bytes)
            HITS.labels(tier).inc()
            return answer
        except StoreFailed:
            return Missing(response_cache_pb2.MISS_REASON_STORE_FAILED)
        except (OtherVersion, TooLarge) as error:
            REJECTED.labels("too_large" if isinstance(error, TooLarge) else "other_version").inc()
            return Missing(response_cache_pb2.MISS_REASON_ABSENT)
        except (CorruptValue, NotAValue):
            REJECTED.labels("corrupt").inc()
            timeline.enter(ledger_pb2.KIND_CACHE)
            self._local.changed(name)
            with suppress(StoreFailed):  # it will be found corrupt again
                await self._store.remove(name)
            return Missing(response_cache_pb2.MISS_REASON_CORRUPT)
        finally:
            timeline.enter(ledger_pb2.KIND_CACHE)

    async def _read(self, name: str) -> bytes | None:
        with self._local.reading(name) as reading:
            read = await self._store.get(name, self._most_bytes + OVERHEAD, with_ttl=not reading.spoilt)
            if read is None:
                return None
            READ_BYTES.inc(len(read.value))
            if len(read.value) > self._most_bytes + OVERHEAD:
                raise TooLarge("not read to its end")
            self._local.keep(name, reading, read.value, read.ttl_seconds)
            return read.value

    async def look(self, entry: str) -> tuple[response_cache_pb2.CachedAnswer, Read] | None:
        """The answer of an entry, whatever key it is of, and what lies in Redis; None: there is none.

        Raises:
            StoreFailed: not known.
            CorruptValue, NotAValue, OtherVersion, TooLarge: it would not be served.
        """
        read = await self._store.get(self._names.answer(entry), self._most_bytes + OVERHEAD, with_ttl=True)
        return None if read is None else (inspect(read.value, self._most_bytes), read)

    async def keep(self, digest: KeyDigests, answer: response_cache_pb2.CachedAnswer, ttl_ms: int) -> bool:
        """Store an answer; whether that worked."""
        outcome = await self._keep(digest, answer, ttl_ms)
        FILLS.labels(outcome).inc()
        return outcome == "stored"

    async def _keep(self, digest: KeyDigests, answer: response_cache_pb2.CachedAnswer, ttl_ms: int) -> str:
        """Store it; the outcome in a word."""
        try:
            if answer.ByteSize() > _LARGE:
                value = await asyncio.to_thread(encode, answer, digest.proof, self._most_bytes)
            else:
                value = encode(answer, digest.proof, self._most_bytes)
        except TooLarge:
            return "too_large"
        try:
            with tracing.phase("cache put", {"baton.cache.bytes": len(value)}):
                await self._store.set(self._names.answer(digest.name), value, ttl_ms)
        except StoreFailed:
            return "store_failed"
        ANSWER_BYTES.inc(answer.ByteSize())
        WRITTEN_BYTES.inc(len(value))
        return "stored"
