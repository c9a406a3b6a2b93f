"""The engine's benchmark on a small model: what it measures is there, and is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.bench.engine import Questions, measure
from baton.bench.figures import Figure
from baton.bench.linears import LinearLayers
from baton.bench.random_model import Shape, write_model
from baton.bench.shapes import read_linears
from baton.bench.stepping import StepFailed, Stepped
from baton.bench.streams import draw_prompts
from baton.engine.config import EngineConfig

SMALL = Shape(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=48, vocab=300, context=256)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_model(directory, SMALL)
    return directory


@pytest.fixture
def stepped(model: Path) -> Stepped:
    return Stepped(EngineConfig(model, num_slots=4, slot_tokens=128, step_tokens=16))


def test_decode_steps_are_counted_once_all_prompts_are_computed(stepped: Stepped) -> None:
    steps = stepped.decode(draw_prompts(3, 40, SMALL.vocab, 0), steps=5)
    assert len(steps) == 5
    for step in steps:
        assert 0 < step.model < step.whole
        assert step.overhead == step.whole - step.model
    # Prompts of 40 tokens and a budget of 16: the first step computes a part of one prompt only.
    assert stepped.engine.debug_state().steps > 5 + 120 // 16
    assert stepped.engine.debug_state().free_slots == 4


def test_a_prefill_ends_with_its_first_token_and_gives_everything_back(stepped: Stepped) -> None:
    before = stepped.engine.debug_state().steps
    assert stepped.prefill(draw_prompts(1, 64, SMALL.vocab, 0)[0]) > 0
    assert stepped.engine.debug_state().steps - before == 64 // 16
    assert stepped.engine.debug_state().free_slots == 4


def test_what_the_engine_refuses_is_no_measurement(stepped: Stepped) -> None:
    with pytest.raises(StepFailed):
        stepped.prefill(draw_prompts(1, 500, SMALL.vocab, 0)[0])


def test_all_figures_are_there(stepped: Stepped, model: Path) -> None:
    questions = Questions(batches=(1, 2), context=8, long_context=64, prompts=(16, 32), steps=2, rounds=2)
    said: list[str] = []
    figures = measure(stepped, LinearLayers(read_linears(model), torch.float32), questions, said.append)
    named: dict[str, Figure] = {figure.name: figure for figure in figures}
    assert {"decode, batch 1, after 8 tokens", "prefill, 32 tokens", "step overhead, batch 2"} <= named.keys()
    for figure in figures:
        assert figure.value.times == 2
        assert figure.value.low <= figure.value.median <= figure.value.high
        # Only the rest is a difference to something measured apart.
        assert figure.value.low > 0 or figure.name.startswith("model besides")
    decode = named["decode, batch 1, after 8 tokens"]
    assert decode.wanted == 0.7
    assert decode.share is not None
    assert decode.limit is not None
    assert decode.limit_name == "linear layers only"
    assert "the same over that after 8" in named
    assert any("round 2 of 2" in line for line in said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_linear_layers_multiply_in_every_type(model: Path, dtype: torch.dtype) -> None:
    layers = LinearLayers(read_linears(model), dtype)
    assert layers.seconds(tokens=32, sampled=0, least=0.01) > 0
