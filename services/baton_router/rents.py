"""What requests have waited for prefixes that only busy workers have. Pure."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

_PREFIXES: Final = 4096  # remembered, those that waited last
_HALF_SECONDS: Final = 30.0
"""A wait counts half after so long: a prefix that was asked for often may not be any more."""


class Rents:
    """Seconds by prefix, which fade."""

    def __init__(self) -> None:
        self._paid: OrderedDict[int, tuple[float, float]] = OrderedDict()  # prefix -> seconds, as of when

    def paid(self, prefix: int, now: float) -> float:
        """For a prefix, as far as it still counts."""
        seconds, when = self._paid.get(prefix, (0.0, now))
        return seconds * math.pow(0.5, (now - when) / _HALF_SECONDS)

    def pay(self, prefix: int, seconds: float, now: float) -> None:
        """A request waits for it."""
        self._paid[prefix] = self.paid(prefix, now) + seconds, now
        self._paid.move_to_end(prefix)
        if len(self._paid) > _PREFIXES:
            self._paid.popitem(last=False)

    def settle(self, prefix: int) -> None:
        """It gets a copy."""
        self._paid.pop(prefix, None)
