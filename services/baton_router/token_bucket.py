"""A rate limit: so many a minute, some seconds' worth of them at once. Pure: time is an argument."""

from __future__ import annotations

from typing import Final

BURST_SECONDS: Final = 10.0
"""A bucket holds what its rate gives in this time, so that a client need not space its requests evenly."""


class TokenBucket:
    """A bucket that fills at a steady rate.

    It may be drawn below zero by what was not known before (how long an answer gets): then it is empty for longer. So
    over any time the rate holds, and nothing larger than the bucket is locked out for ever.

    Args:
        per_minute: above 0.
        now: seconds. The bucket starts full.
    """

    __slots__ = ("_capacity", "_level", "_rate", "_since")

    def __init__(self, per_minute: float, now: float) -> None:
        assert per_minute > 0
        self._rate = per_minute / 60
        self._capacity = max(1.0, self._rate * BURST_SECONDS)
        self._level = self._capacity
        self._since = now

    def full(self, now: float) -> bool:
        """Whether it has forgotten everything."""
        self._fill(now)
        return self._level >= self._capacity

    def wait(self, amount: float, now: float) -> float:
        """Seconds until so much may be drawn; 0: now. More than fits may be drawn from a full bucket."""
        self._fill(now)
        return max(0.0, (min(amount, self._capacity) - self._level) / self._rate)

    def draw(self, amount: float, now: float) -> None:
        """Take so much, whether it is there or not; below 0: give back."""
        self._fill(now)
        self._level = min(self._capacity, self._level - amount)

    def change(self, per_minute: float, now: float) -> None:
        """Another rate from now on; what was drawn stays drawn."""
        self._fill(now)
        missing = self._capacity - self._level
        self._rate = per_minute / 60
        self._capacity = max(1.0, self._rate * BURST_SECONDS)
        self._level = self._capacity - missing

    def _fill(self, now: float) -> None:
        self._level = min(self._capacity, self._level + max(0.0, now - self._since) * self._rate)
        self._since = max(self._since, now)
