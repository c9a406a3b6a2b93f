"""Equal requests at the same time, over several routers and cache replicas: how often they are computed."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final

import grpc
from rich.progress import Progress

from baton.cli.plan import Plan
from baton.models import bundled_model
from baton.v1 import inference_pb2, inference_pb2_grpc
from cache_measurements.asking import Answer, Stub, ask, prompts
from cache_measurements.findings import Findings, interval, ms
from cache_measurements.machine import watched
from cache_measurements.mesh import PATIENT, Bench, cache_environment, metrics, more, running

_PROMPT_TOKENS: Final = (192, 192)
"""More than decode computes itself: the prefill tier does."""
_LEAST_REMOTE: Final = 64


@dataclass(frozen=True, slots=True)
class Round:
    """One request, asked many times at once."""

    answers: list[Answer]
    prefills: float
    """Requests the prefill engine began."""
    decodes: float
    """Requests the decode engine began."""

    @property
    def streams(self) -> int:
        """Different answers."""
        return len({(tuple(answer.token_ids), answer.text) for answer in self.answers})


async def measure(progress: Progress, rounds: int, requests: int, tokens: int, patient: bool) -> Findings:
    """Ask.

    Args:
        progress: told how far it is.
        rounds: different requests, one after the other.
        requests: equal ones at the same time.
        tokens: of an answer.
        patient: let routers wait for the cache, and the cache for Redis, as long as a busy machine may take.
    """
    asked: list[Round] = []
    async with _routers(patient) as (bench, stubs), watched() as watch:
        for prompt in progress.track(prompts(rounds, _PROMPT_TOKENS, random.Random(3)), description="asking"):
            before = await _begun(bench)
            calls = (ask(stubs[number % len(stubs)], prompt, tokens) for number in range(requests))
            answers = await asyncio.gather(*calls)
            after = await _begun(bench)
            asked.append(Round(answers, after["prefill"] - before["prefill"], after["decode"] - before["decode"]))
    found = Findings(
        f"Coalescing: {rounds} rounds of {requests} equal requests at once, over 3 routers and 2 cache replicas: one"
        f" router knows the first replica, one the second, one both. {_PROMPT_TOKENS[0]} tokens in, {tokens} out."
        f" {'Patient' if patient else 'Default'} time-outs."
    )
    grid = found.grid("What was computed, per round", "rounds", "prefills", "decodes", "different streams", "failed")
    shapes = Counter((r.prefills, r.decodes, r.streams, sum(not a.ok for a in r.answers)) for r in asked)
    for shape, count in shapes.most_common():
        grid.rows.append((str(count), *(f"{value:.0f}" for value in shape)))
    found.expect("prefills of one round, at most", max(r.prefills for r in asked), 1)
    found.expect("different streams of one round, at most", max(r.streams for r in asked), 1)
    found.expect("failed requests", sum(not a.ok for r in asked for a in r.answers), 0)
    grid = found.grid("What the clients saw, ms", "cache status", "requests", "TTFT p50", "TTFT p99", "end to end p50")
    for status in sorted({answer.status for r in asked for answer in r.answers}):
        same = [answer for r in asked for answer in r.answers if answer.status == status]
        ttft = [answer.ttft_ms for answer in same]
        end = [(answer.done_ns - answer.sent_ns) / 1e6 for answer in same]
        name = inference_pb2.CacheStatus.Name(status).removeprefix("CACHE_STATUS_").lower()
        grid.rows.append((name, str(len(same)), *(ms(interval(ttft, p)) for p in (50, 99)), ms(interval(end))))
    found.notes += [
        "Miss: whoever the answer was generated for. Hit: asked when the answer was already stored.",
        f"{requests} streams end in one measuring process: its share of the two cores is part of every TTFT.",
        watch.note(),
    ]
    return found


async def _begun(bench: Bench) -> dict[str, float]:
    """Requests each tier's engine began."""
    return {
        tier: (await metrics(bench.processes[f"{tier}-0"]))["baton_engine_queue_seconds_count"]
        for tier in ("prefill", "decode")
    }


@asynccontextmanager
async def _routers(patient: bool) -> AsyncIterator[tuple[Bench, list[Stub]]]:
    """A mesh with three routers and two cache replicas, not all of which know each other."""
    async with AsyncExitStack() as stack:
        waiting = PATIENT if patient else {}
        extra = {**waiting, "decode": ("--local-prefill-tokens", str(_LEAST_REMOTE))}
        bench = await stack.enter_async_context(running(extra=extra))
        first = bench.processes["cache"].grpc
        redis = cache_environment(bench.server)
        plain = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
        second = (await stack.enter_async_context(more("cache", 1, [*plain, *waiting.get("cache", ())], redis))).grpc
        plan = Plan(model=bundled_model(), prefill=1, decode=1, listen="127.0.0.1:0", redis_url="", drain_seconds=2.0)
        workers = ([bench.processes["decode-0"].grpc], [bench.processes["prefill-0"].grpc])
        stubs = [bench.stub]  # knows the first cache
        for number, known in enumerate((second, f"{first},{second}"), 1):
            flags = plan.router_arguments(*workers, cache=known)
            router = await stack.enter_async_context(more("router", number, [*flags, *waiting.get("router", ())], {}))
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(router.grpc))
            stubs.append(inference_pb2_grpc.InferenceStub(channel))
        yield bench, stubs
