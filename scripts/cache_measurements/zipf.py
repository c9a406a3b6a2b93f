"""What the cache saves on a trace in which some questions are asked again and again."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

from rich.progress import Progress

from cache_measurements.asking import BYPASS, COALESCED, HIT, USE, Answer, ask, at_once, prompts
from cache_measurements.findings import Findings, interval, ms, spread
from cache_measurements.machine import Watch, watched
from cache_measurements.mesh import PATIENT, Bench, metrics, running

_PROMPT_TOKENS: Final = (64, 256)
_ENGINES: Final = ("prefill-0", "decode-0")


@dataclass(frozen=True, slots=True)
class Trace:
    """A sequence of questions; the k-th most popular is drawn with a weight of 1 / k ** exponent."""

    requests: int
    questions: int
    exponent: float
    seed: int

    def __post_init__(self) -> None:
        assert self.requests >= 1
        assert self.questions >= 1
        assert self.exponent >= 0

    def draw(self) -> list[int]:
        """Numbers of questions, 0 the most popular. The same trace draws the same."""
        weights = list(accumulate(1 / rank**self.exponent for rank in range(1, self.questions + 1)))
        return random.Random(self.seed).choices(range(self.questions), cum_weights=weights, k=self.requests)


def best_reuse(drawn: list[int]) -> float:
    """The largest share of a trace that need not be generated: all but the first of each question."""
    return 1 - len(set(drawn)) / len(drawn)


@dataclass(slots=True)
class Way:
    """The trace asked in one way; a value per round where it says so."""

    answers: list[Answer] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    engine_seconds: list[float] = field(default_factory=list)
    """Duration of all engine steps of a round."""
    tokens_per_second: list[float] = field(default_factory=list)

    def share(self, status: int) -> float:
        """Of the requests for which the cache did this."""
        return sum(answer.status == status for answer in self.answers) / len(self.answers)


async def measure(
    progress: Progress, trace: Trace, rounds: int, in_flight: int, tokens: int, patient: bool
) -> Findings:
    """Ask a trace with the cache, empty at first, and bypassing it, in turn, on one mesh.

    Args:
        progress: told how far it is.
        trace: what is asked.
        rounds: turns of each.
        in_flight: requests at all times.
        tokens: of each answer.
        patient: let routers wait for the cache, and the cache for Redis, as long as a busy machine may take.
    """
    drawn = trace.draw()
    asked = prompts(trace.questions, _PROMPT_TOKENS, random.Random(trace.seed))
    ways = {BYPASS: Way(), USE: Way()}
    async with running(extra=PATIENT if patient else {}) as bench, watched() as watch:
        task = progress.add_task("asking the trace", total=2 * rounds * len(drawn))
        for turn in range(rounds):
            for mode in (BYPASS, USE) if turn % 2 == 0 else (USE, BYPASS):
                await bench.redis.flushall()
                before, began, left = await _engine_seconds(bench), time.monotonic(), iter(drawn)
                answers: list[Answer] = []

                async def worker(mode: int = mode, left=left, answers=answers) -> None:  # type: ignore[no-untyped-def]
                    for question in left:
                        answers.append(await ask(bench.stub, asked[question], tokens, mode))  # type: ignore[arg-type]
                        progress.update(task, advance=1)

                await at_once(worker() for _ in range(in_flight))
                seconds, way = time.monotonic() - began, ways[mode]
                assert all(answer.ok for answer in answers), Counter(answer.code for answer in answers)
                way.answers += answers
                way.seconds.append(seconds)
                way.engine_seconds.append(await _engine_seconds(bench) - before)
                way.tokens_per_second.append(sum(len(answer.token_ids) for answer in answers) / seconds)
    found = _found(trace, drawn, ways[BYPASS], ways[USE], in_flight, tokens, watch)
    found.title += f" {'Patient' if patient else 'Default'} time-outs."
    return found


def _found(
    trace: Trace, drawn: list[int], bypass: Way, use: Way, in_flight: int, tokens: int, watch: Watch
) -> Findings:
    found = Findings(
        f"Zipf: {len(bypass.seconds)} rounds of {trace.requests} requests over {trace.questions} prompts of"
        f" {_PROMPT_TOKENS[0]} to {_PROMPT_TOKENS[1]} tokens, exponent {trace.exponent:g}, seed {trace.seed},"
        f" {in_flight} in flight, {tokens} tokens an answer."
    )
    hit, coalesced, best = use.share(HIT), use.share(COALESCED), best_reuse(drawn)
    grid = found.grid("Reuse, share of requests", "hits", "coalesced", "together", "best possible", "of the best")
    together = hit + coalesced
    grid.rows.append(
        (f"{hit:.1%}", f"{coalesced:.1%}", f"{together:.1%}", f"{best:.1%}", f"{together / best if best else 1:.1%}")
    )
    columns = ("way", "device-seconds", "of the ledgers", "tokens/s", "TTFT p50, ms", "p90", "p99")
    grid = found.grid("Cost of one round, and what its clients saw", *columns)
    for name, way in (("bypassing the cache", bypass), ("with the cache", use)):
        ttft = [answer.ttft_ms for answer in way.answers]
        of_ledgers = sum(answer.compute_seconds() for answer in way.answers) / len(way.seconds)
        row = (spread(way.engine_seconds), f"{of_ledgers:.1f}", spread(way.tokens_per_second, 0))
        grid.rows.append((name, *row, *(ms(interval(ttft, percent)) for percent in (50, 90, 99))))
    spent, saved = sum(use.engine_seconds), sum(bypass.engine_seconds) - sum(use.engine_seconds)
    found.notes += [
        f"Saved: {saved / len(use.seconds):.1f} device-seconds a round, {saved / (saved + spent):.1%}.",
        "Best possible: 1 - distinct / total, all but the first of each question.",
        watch.note(),
    ]
    found.expect("reuse less than the best possible, share of requests", best - together, 0.02)
    return found


async def _engine_seconds(bench: Bench) -> float:
    figures = [await metrics(bench.processes[name]) for name in _ENGINES]
    return sum(one["baton_engine_step_seconds_sum"] for one in figures)
