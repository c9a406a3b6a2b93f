"""From records to numbers. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from baton.bench.load import Load, Run
from baton.bench.record import Record

LAG_LIMIT_NS: Final = 5_000_000
"""A result whose lag p99 is above this says more about the generator than about the server."""
PERCENTILES: Final = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Distribution:
    """A sample of durations, nanoseconds."""

    count: int
    mean: float
    lowest: float
    highest: float
    percentiles: dict[int, float]

    @staticmethod
    def of(values: Iterable[float]) -> Distribution | None:
        """Of these values; None when there are none."""
        ranked = sorted(values)
        if not ranked:
            return None
        return Distribution(
            count=len(ranked),
            mean=sum(ranked) / len(ranked),
            lowest=ranked[0],
            highest=ranked[-1],
            percentiles={percent: percentile(ranked, percent) for percent in PERCENTILES},
        )

    def to_json(self) -> dict[str, float]:
        """Milliseconds by name."""
        values = {f"p{percent}": value / 1e6 for percent, value in self.percentiles.items()}
        return {
            "count": self.count,
            "mean": self.mean / 1e6,
            "min": self.lowest / 1e6,
            "max": self.highest / 1e6,
            **values,
        }


@dataclass(frozen=True, slots=True)
class Objectives:
    """Limits a request must meet to count as good, milliseconds; None: no such limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    @property
    def any(self) -> bool:
        """Whether there is one at all."""
        return any(limit is not None for limit in (self.ttft_ms, self.tpot_ms, self.e2e_ms))

    def met(self, record: Record) -> bool:
        """Whether the request ended well and within every limit."""
        if not record.ok or (self.ttft_ms is not None and record.ttft_ns() is None):
            return False
        measured = ((record.ttft_ns(), self.ttft_ms), (record.tpot_ns(), self.tpot_ms), (record.e2e_ns(), self.e2e_ms))
        # An answer of one token has no TPOT to miss.
        return all(limit is None or value is None or value <= limit * 1e6 for value, limit in measured)


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a run. Latencies are of the requests that ended well."""

    load: Load
    seconds: float
    """From the start to the last request's end."""
    requests: int
    completed: int
    errors: dict[str, int]
    """Requests that did not end well, by status code."""
    ttft: Distribution | None
    itl: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None
    lag: Distribution | None
    """The generator's own; see Run.lag_ns."""
    output_tokens: int
    prompt_tokens: int
    cached_prompt_tokens: int
    response_cache_hits: int
    good: int | None
    """Requests that met every objective; None when there is none."""

    @property
    def requests_per_second(self) -> float:
        """Completed requests."""
        return self.completed / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens."""
        return self.output_tokens / self.seconds

    @property
    def goodput(self) -> float | None:
        """Requests per second that met every objective."""
        return None if self.good is None else self.good / self.seconds

    @property
    def cached_share(self) -> float:
        """Share of prompt tokens whose KV came from a prefix cache."""
        return self.cached_prompt_tokens / max(1, self.prompt_tokens)

    @property
    def lag_acceptable(self) -> bool:
        """Whether the generator kept up, so that the numbers are the server's."""
        return self.lag is None or self.lag.percentiles[99] <= LAG_LIMIT_NS

    def to_json(self) -> dict[str, Any]:
        """Plain values; all latencies in milliseconds."""
        latencies = {"ttft": self.ttft, "itl": self.itl, "tpot": self.tpot, "e2e": self.e2e, "lag": self.lag}
        return {
            "load": {
                "rate": self.load.rate,
                "concurrency": self.load.concurrency,
                "requests": self.load.requests,
                "duration": self.load.duration,
                "warmup": self.load.warmup,
            },
            "seconds": self.seconds,
            "requests": self.requests,
            "completed": self.completed,
            "errors": self.errors,
            "latency_ms": {name: value.to_json() if value else None for name, value in latencies.items()},
            "requests_per_second": self.requests_per_second,
            "output_tokens": self.output_tokens,
            "output_tokens_per_second": self.tokens_per_second,
            "prompt_tokens": self.prompt_tokens,
            "cached_prompt_share": self.cached_share,
            "response_cache_hits": self.response_cache_hits,
            "goodput_per_second": self.goodput,
            "lag_acceptable": self.lag_acceptable,
        }


def percentile(ranked: Sequence[float], percent: float) -> float:
    """Percentile of ascending values, linear between neighbours (as numpy's default)."""
    position = (len(ranked) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (ranked[above] - ranked[below]) * (position - below)


def report(run: Run, load: Load, objectives: Objectives) -> Report:
    """The numbers of a run."""
    good = [record for record in run.records if record.ok]
    ended = max((record.done_ns for record in run.records), default=run.began_ns)
    return Report(
        load=load,
        seconds=max(1e-9, (ended - run.began_ns) / 1e9),
        requests=len(run.records),
        completed=len(good),
        errors=dict(Counter(record.code for record in run.records if not record.ok).most_common()),
        ttft=Distribution.of(ttft for record in good if (ttft := record.ttft_ns()) is not None),
        itl=Distribution.of(gap for record in good for gap in record.gaps_ns()),
        tpot=Distribution.of(tpot for record in good if (tpot := record.tpot_ns()) is not None),
        e2e=Distribution.of(record.e2e_ns() for record in good),
        lag=Distribution.of(run.lag_ns(load)),
        output_tokens=sum(record.output_tokens for record in good),
        prompt_tokens=sum(record.prompt_tokens for record in good),
        cached_prompt_tokens=sum(record.cached_prompt_tokens for record in good),
        response_cache_hits=sum(record.response_cache for record in good),
        good=sum(objectives.met(record) for record in run.records) if objectives.any else None,
    )
