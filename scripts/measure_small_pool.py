"""What a KV pool that is too small costs: the engine in this process, closed loop, pools of several sizes.

    .venv/bin/python scripts/measure_small_pool.py

Every line is a pool; throughput is of finished answers' tokens, beside the pool in which everything fits. What was
computed again after a preemption, and the batch, say where the rest went.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.loader import LoadedModel, load
from baton.engine.messages import Event, Output, Role, SamplingParams, StepReport, Submit
from baton.models import bundled_model


@dataclass(slots=True)
class Figures:
    """Of one pool."""

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    preempted: int = 0
    prefill_tokens: int = 0
    prompt_tokens: int = 0
    decode_requests: int = 0
    peak_tokens: int = 0


class Load:
    """So many requests at once; when one ends the next begins."""

    def __init__(self, model: LoadedModel, config: EngineConfig, streams: int, seed: int, answer: int) -> None:
        self._chance = random.Random(seed)
        self._answer = answer
        self._figures = Figures()
        self._engine = Engine(config, model, self._emit)
        self._number = 0
        self._ended = 0
        self._streams = streams

    def run(self, requests: int) -> Figures:
        """Serve so many requests."""
        figures = self._figures
        for _ in range(self._streams):
            self._submit()
        started = time.perf_counter()
        while self._ended < requests:
            before = self._ended
            self._engine.step()
            for _ in range(self._ended - before):
                if self._number < requests:
                    self._submit()
        figures.seconds = time.perf_counter() - started
        return figures

    def _submit(self) -> None:
        prompt = self._chance.randint(8, 256)
        answer = self._chance.randint(8, self._answer)
        self._number += 1
        self._figures.prompt_tokens += prompt
        self._engine.handle(
            Submit(
                request_id=str(self._number),
                role=Role.GENERATE,
                token_ids=[self._chance.randint(10, 300) for _ in range(prompt)],
                num_prompt_tokens=prompt,
                sampling=SamplingParams(max_tokens=answer, ignore_eos=True),
            )
        )

    def _emit(self, events: Sequence[Event]) -> None:
        figures = self._figures
        for event in events:
            if isinstance(event, Output):
                figures.tokens += len(event.token_ids)
                self._ended += event.finish_reason is not None
            elif isinstance(event, StepReport):
                figures.steps += 1
                figures.preempted += event.preempted
                figures.prefill_tokens += event.prefill_tokens
                figures.decode_requests += event.decode_requests
                figures.peak_tokens = max(figures.peak_tokens, event.used_tokens)


def main() -> None:
    """Print a line per pool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--answer", type=int, default=256, help="tokens of the longest answer")
    parser.add_argument("--pools", default="100,75,50,33,25", help="percent of what the load holds at its peak")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    base = EngineConfig(model=bundled_model(), num_slots=options.streams, slot_tokens=1024, prefix_cache=True)
    model = load(base, lambda stage, done: None)

    def measure(capacity: int, seed: int) -> Figures:
        config = EngineConfig(
            model=base.model, num_slots=base.num_slots, slot_tokens=base.slot_tokens, capacity_tokens=capacity
        )
        return Load(model, config, options.streams, seed, options.answer).run(options.requests)

    print("pool  tokens  tokens/s  of full  steps  batch  preempted  computed again")
    for seed in range(options.rounds):
        full = measure(0, seed)
        for percent in map(int, options.pools.split(",")):
            size = full.peak_tokens * percent // 100
            figures = full if percent == 100 else measure(size, seed)
            rate, of = figures.tokens / figures.seconds, full.tokens / full.seconds
            again = max(0, figures.prefill_tokens - figures.prompt_tokens) / figures.prompt_tokens
            print(
                f"{percent:3d}%  {size:6d}  {rate:8.0f}  {rate / of:6.0%}  {figures.steps:6d}"
                f"  {figures.decode_requests / figures.steps:5.1f}  {figures.preempted:9d}  {again:8.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
