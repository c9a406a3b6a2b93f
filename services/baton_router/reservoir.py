"""A bounded sample of values that stands for all of them."""

from __future__ import annotations

import random


class Reservoir:
    """Keeps each value with the same chance, so many at most (Vitter 1985, algorithm R): all of them while they fit.

    Args:
        limit: values kept.
        rng: decides which.
    """

    __slots__ = ("_kept", "_limit", "_rng", "_seen")

    def __init__(self, limit: int, rng: random.Random) -> None:
        self._limit = limit
        self._rng = rng
        self._kept: list[int] = []
        self._seen = 0

    def add(self, value: int) -> None:
        """One more value."""
        self._seen += 1
        if len(self._kept) < self._limit:
            self._kept.append(value)
        else:
            place = self._rng.randrange(self._seen)
            if place < self._limit:
                self._kept[place] = value

    def weighted(self) -> list[tuple[int, float]]:
        """The values kept, each with how many it stands for."""
        weight = self._seen / len(self._kept) if self._kept else 0.0
        return [(value, weight) for value in self._kept]
