"""The life of a similar question.

1. It is embedded, in a thread, within a bound of time.
2. Its partition is searched: questions of the same tenant, model, sampling and context. Only the wording differs.
3. Of those that are near enough, the nearest one that the guard has nothing against is taken.
4. Its answer is read by its own digests, and verified like any other. One that is gone is taken out of the index.

Whatever fails on the way, the answer is None: a miss.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Final, TypeVar

from baton.internal.v1 import response_cache_pb2
from baton.telemetry import tracing
from baton.telemetry.ledger import Timeline
from baton_cache.answers import Answers, Missing
from baton_cache.key import Keys
from baton_cache.semantic import metrics
from baton_cache.semantic.encoder import Encoder, NotEmbedded, Vector
from baton_cache.semantic.guard import judge
from baton_cache.semantic.index import Index, Near, Question
from baton_cache.semantic.reading import read
from baton_cache.settings import SemanticMode
from baton_cache.store import NotAValue, StoreFailed

LONGEST_BYTES: Final = 512
"""A longer question is neither searched for nor stored: a vector says too little about it."""
_CANDIDATES: Final = 8
_REMEMBERED: Final = 256
"""Vectors of questions that are about to be stored, and answers that shadow hits wait to be compared with."""
_LONGEST_COMPARED: Final = 16 * 1024
"""Characters of an answer that a shadow hit is compared by; a longer one is counted, not compared."""
_COMPARED_WORDS: Final = 4096

_reading = lru_cache(1024)(read)
KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class Match:
    """The answer of a similar question."""

    entry: str
    similarity: float
    answer: response_cache_pb2.CachedAnswer


@dataclass(frozen=True, slots=True)
class Policy:
    """Who may have answers of similar questions, and how similar."""

    tenants: frozenset[str]
    """`*`: all."""
    threshold: float
    mode: SemanticMode

    def allows(self, tenant: str) -> bool:
        """Whether a tenant may."""
        return "*" in self.tenants or tenant in self.tenants


class SemanticCache:
    """Answers of similar questions.

    Args:
        policy: who and how.
        encoder: of questions.
        index: where they are.
        keys: digests of keys.
        answers: what is stored.
    """

    def __init__(self, policy: Policy, encoder: Encoder, index: Index, keys: Keys, answers: Answers) -> None:
        self._policy = policy
        self._encoder = encoder
        self._index = index
        self._keys = keys
        self._answers = answers
        self._vectors: OrderedDict[bytes, Vector] = OrderedDict()
        self._shadows: OrderedDict[str, str] = OrderedDict()

    async def find(
        self,
        question: response_cache_pb2.SemanticQuestion,
        key: response_cache_pb2.CacheKey,
        timeline: Timeline,
    ) -> Match | None:
        """The answer of a question that asks the same as this one; None: there is none, or it may not be served."""
        if not self._policy.allows(key.tenant):
            return None
        outcome, match = "store_failed", None
        try:
            with tracing.phase("cache similar"):
                outcome, match = await self._search(question, key, timeline)
        except NotEmbedded:
            outcome = "not_embedded"
        except (StoreFailed, NotAValue):
            outcome = "store_failed"
        if match is not None and self._policy.mode is SemanticMode.SHADOW:
            if len(text := _text(match.answer)) <= _LONGEST_COMPARED:
                _remember(self._shadows, self._keys.digests(key).name, text)
            outcome, match = "shadow_hit", None
        metrics.LOOKUPS.labels(outcome).inc()
        return match

    async def add(
        self,
        question: response_cache_pb2.SemanticQuestion,
        key: response_cache_pb2.CacheKey,
        answer: response_cache_pb2.CachedAnswer,
        ttl_ms: int,
    ) -> None:
        """Let a question whose answer has just been stored be found by similar ones."""
        if not self._policy.allows(key.tenant) or not _fits(question):
            return
        digest = self._keys.digests(key)
        if (shadow := self._shadows.pop(digest.name, None)) is not None:
            _compare(shadow, _text(answer))
        with suppress(NotEmbedded, StoreFailed, NotAValue):  # then it is found by the same question only
            vector = await self._vector(question.text)
            await self._index.add(self._partition(question, key), Question(question.text, digest), vector, ttl_ms)

    async def _search(
        self,
        question: response_cache_pb2.SemanticQuestion,
        key: response_cache_pb2.CacheKey,
        timeline: Timeline,
    ) -> tuple[str, Match | None]:
        """What came of it in a word, and the match if there is one."""
        if not _fits(question):
            return "too_long", None
        partition, own = self._partition(question, key), self._keys.digests(key)
        near = await self._index.nearest(partition, await self._vector(question.text), _CANDIDATES)
        if near:
            metrics.SIMILARITY.observe(near[0].similarity)
        outcome = "nothing_near"
        asked = _reading(question.text)
        for candidate in near:
            if candidate.similarity < self._policy.threshold:
                break
            if candidate.question.answer.name == own.name:
                continue  # its answer was just not there
            if (rule := judge(asked, _reading(candidate.question.text))) is not None:
                metrics.REFUSALS.labels(rule.value).inc()
                outcome = "refused"
                continue
            if (match := await self._read(partition, candidate, timeline)) is not None:
                return "hit", match
            outcome = "gone"
        return outcome, None

    async def _read(self, partition: str, candidate: Near, timeline: Timeline) -> Match | None:
        """The candidate's answer; one that is gone takes its question with it."""
        digest = candidate.question.answer
        found = await self._answers.find(digest, timeline)
        if not isinstance(found, Missing):
            return Match(digest.name, min(1.0, candidate.similarity), found)
        if found.reason != response_cache_pb2.MISS_REASON_STORE_FAILED:
            await self._index.remove(partition, digest.name)
        return None

    async def _vector(self, text: str) -> Vector:
        """Of a question: it is wanted twice, to search and, when an answer was generated, to store."""
        name = blake2b(text.encode(), digest_size=16).digest()
        vector = self._vectors.get(name)
        if vector is None:
            vector = await self._encoder.embed(text)
            _remember(self._vectors, name, vector)
        return vector

    def _partition(self, question: response_cache_pb2.SemanticQuestion, key: response_cache_pb2.CacheKey) -> str:
        """Names what must be equal: all of the key but the prompt's tokens, the context, and the encoder."""
        rest = response_cache_pb2.CacheKey()
        rest.CopyFrom(key)
        del rest.token_ids[:]
        rest.text_digest = f"similar/{self._encoder.digest}/{question.context.hex()}/{rest.text_digest}"
        return self._keys.digests(rest).name


def _fits(question: response_cache_pb2.SemanticQuestion) -> bool:
    return 0 < len(question.text.encode()) <= LONGEST_BYTES


def _text(answer: response_cache_pb2.CachedAnswer) -> str:
    return "".join(chunk.text for chunk in answer.chunks)


def _compare(would_be: str, generated: str) -> None:
    """Count how an answer that would have been served compares with the one that was generated."""
    metrics.SHADOW_EQUAL.labels("equal" if would_be == generated else "different").inc()
    metrics.SHADOW_AGREEMENT.observe(agreement(would_be, generated))


def agreement(one: str, other: str) -> float:
    """Share of the words two texts have in common, 0 to 1: twice the common ones, by all there are."""
    if one == other:
        return 1.0
    left, right = (Counter(text.split()[:_COMPARED_WORDS]) for text in (one, other))
    total = left.total() + right.total()
    return 2 * (left & right).total() / total if total else 1.0


def _remember(held: OrderedDict[KeyT, ValueT], name: KeyT, value: ValueT) -> None:
    held[name] = value
    while len(held) > _REMEMBERED:
        held.popitem(last=False)
