"""What went on in the last seconds: rates, percentiles, and where the time went. Pure but for the clock it is given."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from baton.v1 import inference_pb2
from baton_router.outcome import OK
from baton_router.reservoir import Reservoir

_SLICE_NS = 100_000_000
_FROM_STORE = (inference_pb2.CACHE_STATUS_HIT, inference_pb2.CACHE_STATUS_SEMANTIC)
_SAMPLES = 200  # latencies of a kind kept of one slice; more are sampled. What is counted is counted in full.


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a sample of durations, nanoseconds."""

    p50: int
    p90: int
    p99: int

    @classmethod
    def of(cls, sample: Iterable[tuple[int, float]]) -> Percentiles | None:
        """Nearest-rank percentiles of values with weights; None of an empty sample."""
        ranked = sorted(sample)
        if not ranked:
            return None
        whole = sum(weight for _, weight in ranked)
        p50, p90, p99 = (_ranked(ranked, share * whole) for share in (0.5, 0.9, 0.99))
        return cls(p50, p90, p99)


@dataclass(slots=True)
class Window:
    """One look at the last seconds.

    Attributes:
        seconds: how many, exactly: what the counts are to be divided by.
    """

    seconds: float
    outcomes: Counter[str] = field(default_factory=Counter)
    cache_hits: int = 0
    coalesced: int = 0
    tokens_per_second: float = 0.0
    time_to_first_token: Percentiles | None = None
    inter_token: Percentiles | None = None
    ledger: Counter[tuple[int, int]] = field(default_factory=Counter)


class Pulse:
    """Keeps the sums and samples of the last seconds, by slices of a tenth.

    Args:
        seconds: least length of the window; it is up to a slice longer, because whole slices go.
        now: nanosecond clock, monotonic.
    """

    def __init__(self, seconds: float = 10.0, now: Callable[[], int] = time.monotonic_ns) -> None:
        self._now = now
        self._rng = random.Random(0)
        self._length = round(seconds * 1e9) // _SLICE_NS  # whole slices before the running one
        self._slices: deque[_Slice] = deque(maxlen=self._length + 1)

    def chunk(self, tokens: int, gap_ns: int | None) -> None:
        """A worker sent tokens of an answer, so long after the ones before; None: they are the first."""
        running = self._running()
        running.tokens += tokens
        if gap_ns is not None:
            running.gaps.add(gap_ns)

    def ended(self, outcome: str, summary: inference_pb2.Summary) -> None:
        """A request is over."""
        running, ledger = self._running(), summary.ledger
        cache_hit = summary.cache_status in _FROM_STORE
        running.outcomes[outcome] += 1
        running.cache_hits += cache_hit
        running.coalesced += summary.cache_status == inference_pb2.CACHE_STATUS_COALESCED
        for entry in ledger.total.entries:
            running.ledger[entry.hop, entry.kind] += entry.duration.ToNanoseconds()
        if outcome == OK and ledger.HasField("first_token") and not cache_hit:
            running.first_tokens.add(ledger.first_token.total.ToNanoseconds())

    def window(self) -> Window:
        """The last seconds, up to now."""
        now = self._now()
        oldest = now // _SLICE_NS - self._length
        window = Window(seconds=(now - oldest * _SLICE_NS) / 1e9)
        tokens = 0
        gaps: list[tuple[int, float]] = []
        first_tokens: list[tuple[int, float]] = []
        for part in self._slices:
            if part.index >= oldest:
                tokens += part.tokens
                window.outcomes.update(part.outcomes)
                window.cache_hits += part.cache_hits
                window.coalesced += part.coalesced
                window.ledger.update(part.ledger)
                gaps += part.gaps.weighted()
                first_tokens += part.first_tokens.weighted()
        window.tokens_per_second = tokens / window.seconds
        window.inter_token = Percentiles.of(gaps)
        window.time_to_first_token = Percentiles.of(first_tokens)
        return window

    def _running(self) -> _Slice:
        """The slice of this instant."""
        index = self._now() // _SLICE_NS
        if not self._slices or self._slices[-1].index != index:
            self._slices.append(_Slice(index, Reservoir(_SAMPLES, self._rng), Reservoir(_SAMPLES, self._rng)))
        return self._slices[-1]


@dataclass(slots=True)
class _Slice:
    """What went on in one tenth of a second, by its number since the clock's zero."""

    index: int
    gaps: Reservoir
    first_tokens: Reservoir
    tokens: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    cache_hits: int = 0
    coalesced: int = 0
    ledger: Counter[tuple[int, int]] = field(default_factory=Counter)


def _ranked(ranked: list[tuple[int, float]], rank: float) -> int:
    """The value that covers a rank, of weighted values in order."""
    below = 0.0
    for value, weight in ranked:
        below += weight
        if below > rank:
            return value
    return ranked[-1][0]
