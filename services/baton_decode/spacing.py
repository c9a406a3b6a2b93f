"""How far apart the messages of a stream are sent. Policy.

A message costs processor time in decode, router and client, and little of it depends on how many tokens are in it.
Where few streams run, or cores are plenty, every token leaves in a message of its own as soon as it is there. Where
messages of all streams would take too much of the machine, tokens of one stream share them. All streams then send in
the same instants: one waking of decode, router and client serves them all, and the engine computes undisturbed between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

LONGEST: Final = 0.05
"""Seconds a token may wait for others: 20 messages a second still read fluently."""
_SHORTEST: Final = 0.01
"""Less than so many seconds between two messages of a stream are not worth waiting for."""
_RATE_OF_CORE: Final = 80
"""Messages a second for each core. Decode, router and client together take up to 0.4 ms of a message, so this is 3 % of
the machine when all of them share it; and threads of an engine wait for the one whose core was taken."""
_HIGHEST_RATE: Final = 2000
"""Messages a second of one event loop, at which it is not yet late for other things."""


def affordable_rate(cores: int) -> int:
    """Messages a second that a machine of so many cores sends without feeling it."""
    return min(_RATE_OF_CORE * cores, _HIGHEST_RATE)


def apart(streams: int, rate: float) -> float:
    """Seconds between two messages of each stream that keep all together at `rate` messages a second; 0: no wait."""
    seconds = streams / rate
    return 0.0 if seconds < _SHORTEST else min(seconds, LONGEST)


def until_tick(seconds: float, now: float) -> float:
    """Seconds from `now` to the next tick of a clock that ticks every so many seconds, the same one for all streams."""
    return seconds - now % seconds if seconds else 0.0


class Spacing:
    """The streams of one front.

    Args:
        rate: messages a second of all of them together.
        clock: seconds, monotonic.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._streams = 0

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """One stream more, for the length of the block."""
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    def seconds(self) -> float:
        """So long after a message the next one of the same stream should leave, at most LONGEST; 0: at once."""
        return until_tick(apart(self._streams, self._rate), self._clock())
