"""First tokens of prompts that arrive among running streams, by where they are computed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from baton.bench.figures import Figure, Spread
from baton.bench.streams import Prompt, Source, Stream, follow, run_along

MODES: Final = ("auto", "local", "remote")
ALLOWED: Final = 1.1
"""95th percentile of auto over that of the better of the other two."""


@dataclass(frozen=True, slots=True)
class Point:
    """One place of the sweep."""

    prompt_tokens: int
    streams: int
    together: int
    """Prompts that arrive at once."""

    @property
    def name(self) -> str:
        """For a row."""
        burst = f", {self.together} at once" if self.together > 1 else ""
        return f"{self.prompt_tokens} tokens, {self.streams} streams{burst}"


@dataclass(slots=True)
class Seen:
    """What one point gave, by mode: of each round, the milliseconds to all first tokens."""

    ttft_ms: dict[str, list[list[float]]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    remote: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    """Of each round, the share of prompts computed by the prefill service."""


async def first_tokens(
    source: Source, running: Sequence[Prompt], arriving: Sequence[Sequence[Prompt]], *, longest: int, pause: float
) -> list[float]:
    """Milliseconds to the first token of every arriving prompt.

    Args:
        source: what answers.
        running: prompts of the streams that run all the time.
        arriving: prompts that arrive at once, a group after the other.
        longest: tokens of a running stream.
        pause: seconds before each group.
    """
    waited: list[float] = []
    async with run_along(source, running, longest) as alive:
        for group in arriving:
            await asyncio.sleep(pause)
            await alive()
            streams = await asyncio.gather(*(follow(source, prompt, 1, Stream()) for prompt in group))
            waited += [stream.ttft_ms for stream in streams]
    return waited


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank: the least value that so large a share of all is not above. At least one value."""
    ranked = sorted(values)
    return ranked[max(0, -(-int(share * 1000) * len(ranked) // 1000) - 1)]


def _p95(rounds: Sequence[Sequence[float]]) -> Spread:
    own = [percentile(ttft, 0.95) for ttft in rounds]
    return Spread(percentile([ms for ttft in rounds for ms in ttft], 0.95), min(own), max(own), len(own))


def figures(seen: Mapping[Point, Seen]) -> list[Figure]:
    """A row for every point and mode; auto's beside the better of the other two.

    Percentiles are of all rounds' first tokens together: that of a short round is its slowest, and the better of two
    slowest ones is a lucky draw, which nothing could match. Brackets hold the rounds' own.
    """
    rows: list[Figure] = []
    for point, results in seen.items():
        p95 = {mode: _p95(results.ttft_ms[mode]) for mode in MODES}
        better = min(p95["local"], p95["remote"], key=lambda spread: spread.median)
        rows.append(
            Figure(
                f"{point.name}: auto, p95",
                p95["auto"],
                "ms",
                better,
                "the better of both",
                Spread.of([better.median / p95["auto"].median]),
                1 / ALLOWED,
            )
        )
        rows += [Figure(f"{point.name}: {mode}, p95", p95[mode], "ms") for mode in ("local", "remote")]
        rows.append(
            Figure(f"{point.name}: auto, computed remotely", Spread.of(100 * s for s in results.remote["auto"]), "%")
        )
    return rows
