"""Greedy fp32 tokens equal `transformers` for every family that is served; the others are refused by name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.errors import UnsupportedModel
from baton.engine.loader import load
from tests import model_zoo
from tests.engine.conftest import Stepped, a_prompt, a_submit

NEW_TOKENS = 24
LENGTHS = (7, 23, 40)


def check_equal(model: PreTrainedModel, prompt: list[int], got: list[int]) -> None:
    """Token by token; where they differ first the reference must have hesitated: top-two gap below 1e-4."""
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None)
    model.generation_config = config  # or its end token would end the reference
    with torch.inference_mode():
        expected = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
        assert len(got) == len(expected) == NEW_TOKENS
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            if a != b:
                logits = model(torch.tensor([prompt + expected[:i]])).logits[0, -1].float()
                first, second = logits.topk(2).values.tolist()
                assert first - second < 1e-4, f"token {i}: got {a}, expected {b}"
                return


def check_answers(stepped: Stepped, directory: Path) -> None:
    """Of an engine that serves the model of the directory, to several prompts at once."""
    prompts = [a_prompt(length, length) for length in LENGTHS]
    stepped.run(*(a_submit(f"r{i}", prompt, max_tokens=NEW_TOKENS) for i, prompt in enumerate(prompts)))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    answers = [stepped.tokens(f"r{i}") for i in range(len(prompts))]
    assert len({tuple(answer) for answer in answers}) == len(prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        check_equal(model, prompt, answer)


@pytest.mark.parametrize("family", model_zoo.FAMILIES)
def test_engine_equals_generate(family: str, tmp_path: Path) -> None:
    directory = model_zoo.build(family, tmp_path / family)
    stepped = Stepped(load(EngineConfig(model=directory)), step_tokens=16)
    check_answers(stepped, directory)
    stepped.check_empty()


@pytest.mark.parametrize(
    ("family", "windows", "chunks"),
    [
        ("llama", [0, 0, 0], [0, 0, 0]),
        ("mistral", [12, 12, 12], [0, 0, 0]),
        ("ministral", [12, 0, 12], [0, 0, 0]),
        ("gemma3_text", [12, 12, 0], [0, 0, 0]),
        ("gpt_oss", [12, 0, 12], [0, 0, 0]),
        ("llama4_text", [0, 0, 0], [16, 16, 0]),
    ],
)
def test_windows_and_chunks_are_found(family: str, windows: list[int], chunks: list[int], tmp_path: Path) -> None:
    layers = load(EngineConfig(model=model_zoo.build(family, tmp_path / family))).spec.layers
    assert [layer.window for layer in layers] == windows
    assert [layer.chunk for layer in layers] == chunks


def test_keys_and_values_may_have_different_sizes(tmp_path: Path) -> None:
    layers = load(EngineConfig(model=model_zoo.build("deepseek_v3", tmp_path / "model"))).spec.layers
    assert {(layer.heads, layer.key_dim, layer.value_dim) for layer in layers} == {(4, 24, 16)}


@pytest.mark.parametrize(("family", "wrong"), [("mistral", {"window": 0}), ("llama4_text", {"chunk": 0})])
def test_attention_that_is_not_understood_is_found_before_serving(
    family: str, wrong: dict[str, int], tmp_path: Path
) -> None:
    model = load(EngineConfig(model=model_zoo.build(family, tmp_path / family)))
    layers = tuple(msgspec.structs.replace(layer, **wrong) for layer in model.spec.layers)
    misread = dataclasses.replace(model, spec=msgspec.structs.replace(model.spec, layers=layers))
    with pytest.raises(UnsupportedModel, match="other logits in a step"):
        Stepped(misread)


REASONS = {
    "falcon": "FalconForCausalLM does not let its attention be replaced",
    "bloom": "BloomForCausalLM does not let its attention be replaced",
    "mamba2": "mamba2 has linear_attention layers, whose state is not cached",
    "t5": "t5 is an encoder-decoder; only decoders are served",
    "phi3-longrope": "longrope position embeddings change with the longest request of a batch",
    "lfm2": "lfm2 has conv layers, whose state is not cached",
}


@pytest.mark.parametrize("family", model_zoo.REFUSED)
def test_what_cannot_be_served_is_refused_with_its_reason(family: str, tmp_path: Path) -> None:
    directory = model_zoo.build(family, tmp_path / family)
    with pytest.raises(UnsupportedModel, match=re.escape(REASONS[family])):
        Engine.load(EngineConfig(model=directory, num_slots=2), lambda events: None)
