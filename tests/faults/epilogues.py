"""What some rows do by hand, after their load or instead of one."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence

from tests.faults.bed import CLIENT, Bed
from tests.faults.driver import Driver, Load, Manner
from tests.faults.figures import goodput
from tests.faults.history import History
from tests.faults.scenario import Epilogue, Figure

_LONG = 700  # tokens that make a prompt long
_SOON = 10.0


def short_after_cancelled(limit_chunks: float = 1.0, cancelled: int = 10, judged: bool = True) -> Epilogue:
    """Ten long prompts are cancelled; a short request comes at once. What it waits longer than alone, in chunks."""

    async def epilogue(bed: Bed, driver: Driver) -> Sequence[Figure]:
        book = driver.history.book
        long_ones = [q.number for q in book if len(q.prompt) >= _LONG]
        short_ones = [q.number for q in book if len(q.prompt) < 64]
        load = Load(streams=cancelled, prefix_cached=0.0)
        alone = [await _first_token(driver, short_ones[i % len(short_ones)], load) for i in range(5)]
        step_tokens = _step_tokens(bed)
        long_one = book[long_ones[0]]
        prompt = await _first_token(driver, long_one.number, load)
        chunk = prompt / (len(long_one.prompt) / step_tokens)
        waits = []
        for turn in range(5):
            # Each long prompt once, and not from a prefix cache; they are cancelled while the first ones compute.
            chosen = list(itertools.islice(itertools.cycle(long_ones[1:]), turn * cancelled, (turn + 1) * cancelled))
            leaving = [
                asyncio.create_task(driver.ask(number, load, Manner("cancels", cancel_after=prompt / 2)))
                for number in chosen
            ]
            await asyncio.gather(*leaving)
            waits.append(await _first_token(driver, short_ones[turn % len(short_ones)], load))
        extra = max(0.0, statistics.median(waits) - statistics.median(alone))
        value = (
            f"{extra * 1000:.0f} ms; a chunk takes {chunk * 1000:.0f} ms, the prompt {prompt * 1000:.0f} ms"
            f" (alone {statistics.median(alone) * 1000:.0f} ms, worst {max(waits) * 1000:.0f} ms)"
        )
        met = not judged or extra <= limit_chunks * chunk
        return [Figure(f"a short request waits after {cancelled} cancelled prompts", "<= one chunk", value, met)]

    return epilogue


@contextlib.asynccontextmanager
async def _doomed(bed: Bed, driver: Driver, streams: int, max_tokens: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A client in a process of its own, with so many long streams under way; it does not outlive the block."""
    short = [question for question in driver.history.book if len(question.prompt) < 160][:streams]
    asked = [{"prompt": one.prompt, "sampling": one.sampling | {"max_tokens": max_tokens}} for one in short]
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.faults.doomed_client", bed.routers()[0], stdin=asyncio.subprocess.PIPE
    )
    assert client.stdin is not None
    try:
        client.stdin.write(json.dumps(asked).encode() + b"\n")
        await client.stdin.drain()
        await _until_holding(bed, "doomed", held=True, seconds=_SOON)
        assert client.returncode is None, "the client ended before it was killed"
        yield client
    finally:
        with contextlib.suppress(ProcessLookupError):
            client.kill()
        await client.wait()


def killed_client(limit: float = 0.25, streams: int = 8) -> Epilogue:
    """kill -9 a client with streams under way; how long the workers hold what was theirs."""

    async def epilogue(bed: Bed, driver: Driver) -> Sequence[Figure]:
        async with _doomed(bed, driver, streams, 1500) as client:
            client.kill()
            began = time.monotonic()
            await _until_holding(bed, "doomed", held=False, seconds=_SOON)
            took = time.monotonic() - began
        return [Figure("blocks free after kill -9 of a client", f"<= {limit:g} s", f"{took:.2f} s", took <= limit)]

    return epilogue


def black_holed_client(limit: float = _SOON, streams: int = 4) -> Epilogue:
    """A client's link goes dead in both directions; its router is to notice and stop the work."""

    async def epilogue(bed: Bed, driver: Driver) -> Sequence[Figure]:
        link = bed.link(CLIENT, next(name for name in bed.topology.services if name.startswith("router")))
        async with _doomed(bed, driver, streams, 1800):
            link.forward.black_hole = link.backward.black_hole = True
            began = time.monotonic()
            try:
                await _until_holding(bed, "doomed", held=False, seconds=2 * limit)
            finally:
                link.clear()
            took = time.monotonic() - began
        return [Figure("work stops after a client was cut off", f"<= {limit:g} s", f"{took:.2f} s", took <= limit)]

    return epilogue


async def lost_clients(bed: Bed, driver: Driver) -> Sequence[Figure]:
    """Both of them."""
    return [*await killed_client()(bed, driver), *await black_holed_client()(bed, driver)]


def overload(times: float = 3.0, seconds: float = 60.0, deadline: float = 4.0) -> Epilogue:
    """As many requests per second as are `times` what the load before got through, then half of that."""

    async def epilogue(bed: Bed, driver: Driver) -> Sequence[Figure]:
        peak = driver.history
        peak_seconds = driver.progress.seconds
        peak_goodput = goodput(peak, peak_seconds)
        rate = len(peak.requests) / peak_seconds
        async with Driver(peak.book, bed.routers, seed=7) as crowd:
            flood = Load(streams=2000, seconds=seconds, deadline=deadline, per_second=times * rate)
            history = await crowd.run(flood)
            reached = goodput(history, crowd.progress.seconds)
        async with Driver(peak.book, bed.routers, seed=8) as few:
            after = await few.run(Load(streams=200, seconds=15.0, deadline=deadline, per_second=rate / 2))
        driver.history.requests += _renumbered(driver.history, history, after)
        share = reached / peak_goodput if peak_goodput else 0.0
        refused = [a for a in history.requests if a.code == "RESOURCE_EXHAUSTED"]
        quick = [a.attempts[-1].ended.at - a.attempts[0].asked_at for a in refused if a.attempts[-1].ended is not None]
        normal = _normal_after(after)
        return [
            Figure(
                f"goodput at {times:g}x",
                ">= 80 % of peak",
                f"{share:.0%} ({reached:.0f} of {peak_goodput:.0f} tokens/s; {history.codes()})",
                share >= 0.8,
            ),
            Figure(
                "refused after, median", "", f"{statistics.median(quick) * 1000:.0f} ms" if quick else "none refused"
            ),
            Figure("normal again after", "<= 30 s", f"{normal:.1f} s", normal <= 30),
        ]

    return epilogue


def _normal_after(after: History) -> float:
    """Seconds from the end of the flood until the last request that did not end OK."""
    began = after.requests[0].attempts[0].asked_at
    bad = [asked.attempts[0].asked_at - began for asked in after.requests if asked.code != "OK"]
    return max(bad, default=0.0)


def _renumbered(first: History, *others: History) -> list:
    requests = []
    for other in others:
        for asked in other.requests:
            asked.number = len(first.requests) + len(requests)
            requests.append(asked)
    return requests


async def _first_token(driver: Driver, question: int, load: Load) -> float:
    asked = await driver.ask(question, load, Manner())
    seconds = asked.first_token_seconds
    assert seconds is not None, f"no answer: {asked.code}"
    return seconds


def _step_tokens(bed: Bed) -> int:
    tier = "prefill-0" if bed.topology.prefill else "decode-0"
    flags = bed.topology.of(tier)
    return int(flags[flags.index("--step-tokens") + 1]) if "--step-tokens" in flags else 256


async def _until_holding(bed: Bed, prefix: str, *, held: bool, seconds: float) -> None:
    """Wait until workers hold requests of these ids, or hold none; a while at most."""
    end = time.monotonic() + seconds
    workers = [bed.service(name) for name in bed.topology.services if name.startswith(("prefill", "decode"))]
    while time.monotonic() < end:
        states = await asyncio.gather(*(worker.debug_state() for worker in workers))
        if held == any(one.startswith(prefix) for s in states for one in (*s.engine_requests, *s.calls)):
            return
        await asyncio.sleep(0.01)
