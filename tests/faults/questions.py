"""Questions whose answers are known: computed once, by one engine in this process.

Another batch shape rounds a logit by up to 1.4e-6 in float32 on these models. A question whose answer hangs on less is
not asked: its best two logits must lie further apart than three such roundings can bring them, and, where tokens are
drawn, the draw must not change when all logits are nudged by ten.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch

from baton.engine import engine as engine_module
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.loader import load
from baton.engine.messages import Event, Failed, Output, Role, SamplingParams, Submit
from baton.engine.sampler import SampleRow, sample
from tests.faults.history import Question

ROUNDING = 1.4e-6  # the largest difference seen between two batch shapes
_BEAR = 3 * ROUNDING
_NUDGE = 10 * ROUNDING
_NUDGES = 6
_BATCH = 32


@dataclass(frozen=True, slots=True)
class Lengths:
    """What is asked, in tokens: both ends included."""

    prompt: tuple[int, int] = (4, 160)
    answer: tuple[int, int] = (4, 48)
    long_prompts: float = 0.0
    """Share of prompts with `long_prompt` tokens."""
    long_prompt: tuple[int, int] = (600, 1200)


def questions(model: Path, count: int, lengths: Lengths, seed: int = 0, vocab_size: int = 384) -> tuple[Question, ...]:
    """So many questions with their answers; the doubtful ones among those drawn are left out."""
    rng = random.Random(f"{seed} {lengths}")
    loaded = load(EngineConfig(model=model))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sure: list[Question] = []
    try:
        while len(sure) < count:
            drawn = [_drawn(rng, lengths, vocab_size) for _ in range(count - len(sure) + 4)]
            for first in range(0, len(drawn), _BATCH):
                sure += _answered(loaded, drawn[first : first + _BATCH])
    finally:
        torch.set_num_threads(threads)
    return tuple(replace(question, number=number) for number, question in enumerate(sure[:count]))


def _drawn(rng: random.Random, lengths: Lengths, vocab_size: int) -> Question:
    span = lengths.long_prompt if rng.random() < lengths.long_prompts else lengths.prompt
    prompt = tuple(rng.randrange(5, vocab_size) for _ in range(rng.randint(*span)))
    sampling: dict[str, float | int | bool] = {
        "max_tokens": rng.randint(*lengths.answer),
        "temperature": rng.choice((0.0, 0.7, 1.0)),
        "top_p": rng.choice((1.0, 0.95)),
        "presence_penalty": rng.choice((0.0, 0.3)),
        "seed": rng.getrandbits(48),
        "ignore_eos": True,
    }
    return Question(0, prompt, sampling)


def doubts(logits: torch.Tensor, rows: Sequence[SampleRow], tokens: Sequence[int]) -> set[int]:
    """Seeds of the rows whose token hangs on rounding.

    Args:
        logits: [R, V] float32.
        rows: R of them.
        tokens: R, as sampled.
    """
    found: set[int] = set()
    best = logits.topk(2, dim=1).values
    for row, (first, second) in zip(rows, best.tolist(), strict=True):
        if row.sampling.temperature == 0 and not row.sampling.presence_penalty and first - second < 2 * _BEAR:
            found.add(row.sampling.seed)
    for _ in range(_NUDGES):
        nudged = logits + (torch.rand_like(logits) * 2 - 1) * _NUDGE
        for row, token, other in zip(rows, tokens, sample(nudged, rows), strict=True):
            if token != other:
                found.add(row.sampling.seed)
    return found


def _answered(loaded: object, drawn: Sequence[Question]) -> list[Question]:
    """Those of the questions whose answers are sure, with them."""
    events: list[Event] = []
    config = EngineConfig(model=Path(), num_slots=_BATCH, slot_tokens=2048, step_tokens=512, prefix_cache=False)
    doubtful: set[int] = set()  # seeds

    def watched(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
        tokens = sample(logits, rows)
        doubtful.update(doubts(logits, rows, tokens))
        return tokens

    with mock.patch.object(engine_module, "sample", watched):
        engine = Engine(config, loaded, events.extend)  # type: ignore[arg-type]
        for number, question in enumerate(drawn):
            sampling = SamplingParams(**question.sampling)  # type: ignore[arg-type]
            engine.handle(
                Submit(
                    request_id=str(number),
                    role=Role.GENERATE,
                    token_ids=list(question.prompt),
                    num_prompt_tokens=len(question.prompt),
                    sampling=sampling,
                )
            )
        while engine.has_work:
            engine.step()
    answers: dict[int, list[int]] = {number: [] for number in range(len(drawn))}
    for event in events:
        if isinstance(event, Failed):
            raise AssertionError(f"the reference refuses {event.request_id}: {event.message}")
        if isinstance(event, Output):
            answers[int(event.request_id)] += event.token_ids
    return [
        replace(question, answer=tuple(answers[number]))
        for number, question in enumerate(drawn)
        if question.sampling["seed"] not in doubtful
    ]
