"""What a request pays when Redis, or the cache service, is broken: beside the same request that bypasses the cache."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Final, cast

from rich.progress import Progress

from baton.verify.proxy import Proxy
from cache_measurements.asking import BYPASS, USE, Answer, Prompt, ask, prompts
from cache_measurements.findings import Findings, at, interval, ms
from cache_measurements.machine import Watch, watched
from cache_measurements.mesh import Bench, metrics, running

FIRST_MS: Final = 25.0
OPEN_MS: Final = 1.0
SLOW_SECONDS: Final = 0.05
_TOKENS: Final = 4
_LONG_TOKENS: Final = 64
"""Of an answer during which something happens."""
_PROMPT_TOKENS: Final = (16, 16)
_POOL: Final = 200
_READS: Final = ("get", "claim")
"""What the cache asks Redis before a request is told its seat."""

Break = Callable[[Bench], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that breaks.

    Args:
        name: for the report.
        begin: breaks it.
        end: mends it.
        stored: whether answers that are stored are asked for; else new ones.
        each_call: whether `begin` is done again before each request: the cache mends it.
        cache_is_down: whether the cache service cannot be asked for its figures.
        mid_stream: `begin` is done when the first token is here, instead.
    """

    name: str
    begin: Break
    end: Break
    stored: bool = False
    each_call: bool = False
    cache_is_down: bool = False
    mid_stream: bool = False


@dataclass(slots=True)
class Cost:
    """Of requests in one state of the breaker."""

    booked_ms: list[float] = field(default_factory=list)
    """Until the first token, in the cache hop and on the way to it: the request's own ledger."""
    added_ms: list[float] = field(default_factory=list)
    """TTFT less that of the request beside it that bypassed the cache."""


@dataclass(slots=True)
class Outcome:
    """Of one fault."""

    costs: dict[str, Cost] = field(default_factory=dict)
    requests: int = 0
    failed: int = 0
    wrong: int = 0
    """Answers with other tokens than the request beside it."""


@dataclass(frozen=True, slots=True)
class Failures:
    """Calls of what is broken, since its caller started."""

    asked: float
    """That it did not answer, or refused."""
    held_back: float = 0.0
    """That were not made, because a breaker was open. A router does not count those to the cache."""


async def measure(progress: Progress, rounds: int, calls: int) -> Findings:
    """Break everything, again and again.

    Args:
        progress: told how far it is.
        rounds: times each thing breaks.
        calls: requests while it is broken, each with one beside it that bypasses the cache.
    """
    outcomes: dict[str, Outcome] = {}
    async with AsyncExitStack() as stack:
        direct = await stack.enter_async_context(running())
        through, proxy = await stack.enter_async_context(_through_proxy())

        async def slow(bench: Bench) -> None:
            proxy.backward.delay_seconds = SLOW_SECONDS

        async def quick(bench: Bench) -> None:
            proxy.backward.clear()

        slow_redis = Fault(f"Redis slow: +{SLOW_SECONDS * 1e3:.0f} ms", slow, quick)
        cases = [(through, slow_redis), *((direct, fault) for fault in FAULTS)]
        task = progress.add_task("breaking things", total=rounds * len(cases))
        watch = await stack.enter_async_context(watched())
        for turn in range(rounds):
            for bench, fault in cases:
                progress.update(task, advance=1, description=fault.name)
                await _round(bench, fault, calls, turn, outcomes.setdefault(fault.name, Outcome()))
    return _found(outcomes, rounds, calls, watch)


def _found(outcomes: dict[str, Outcome], rounds: int, calls: int, watch: Watch) -> Findings:
    found = Findings(f"Faults: each {rounds} times, {calls} pairs of requests each time. 95 % intervals.")
    grid = found.grid(
        "Added by the cache, ms until the first token",
        *("fault", "breaker", "requests", "ledger p50", "ledger p99", "ledger max", "beside a bypass, p50"),
    )
    for name, outcome in outcomes.items():
        for state, cost in sorted(outcome.costs.items()):
            booked = cost.booked_ms
            row = [f"{at(booked, percent):.2f}" for percent in (50, 99, 100)]
            grid.rows.append((name, state, str(len(booked)), *row, ms(interval(cost.added_ms))))
            limit = OPEN_MS if state == "open" else FIRST_MS
            found.expect(f"{name}, breaker {state}: largest, by the ledger, ms", at(booked, 100), limit)
    totals = found.grid("Requests", "fault", "asked", "failed", "wrong tokens")
    for name, outcome in outcomes.items():
        totals.rows.append((name, str(outcome.requests), str(outcome.failed), str(outcome.wrong)))
        found.expect(f"{name}: failed requests", outcome.failed, 0)
        found.expect(f"{name}: wrong answers", outcome.wrong, 0)
    found.notes += [
        "Ledger: what the request itself booked on the cache hop and the way to it, no difference of two requests.",
        "Beside a bypass: TTFT less that of the same prompt asked with CACHE_MODE_BYPASS, right before or after.",
        "Breaker open: whatever does not answer was not asked. Closed: it was, first calls and trials.",
        watch.note(),
    ]
    return found


async def _round(bench: Bench, fault: Fault, calls: int, turn: int, outcome: Outcome) -> None:
    rng = random.Random(f"{fault.name} {turn}")
    length = _LONG_TOKENS if fault.mid_stream else _TOKENS
    asked: Iterator[Prompt] = cycle(prompts(calls, _PROMPT_TOKENS, rng))
    await bench.until_hit(prompts(1, _PROMPT_TOKENS, rng)[0], _TOKENS)
    if fault.stored:
        asked = cycle(stored := prompts(4, _PROMPT_TOKENS, rng))
        for prompt in stored:
            await bench.store(prompt, length)
    if not fault.each_call and not fault.mid_stream:
        await fault.begin(bench)
    try:
        for _ in range(calls):
            if fault.each_call:
                await fault.begin(bench)
            await _pair(bench, fault, next(asked), length, rng, outcome)
    finally:
        await fault.end(bench)


async def _pair(bench: Bench, fault: Fault, prompt: Prompt, length: int, rng: random.Random, outcome: Outcome) -> None:
    """One request, and the one beside it; which is first is left to chance."""

    async def one(mode: int) -> Answer:
        on_first = (lambda: fault.begin(bench)) if fault.mid_stream and mode == USE else None
        return await ask(bench.stub, prompt, length, mode, on_first)  # type: ignore[arg-type]

    bypass = await one(BYPASS) if rng.random() < 0.5 else None
    before = await _failures(bench, fault)
    answer = await one(USE)
    after = await _failures(bench, fault)
    bypass = bypass or await one(BYPASS)
    assert bypass.ok, bypass.code
    outcome.requests += 1
    outcome.failed += not answer.ok
    outcome.wrong += answer.ok and answer.token_ids != bypass.token_ids
    if answer.ok:
        held_back = after.asked == before.asked and (fault.cache_is_down or after.held_back > before.held_back)
        cost = outcome.costs.setdefault("open" if held_back else "closed", Cost())
        parts = answer.first_token_ms()
        cost.booked_ms.append(sum(value for part, value in parts.items() if part.startswith("cache ")))
        cost.added_ms.append(answer.ttft_ms - bypass.ttft_ms)


async def _failures(bench: Bench, fault: Fault) -> Failures:
    if fault.cache_is_down:
        figures = await metrics(bench.processes["router"])
        return Failures(figures.get("baton_response_cache_failures_total{what=join}", 0.0))
    figures = await metrics(bench.processes["cache"])

    def count(how: str) -> float:
        return sum(figures[f"baton_cache_redis_failures_total{{how={how},operation={read}}}"] for read in _READS)

    return Failures(count("no_answer") + count("refused"), count("breaker_open"))


@asynccontextmanager
async def _through_proxy() -> AsyncIterator[tuple[Bench, Proxy]]:
    """A mesh whose way to Redis leads through a proxy."""
    async with AsyncExitStack() as stack:
        links: list[Proxy] = []

        async def relay(name: str, address: str) -> str:
            if name != "redis":
                return address
            path = address.removeprefix("unix://")
            links.append(await stack.enter_async_context(Proxy.to(lambda: asyncio.open_unix_connection(path))))
            return f"redis://{links[0].address}"

        bench = await stack.enter_async_context(running(relay=relay))
        yield bench, links[0]


async def _kill_cache(bench: Bench) -> None:
    os.kill(bench.processes["cache"].pid, signal.SIGKILL)


async def _restart_cache(bench: Bench) -> None:
    await bench.restart_cache()


async def _nothing(bench: Bench) -> None:
    pass


async def _kill_redis(bench: Bench) -> None:
    os.kill(bench.server.pid, signal.SIGKILL)


async def _start_redis(bench: Bench) -> None:
    await asyncio.to_thread(bench.server.start)


def _signal_redis(number: signal.Signals) -> Break:
    async def send(bench: Bench) -> None:
        os.kill(bench.server.pid, number)

    return send


def _signal_cache(number: signal.Signals) -> Break:
    async def send(bench: Bench) -> None:
        os.kill(bench.processes["cache"].pid, number)

    return send


def _configure(**settings: str) -> Break:
    async def configure(bench: Bench) -> None:
        for name, value in settings.items():
            await bench.redis.config_set(name.replace("_", "-"), value)

    return configure


async def _flush(bench: Bench) -> None:
    await bench.redis.flushall()


async def _wrong_types(bench: Bench) -> None:
    """Under every name an entry has lies something of another type."""
    for name in [name async for name in bench.redis.scan_iter("baton:answer:*")]:
        for kind in (b"answer:", b"lead:", b"wanted:", b"chunks:"):
            other = name.replace(b"answer:", kind, 1)
            await bench.redis.delete(other)
            await bench.redis.sadd(other, "not what it should be")


async def _corrupt(bench: Bench) -> None:
    """One byte of every value is another, and another one each time."""
    for name in [name async for name in bench.redis.scan_iter("baton:answer:*")]:
        value = bytearray(cast(bytes, await bench.redis.get(name)))
        value[len(value) // 2] = (value[len(value) // 2] + 1) % 256
        await bench.redis.set(name, bytes(value))


FAULTS: Final = (
    Fault("nothing: the price of a miss", _nothing, _nothing),
    Fault("Redis down", _kill_redis, _start_redis),
    Fault("Redis frozen", _signal_redis(signal.SIGSTOP), _signal_redis(signal.SIGCONT)),
    Fault(
        "Redis full",
        _configure(maxmemory_policy="noeviction", maxmemory="1"),
        _configure(maxmemory="64mb", maxmemory_policy="allkeys-lru"),
    ),
    Fault("Redis read-only", _configure(min_replicas_to_write="1"), _configure(min_replicas_to_write="0")),
    Fault("Redis flushed", _flush, _nothing, stored=True, each_call=True),
    Fault("Redis flushed mid-stream", _flush, _nothing, mid_stream=True),
    Fault("wrong types", _wrong_types, _flush, stored=True, each_call=True),
    Fault("corrupt values", _corrupt, _flush, stored=True, each_call=True),
    Fault("cache down", _kill_cache, _restart_cache, cache_is_down=True),
    Fault("cache frozen", _signal_cache(signal.SIGSTOP), _signal_cache(signal.SIGCONT), cache_is_down=True),
)
