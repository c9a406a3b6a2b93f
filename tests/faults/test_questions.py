"""The answers that are asked for are the engine's, and bear the rounding of another batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.engine.messages import SamplingParams
from baton.engine.sampler import SampleRow, sample
from tests.faults import questions as module
from tests.faults.questions import ROUNDING, Lengths, doubts, questions


def test_the_same_questions_have_the_same_answers_in_another_batch(
    fault_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = Lengths(prompt=(4, 40), answer=(4, 24))
    book = questions(fault_model, 12, lengths)
    assert [question.number for question in book] == list(range(12))
    assert all(len(question.answer) == question.sampling["max_tokens"] for question in book)
    assert len({question.answer for question in book}) == 12
    monkeypatch.setattr(module, "_BATCH", 1)
    alone = questions(fault_model, 12, lengths)
    assert {q.prompt: q.answer for q in alone} == {q.prompt: q.answer for q in book}


def a_row(seed: int, temperature: float) -> SampleRow:
    return SampleRow(SamplingParams(max_tokens=1, temperature=temperature, seed=seed), position=3, prompt=[], output=[])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_token_that_hangs_on_rounding_is_doubted(temperature: float) -> None:
    """Two logits as high as each other, nearly, share nearly all of the distribution: which one is drawn when the draw
    falls between them, nobody can say; when they lie apart, everybody can."""
    rows = [a_row(seed, temperature) for seed in range(64)]
    close = torch.full((64, 16), -50.0)
    close[:, 3] = 1.0
    close[:, 7] = 1.0 - ROUNDING
    assert len(doubts(close, rows, sample(close, rows))) >= 48
    apart = close.clone()
    apart[:, 7] = -40.0
    assert doubts(apart, rows, sample(apart, rows)) == set()
