"""What went on in the last seconds: rates, percentiles, and where the time went. Pure but for the clock it is given."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from baton.v1 import inference_pb2

_SAMPLES = 20_000  # most samples of a kind in the window; beyond it the oldest go


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a sample of durations, nanoseconds."""

    p50: int
    p90: int
    p99: int

    @classmethod
    def of(cls, sample: Sequence[int]) -> Percentiles | None:
        """Nearest-rank percentiles; None of an empty sample."""
        if not sample:
            return None
        ranked = sorted(sample)
        p50, p90, p99 = (ranked[min(len(ranked) - 1, int(share * len(ranked)))] for share in (0.5, 0.9, 0.99))
        return cls(p50, p90, p99)


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that is over."""

    outcome: str
    cache_hit: bool
    first_token_ns: int
    """0: none was generated."""
    ledger: dict[tuple[int, int], int]
    """(hop, kind) -> nanoseconds."""


@dataclass(slots=True)
class Window:
    """One look at the last seconds."""

    seconds: float
    outcomes: Counter[str] = field(default_factory=Counter)
    cache_hits: int = 0
    tokens_per_second: float = 0.0
    time_to_first_token: Percentiles | None = None
    inter_token: Percentiles | None = None
    ledger: Counter[tuple[int, int]] = field(default_factory=Counter)


class Pulse:
    """Keeps the samples of the last seconds.

    Args:
        seconds: length of the window.
        now: nanosecond clock, monotonic.
    """

    def __init__(self, seconds: float = 10.0, now: Callable[[], int] = time.monotonic_ns) -> None:
        self.seconds = seconds
        self._now = now
        self._tokens: deque[tuple[int, int]] = deque(maxlen=_SAMPLES)
        self._gaps: deque[tuple[int, int]] = deque(maxlen=_SAMPLES)
        self._ended: deque[tuple[int, Ended]] = deque(maxlen=_SAMPLES)

    def chunk(self, tokens: int, gap_ns: int | None) -> None:
        """A worker sent tokens of an answer, so long after the ones before; None: they are the first."""
        now = self._now()
        self._tokens.append((now, tokens))
        if gap_ns is not None:
            self._gaps.append((now, gap_ns))

    def ended(self, outcome: str, summary: inference_pb2.Summary) -> None:
        """A request is over."""
        ledger = summary.ledger
        cache_hit = summary.cache_status == inference_pb2.CACHE_STATUS_HIT
        generated = ledger.HasField("first_token") and not cache_hit
        self._ended.append(
            (
                self._now(),
                Ended(
                    outcome=outcome,
                    cache_hit=cache_hit,
                    first_token_ns=ledger.first_token.total.ToNanoseconds() if generated else 0,
                    ledger={(e.hop, e.kind): e.duration.ToNanoseconds() for e in ledger.total.entries},
                ),
            )
        )

    def window(self) -> Window:
        """The last seconds, up to now."""
        since = self._now() - int(self.seconds * 1e9)
        for samples in (self._tokens, self._gaps, self._ended):
            while samples and samples[0][0] < since:
                samples.popleft()
        window = Window(self.seconds)
        window.tokens_per_second = sum(tokens for _, tokens in self._tokens) / self.seconds
        window.inter_token = Percentiles.of([gap for _, gap in self._gaps])
        first_tokens = []
        for _, ended in self._ended:
            window.outcomes[ended.outcome] += 1
            window.cache_hits += ended.cache_hit
            window.ledger.update(ended.ledger)
            if ended.outcome == "ok" and ended.first_token_ns:
                first_tokens.append(ended.first_token_ns)
        window.time_to_first_token = Percentiles.of(first_tokens)
        return window
