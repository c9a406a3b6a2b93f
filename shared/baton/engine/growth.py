"""How much memory requests will need before they end, and so whether one more can be let in. Pure.

A request that is let in as soon as its prompt fits grows into memory that others need as well, loses it, and is
computed again: with a pool of three quarters of what the load holds, two fifths of all prompt work was such. So a
request is let in only if all can grow to their expected ends, each giving its memory back when it gets there (after
the Past-Future scheduler, Gong et al. 2025). Expected is what answers that got at least so far had in the end.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_REMEMBERED: Final = 512
"""Answers, the latest ones."""
_ENOUGH: Final = 8
"""So many of them must have got so far; with fewer, all that a request may have is expected."""


@dataclass(frozen=True, slots=True)
class Growth:
    """A request that holds memory, or would."""

    blocks: int
    """That it holds now."""
    tokens: int
    """That it is expected to grow by."""


def peak_blocks(growing: Iterable[Growth], block_tokens: int) -> int:
    """The most blocks that are needed at once, if each request grows by a token a step and then gives all back."""
    longest_first = sorted(growing, key=lambda growth: -growth.tokens)
    held = peak = 0
    for count, growth in enumerate(longest_first, 1):
        # Just before this one ends, it and those that take longer are there, each so much larger.
        held += growth.blocks
        peak = max(peak, held + count * -(-growth.tokens // block_tokens))
    return peak


class AnswerLengths:
    """What the latest answers had in the end, tokens."""

    def __init__(self) -> None:
        self._latest: deque[int] = deque()
        self._ranked: list[int] = []

    def ended(self, tokens: int) -> None:
        """An answer is complete."""
        if len(self._latest) >= _REMEMBERED:
            del self._ranked[bisect_right(self._ranked, self._latest.popleft()) - 1]
        self._latest.append(tokens)
        insort(self._ranked, tokens)

    def expected(self, so_far: int, at_most: int) -> int:
        """Tokens that an answer will have which has so many, and may have so many: the median of those that got
        further. What one has more than that, another has less.
        """
        longer = bisect_right(self._ranked, so_far)
        count = len(self._ranked) - longer
        if count < _ENOUGH:
            return at_most
        return min(at_most, self._ranked[longer + count // 2])
