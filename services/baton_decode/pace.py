"""When the tokens of one answer came: a long decode is one span with these figures, not a span per token."""

from __future__ import annotations

from array import array

from baton.telemetry.tracing import Attribute


class Pace:
    """Arrival times of tokens."""

    __slots__ = ("_gaps", "_last_ns", "tokens")

    def __init__(self) -> None:
        self._gaps = array("q")
        self._last_ns = 0
        self.tokens = 0

    def took(self, tokens: int, now_ns: int) -> None:
        """Tokens came."""
        if self._last_ns:
            self._gaps.append(now_ns - self._last_ns)
        self._last_ns = now_ns
        self.tokens += tokens

    def attributes(self) -> dict[str, Attribute]:
        """For the span: tokens, and the gaps between them in milliseconds."""
        figures: dict[str, Attribute] = {"baton.tokens": self.tokens}
        if self._gaps:
            gaps = sorted(self._gaps)
            for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
                figures[f"baton.itl_ms.{name}"] = gaps[min(len(gaps) - 1, int(share * len(gaps)))] / 1e6
        return figures
