"""How long a client waits for the first token of a stored answer, and where that time goes."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rich.progress import Progress

from cache_measurements.asking import BYPASS, HIT, USE, Answer, Prompt, Stub, ask, at_once, prompts
from cache_measurements.findings import Findings, Grid, at, interval, ms, spread
from cache_measurements.idle import idle_server
from cache_measurements.machine import Others, watched
from cache_measurements.mesh import Bench, running

IN_FLIGHT: Final = (1, 4, 16)
P50_MS: Final = 3.0
P99_MS: Final = 10.0
_STORED: Final = 64
_PROMPT_TOKENS: Final = (64, 256)


@dataclass(frozen=True, slots=True)
class Turn:
    """So many hits with so many in flight, and the idle server's answers beside them."""

    answers: list[Answer]
    floor: list[Answer]
    seconds: float
    others: float
    """Share of the machine's processor time that others took."""

    @property
    def hits(self) -> list[Answer]:
        """Those of the answers that were."""
        return [answer for answer in self.answers if answer.status == HIT]


async def measure(progress: Progress, rounds: int, requests: int, tokens: int, local: bool) -> Findings:
    """TTFT of hits, beside that of a gRPC server that does nothing, in turn.

    Args:
        progress: told how far it is.
        rounds: turns.
        requests: hits a turn, for each number of requests in flight.
        tokens: of each answer, one chunk each.
        local: whether the cache may hold what it read in memory; else every hit is read from Redis.
    """
    extra = {} if local else {"cache": ("--local-bytes", "0")}
    async with running(extra=extra) as bench, idle_server() as idle:
        stored = prompts(_STORED, _PROMPT_TOKENS, random.Random(1))
        misses = [await bench.store(prompt, tokens) for prompt in progress.track(stored, description="storing answers")]
        value_bytes = await _value_bytes(bench)
        turns: dict[int, list[Turn]] = {in_flight: [] for in_flight in IN_FLIGHT}
        gets: list[float] = []
        async with watched() as watch:
            for _ in progress.track(range(rounds), description="asking again"):
                for in_flight in IN_FLIGHT:
                    others = Others()
                    floor = await _closed_loop(idle, stored, requests, in_flight, tokens, BYPASS)
                    began = time.monotonic()
                    answers = await _closed_loop(bench.stub, stored, requests, in_flight, tokens, USE)
                    assert all(answer.ok for answer in answers)
                    turns[in_flight].append(Turn(answers, floor, time.monotonic() - began, others.share()))
                gets += await _bare_gets(bench, requests)
    found = Findings(
        f"Hits, {'from memory' if local else 'from Redis'}: {rounds} turns of {requests} for each number"
        f" in flight; {_STORED} answers of {tokens} tokens to prompts of {_PROMPT_TOKENS[0]} to {_PROMPT_TOKENS[1]},"
        f" values of {value_bytes:,.0f} bytes. 95 % intervals."
    )
    grid = found.grid(
        "TTFT at the client, ms",
        *("in flight", "hits", "misses", "p50", "p99", "no work: p50", "no work: p99", "hits/s [range]", "others"),
    )
    for in_flight, all_turns in turns.items():
        _row(grid, str(in_flight), all_turns)
        hits = [hit.ttft_ms for turn in all_turns for hit in turn.hits]
        found.expect(f"hit TTFT p50, {in_flight} in flight, ms", at(hits, 50), P50_MS)
        found.expect(f"hit TTFT p99, {in_flight} in flight, ms", at(hits, 99), P99_MS)
    for in_flight, all_turns in turns.items():
        calm = sorted(all_turns, key=lambda turn: turn.others)[: math.ceil(len(all_turns) / 4)]
        _row(grid, f"{in_flight}, calmest quarter of the turns", calm)
    _parts(found, [hit for turn in turns[1] for hit in turn.hits], gets)
    found.notes += [
        "Closed loop: with more than one in flight each waits for the others' whole streams, on both sides.",
        "No work: an idle gRPC server of the same library that streams as many messages at once: what one hop takes.",
        f"The same requests as misses, one at a time: TTFT p50 {at([m.ttft_ms for m in misses], 50):.1f} ms.",
        watch.note(),
    ]
    return found


def _row(grid: Grid, name: str, turns: list[Turn]) -> None:
    hits = [hit.ttft_ms for turn in turns for hit in turn.hits]
    floor = [answer.ttft_ms for turn in turns for answer in turn.floor]
    grid.rows.append(
        (
            name,
            str(len(hits)),
            str(sum(len(turn.answers) for turn in turns) - len(hits)),
            ms(interval(hits)),
            ms(interval(hits, 99)),
            f"{at(floor, 50):.2f}",
            f"{at(floor, 99):.2f}",
            spread([len(turn.hits) / turn.seconds for turn in turns], 0),
            f"{sum(turn.others for turn in turns) / len(turns):.0%}",
        )
    )


def _parts(found: Findings, hits: list[Answer], gets: list[float]) -> None:
    ledgers = [hit.first_token_ms() for hit in hits]
    totals = [sum(ledger.values()) for ledger in ledgers]
    rows = {name: [ledger.get(name, 0.0) for ledger in ledgers] for ledger in ledgers for name in ledger}
    rows["client and its network"] = [hit.ttft_ms - total for hit, total in zip(hits, totals, strict=True)]
    rows["all: TTFT at the client"] = [hit.ttft_ms for hit in hits]
    rows["beside it: a bare Redis GET of the value"] = gets
    grid = found.grid("Where a hit's time goes until its first token, one in flight, ms", "part", "mean", "p50", "p99")
    for name, values in rows.items():
        mean = sum(values) / len(values)
        grid.rows.append((name, f"{mean:.3f}", f"{at(values, 50):.3f}", f"{at(values, 99):.3f}"))


async def _closed_loop(
    stub: Stub, stored: Sequence[Prompt], requests: int, in_flight: int, tokens: int, mode: int
) -> list[Answer]:
    """So many at all times, never two of the same prompt at once: each worker has prompts of its own."""
    answers: list[Answer] = []

    async def worker(own: Sequence[Prompt]) -> None:
        for turn in range(requests // in_flight):
            answers.append(await ask(stub, own[turn % len(own)], tokens, mode))  # type: ignore[arg-type]

    await at_once(worker(stored[first::in_flight]) for first in range(in_flight))
    return answers


async def _value_bytes(bench: Bench) -> float:
    sizes = [await bench.redis.strlen(name) async for name in bench.redis.scan_iter("baton:answer:*")]
    return sum(sizes) / len(sizes)


async def _bare_gets(bench: Bench, count: int) -> list[float]:
    """Milliseconds of GETs of the stored values, one at a time."""
    names = [name async for name in bench.redis.scan_iter("baton:answer:*")]
    taken = []
    for turn in range(count):
        began = time.monotonic_ns()
        await bench.redis.get(names[turn % len(names)])
        taken.append((time.monotonic_ns() - began) / 1e6)
    return taken
