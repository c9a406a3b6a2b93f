"""How well a median is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Self

_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median and its 95 % confidence interval: order statistics, so nothing is assumed of how the noise is spread."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of at least one value. Few values have no such interval: theirs is all that was seen."""
        ordered, n = sorted(values), len(values)
        outside, below = 0.0, 0  # how likely fewer than `below + 1` of n values lie below the true median
        while below + 1 <= (n - 1) // 2 and 2 * (outside + math.comb(n, below) / 2**n) <= 1 - _CONFIDENCE:
            outside += math.comb(n, below) / 2**n
            below += 1
        index = max(0, below - 1)
        return cls(median(ordered), ordered[index], ordered[n - 1 - index])

    def surely_within(self, low: float, high: float) -> bool:
        """The whole interval lies in [low, high]."""
        return low <= self.low and self.high <= high
