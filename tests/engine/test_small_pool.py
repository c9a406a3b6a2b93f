"""A pool that is too small costs what its smaller batch costs, not what computing again would: simulated, no model."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from baton.engine.messages import Role, SamplingParams
from baton.engine.prefix import PrefixIndex, keyed_hash
from baton.engine.request import Request
from baton.engine.scheduler import Limits, Scheduler

STREAMS, REQUESTS, BLOCK, LONGEST = 32, 150, 16, 256


@dataclass
class Outcome:
    tokens_per_second: float
    preempted: int
    computed_again: float
    """Of prompt tokens."""
    peak_tokens: int


def serve(capacity_tokens: int, *, lengths_known: bool) -> Outcome:
    """A closed loop of so many streams; a step takes what one of the bundled model's takes on a CPU."""
    chance = random.Random(0)
    prefixes = PrefixIndex(BLOCK, keyed_hash(b"secret"))
    scheduler = Scheduler(Limits(256, BLOCK, capacity_tokens // BLOCK, 10**9), STREAMS, prefixes)
    wanted: dict[int, int] = {}
    prompts = chunks = tokens = preempted = ended = peak = 0
    seconds = 0.0

    def submit() -> int:
        prompt, answer = chance.randint(8, 256), chance.randint(8, LONGEST)
        sampling = SamplingParams(max_tokens=answer if lengths_known else LONGEST)
        request = Request.probe([chance.randint(10, 300) for _ in range(prompt)], Role.GENERATE, sampling)
        request.sequence = len(wanted)
        request.arrival_ns = int(seconds * 1e9)
        wanted[request.sequence] = answer
        scheduler.submit(request)
        return prompt

    prompts += sum(submit() for _ in range(STREAMS))
    while ended < REQUESTS:
        plan = scheduler.schedule(int(seconds * 1e9))
        scheduler.slots.drain()
        seconds += 0.0015 + plan.prefill_tokens * 0.000035 + plan.decode_requests * 0.00012
        chunks += plan.prefill_tokens
        preempted += len(plan.preempted)
        peak = max(peak, scheduler.slots.used_blocks * BLOCK)
        for work in plan.work:
            request, samples = work.request, work.samples
            request.computed += work.count
            if not samples:
                continue
            request.proven = request.computed
            request.tokens.append(chance.randint(10, 300))
            tokens += 1
            if request.num_generated >= wanted[request.sequence]:
                scheduler.completed(request)
                scheduler.free(request)
                scheduler.slots.drain()
                ended += 1
                prompts += submit() if len(wanted) < REQUESTS else 0
    return Outcome(tokens / seconds, preempted, max(0, chunks - prompts) / prompts, peak)


@pytest.mark.parametrize("lengths_known", [True, False])
def test_half_a_pool(lengths_known: bool) -> None:
    fits = serve(STREAMS * 1024, lengths_known=lengths_known)
    assert fits.preempted == 0
    half = serve(fits.peak_tokens // 2, lengths_known=lengths_known)
    assert half.tokens_per_second >= 0.7 * fits.tokens_per_second
    assert half.preempted <= 15, "a hundred when a request was let in as soon as its prompt fitted"
    assert half.computed_again <= 0.05, "half of it then"
