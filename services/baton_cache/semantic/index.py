"""Where questions are found by their vectors: the interface, and an exact index in this process."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from baton_cache.key import KeyDigests
from baton_cache.semantic.metrics import EVICTIONS, INDEXED

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Question:
    """A question that has an answer."""

    text: str
    answer: KeyDigests
    """Of the entry that holds the answer."""


@dataclass(frozen=True, slots=True)
class Near:
    """A question found."""

    question: Question
    similarity: float
    """Cosine to what was searched for."""


class Index(Protocol):
    """Questions by vector, apart by partition: everything but the wording is the same within one.

    A failing store raises `StoreFailed`.
    """

    async def add(self, partition: str, question: Question, vector: Vector, ttl_ms: int) -> None:
        """Make a question findable as long as its answer lives. The same entry again replaces it."""

    async def nearest(self, partition: str, vector: Vector, count: int) -> list[Near]:
        """The questions nearest to a vector, nearest first."""

    async def remove(self, partition: str, entry: str) -> None:
        """Forget a question whose answer is gone."""


@dataclass(slots=True)
class _Partition:
    """Vectors, one a row, and what is at each row."""

    rows: Vector
    entries: list[str] = field(default_factory=list)

    def put(self, entry: str, vector: Vector) -> None:
        """A row more."""
        if len(self.entries) == len(self.rows):
            self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])
        self.rows[len(self.entries)] = vector
        self.entries.append(entry)

    def drop(self, entry: str) -> None:
        """A row less; the last one takes its place."""
        at, last = self.entries.index(entry), len(self.entries) - 1
        self.rows[at] = self.rows[last]
        self.entries[at] = self.entries[last]
        self.entries.pop()


class OwnIndex:
    """An exact index in this process: not shared with other replicas, and empty after a restart.

    Args:
        most: questions it holds; beyond, those go that were not found for the longest time.
        now: seconds of a monotonic clock.
    """

    def __init__(self, most: int, now: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._now = now
        self._partitions: dict[str, _Partition] = {}
        self._held: OrderedDict[tuple[str, str], tuple[Question, float]] = OrderedDict()

    async def add(self, partition: str, question: Question, vector: Vector, ttl_ms: int) -> None:
        """As `Index.add`."""
        entry = question.answer.name
        await self.remove(partition, entry)
        rows = self._partitions.setdefault(partition, _Partition(np.zeros((2, len(vector)), np.float32)))
        rows.put(entry, vector)
        self._held[partition, entry] = question, self._now() + ttl_ms / 1000
        while len(self._held) > self._most:
            await self.remove(*next(iter(self._held)))
            EVICTIONS.inc()
        INDEXED.set(len(self._held))

    async def nearest(self, partition: str, vector: Vector, count: int) -> list[Near]:
        """As `Index.nearest`."""
        rows = self._partitions.get(partition)
        if rows is None:
            return []
        similarities = rows.rows[: len(rows.entries)] @ vector
        order = np.argsort(-similarities, kind="stable")
        found: list[Near] = []
        gone = []
        for at in order:
            entry = rows.entries[at]
            question, expires = self._held[partition, entry]
            if expires <= self._now():
                gone.append(entry)
                continue
            if len(found) == count:
                break
            self._held.move_to_end((partition, entry))
            found.append(Near(question, float(similarities[at])))
        for entry in gone:
            await self.remove(partition, entry)
        return found

    async def remove(self, partition: str, entry: str) -> None:
        """As `Index.remove`."""
        if self._held.pop((partition, entry), None) is None:
            return
        rows = self._partitions[partition]
        rows.drop(entry)
        if not rows.entries:
            del self._partitions[partition]
        INDEXED.set(len(self._held))
