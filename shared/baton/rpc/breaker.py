"""When to leave a service alone that does not answer. Pure, but for a clock that is given."""

from __future__ import annotations

import time
from collections.abc import Callable


class Breaker:
    """Opens after some failures in a row; while open it lets one trial through per pause.

    Args:
        failures: in a row until it opens.
        pause_seconds: between two trials.
        now: clock, seconds.
    """

    def __init__(self, failures: int, pause_seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        assert failures >= 1
        self._limit = failures
        self._pause = pause_seconds
        self._now = now
        self._failures = 0
        self._next_trial = 0.0

    @property
    def open(self) -> bool:
        """Whether calls are held back."""
        return self._failures >= self._limit

    def allows(self) -> bool:
        """Whether to call. While open, a True is a trial, and the next one is a pause away."""
        if not self.open:
            return True
        if self._now() < self._next_trial:
            return False
        self._next_trial = self._now() + self._pause
        return True

    def worked(self) -> bool:
        """A call was answered. Returns whether this closed it."""
        was_open = self.open
        self._failures = 0
        return was_open

    def failed(self) -> bool:
        """A call was not answered. Returns whether this opened it."""
        self._failures += 1
        if self.open:
            self._next_trial = self._now() + self._pause
        return self._failures == self._limit
