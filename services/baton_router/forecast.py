"""When a request would get its first token, and what was learned from those that did or did not. Pure.

Two parts: waiting here, by the pace at which the queue moved lately; and then the workers, by their measured step
costs and what waits there. What the second part leaves out (transport, contention, prompts that are cached) shows as
a ratio of actual to predicted time, which is learned from each first token, and from each request that ended without
one: that one would have taken at least as long. Nothing confirms a ratio that makes us refuse, so it goes back to 1
by itself.
"""

from __future__ import annotations

import math
from typing import Final

_WEIGHT: Final = 0.2
"""Of the newest observation."""
_LOWEST: Final = 0.1
_HIGHEST: Final = 20.0
_FORGET_SECONDS: Final = 30.0
"""In this time what was learned loses all but 1/e of its hold, if nothing confirms it."""
_PACE_SECONDS: Final = 5.0
"""The pace of the queue is that of about so many seconds in which somebody waited."""


class Ratio:
    """Actual over predicted time, as of late.

    Args:
        now: seconds.
    """

    def __init__(self, now: float) -> None:
        self._log = 0.0
        self._since = now

    def value(self, now: float) -> float:
        """What to multiply a prediction by."""
        return math.exp(self._log * math.exp(-max(0.0, now - self._since) / _FORGET_SECONDS))

    def came(self, predicted: float, actual: float, now: float) -> None:
        """A first token came after so long."""
        if predicted > 0 and actual >= 0:
            self._learn(actual / predicted, now)

    def gave_up(self, predicted: float, waited: float, now: float) -> None:
        """A request ended after so long without one. Less than what was expected tells nothing."""
        if predicted > 0 and waited > predicted * self.value(now):
            self._learn(waited / predicted, now)

    def _learn(self, ratio: float, now: float) -> None:
        old = math.log(self.value(now))
        self._log = old + _WEIGHT * (math.log(min(_HIGHEST, max(_LOWEST, ratio))) - old)
        self._since = now


class Pace:
    """Tokens per second that leave the queue while somebody waits."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._last: float | None = None

    def tokens_per_second(self) -> float | None:
        """None: not known."""
        return self._tokens / self._seconds if self._seconds > 0.05 and self._tokens else None

    def left(self, tokens: float, now: float) -> None:
        """So many left. Those of a request that never waited tell nothing."""
        if self._last is not None:
            self._pass(now)
            self._tokens += tokens

    def idle(self) -> None:
        """Nobody waits: the time until somebody does tells nothing."""
        self._last = None

    def waiting(self, now: float) -> None:
        """Somebody waits, from now on at the latest."""
        self._pass(now)

    def _pass(self, now: float) -> None:
        if self._last is not None:
            passed = max(0.0, now - self._last)
            keep = math.exp(-passed / _PACE_SECONDS)
            self._tokens *= keep
            self._seconds = self._seconds * keep + passed
        self._last = now


class OutputLength:
    """Tokens that answers get, as a share of what they may get: most end before.

    A tenth of the weight goes to each new one. Before the first, all that may come is expected.
    """

    def __init__(self) -> None:
        self._share = 1.0

    def expected(self, max_tokens: int) -> float:
        """Tokens of an answer that may have so many."""
        return max(1.0, self._share * max_tokens)

    def came(self, tokens: int, max_tokens: int) -> None:
        """A finished answer got so many."""
        self._share += 0.1 * (min(1.0, tokens / max(1, max_tokens)) - self._share)
