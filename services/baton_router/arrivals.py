"""When the tokens of one answer came from its workers. Pure."""

from __future__ import annotations


class Arrivals:
    """Tokens that workers sent for one answer, in the order they came.

    A replayed answer has none, and tokens that the client had already are not among them. What a slow client adds to
    the time between tokens is not seen here either: it shows as STALL in the ledger.

    Attributes:
        tokens: how many came.
    """

    __slots__ = ("_first_ns", "_first_tokens", "_last_ns", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self._first_tokens = 0
        self._first_ns = 0
        self._last_ns = 0

    def take(self, tokens: int, now_ns: int) -> int | None:
        """A message with tokens is here.

        Returns:
            Nanoseconds since the one before; None of the first.
        """
        gap = now_ns - self._last_ns if self.tokens else None
        if not self.tokens:
            self._first_tokens = tokens
            self._first_ns = now_ns
        self.tokens += tokens
        self._last_ns = now_ns
        return gap

    def seconds_per_token(self) -> float | None:
        """Mean time per token after the first message; None while there is only that."""
        later = self.tokens - self._first_tokens
        return (self._last_ns - self._first_ns) / 1e9 / later if later else None
