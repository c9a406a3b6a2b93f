"""How long a client waits for the first token of a stored answer, and where that time goes."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import grpc
from rich.progress import Progress

from baton.v1 import inference_pb2_grpc
from cache_measurements.asking import BYPASS, HIT, USE, Answer, Prompt, Stub, ask, at_once, prompts, quiet
from cache_measurements.findings import Findings, at, interval, ms, spread
from cache_measurements.mesh import Bench, running

IN_FLIGHT: Final = (1, 4, 16)
P50_MS: Final = 3.0
P99_MS: Final = 10.0
_STORED: Final = 64
_PROMPT_TOKENS: Final = (64, 256)
_START_SECONDS: Final = 30.0


@dataclass(slots=True)
class Load:
    """What was seen with so many requests in flight, over all rounds."""

    hits: list[Answer] = field(default_factory=list)
    floor: list[Answer] = field(default_factory=list)
    hits_per_second: list[float] = field(default_factory=list)
    misses: int = 0
    """Requests for which the cache was not there in time, and that were generated."""

    def take(self, answers: list[Answer]) -> None:
        """One turn's."""
        assert all(answer.ok for answer in answers)
        hits = [answer for answer in answers if answer.status == HIT]
        self.hits += hits
        self.misses += len(answers) - len(hits)


async def measure(progress: Progress, rounds: int, requests: int, tokens: int) -> Findings:
    """TTFT of hits, beside that of a gRPC server that does nothing, in turn.

    Args:
        progress: told how far it is.
        rounds: turns.
        requests: hits a turn, for each number of requests in flight.
        tokens: of each answer, one chunk each.
    """
    async with running() as bench, _idle_server() as idle:
        stored = prompts(_STORED, _PROMPT_TOKENS, random.Random(1))
        misses = []
        for prompt in progress.track(stored, description="storing answers"):
            misses.append(await bench.store(prompt, tokens))
        value_bytes = await _value_bytes(bench)
        loads = {in_flight: Load() for in_flight in IN_FLIGHT}
        gets: list[float] = []
        async with quiet() as lag:
            for _ in progress.track(range(rounds), description="asking again"):
                for in_flight, load in loads.items():
                    load.floor += await _closed_loop(idle, stored, requests, in_flight, tokens, BYPASS)
                    began = time.monotonic()
                    hits = await _closed_loop(bench.stub, stored, requests, in_flight, tokens, USE)
                    load.hits_per_second.append(len(hits) / (time.monotonic() - began))
                    load.take(hits)
                gets += await _bare_gets(bench, requests)
    found = Findings(
        f"Hits: {rounds} rounds of {requests} for each number in flight; {_STORED} answers of {tokens} tokens to prompts"
        f" of {_PROMPT_TOKENS[0]} to {_PROMPT_TOKENS[1]}, values of {value_bytes:,.0f} bytes. 95 % intervals."
    )
    _ttft(found, loads, misses)
    _parts(found, loads[1].hits, gets)
    found.notes.append(f"Lag of the measuring process's event loop: p99 {at(lag, 99) / 1e6:.2f} ms.")
    return found


def _ttft(found: Findings, loads: dict[int, Load], misses: list[Answer]) -> None:
    grid = found.grid(
        "TTFT at the client, ms",
        *("in flight", "hits", "misses", "p50", "p99", "no work: p50", "no work: p99", "hits/s [range]"),
    )
    for in_flight, load in loads.items():
        hits = [answer.ttft_ms for answer in load.hits]
        floor = [answer.ttft_ms for answer in load.floor]
        grid.rows.append(
            (
                str(in_flight),
                str(len(hits)),
                str(load.misses),
                ms(interval(hits)),
                ms(interval(hits, 99)),
                f"{at(floor, 50):.2f}",
                f"{at(floor, 99):.2f}",
                spread(load.hits_per_second, 0),
            )
        )
        found.expect(f"hit TTFT p50, {in_flight} in flight, ms", at(hits, 50), P50_MS)
        found.expect(f"hit TTFT p99, {in_flight} in flight, ms", at(hits, 99), P99_MS)
    found.notes += [
        "Closed loop: with more than one in flight each waits for the others' whole streams, on both sides.",
        "No work: an idle gRPC server of the same library that streams as many messages at once: what one hop takes.",
        f"The same requests as misses, one at a time: TTFT p50 {at([m.ttft_ms for m in misses], 50):.1f} ms.",
    ]


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
    sizes = [len(await bench.redis.get(name)) async for name in bench.redis.scan_iter("baton:answer:*")]
    return sum(sizes) / len(sizes)


async def _bare_gets(bench: Bench, count: int) -> list[float]:
    """Milliseconds of GETs of the stored values, one at a time."""
    names = [name async for name in bench.redis.scan_iter("baton:answer:*")]
    return [await _timed(lambda name=names[turn % len(names)]: bench.redis.get(name)) for turn in range(count)]


async def _timed(call: Callable[[], Awaitable[object]]) -> float:
    began = time.monotonic_ns()
    await call()
    return (time.monotonic_ns() - began) / 1e6


@asynccontextmanager
async def _idle_server() -> AsyncIterator[Stub]:
    """A router that answers at once and does nothing for it, in a process of its own."""
    with TemporaryDirectory(prefix="baton-measure-") as directory:
        ready = Path(directory, "ready.json")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "baton.bench.reference", "--ttft-ms", "0", "--itl-ms", "0"),
            *("--listen", "127.0.0.1:0", "--metrics-listen", "", "--ready-file", str(ready)),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(_START_SECONDS):
                while not ready.exists():
                    await asyncio.sleep(0.05)
            address = json.loads(ready.read_text(encoding="utf-8"))["grpc"]
            async with grpc.aio.insecure_channel(address) as channel:
                yield inference_pb2_grpc.InferenceStub(channel)
        finally:
            process.terminate()
            await process.wait()
