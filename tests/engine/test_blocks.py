"""Decoder layers as one kernel: which are replaced, and that they compute what the model's own code does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.engine.blocks import Block
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.errors import EngineError
from baton.engine.kernels.flash import flash_kernel
from baton.engine.kernels.panels import multiplies_pairs
from baton.engine.layout import KvDtype
from baton.engine.messages import Role, SamplingParams
from baton.engine.request import Request
from baton.engine.scheduler import Work

pytestmark = pytest.mark.skipif(
    not multiplies_pairs() or flash_kernel() is None, reason="no compiler, or no CPU that multiplies bfloat16 in pairs"
)

SHARED = {
    "vocab_size": 160,
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": None,
}
REPLACED: dict[str, dict[str, object]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 40},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
}
LEFT_ALONE: dict[str, dict[str, object]] = {
    "granite": {"residual_multiplier": 0.5},  # the same parts, other sums
    "gemma": {},  # another activation
    "gemma2": {"head_dim": 16},  # more norms
    "phi3": {},  # other parts
    "glm": {"head_dim": 16},  # other rotations
}


def engine(directory: Path, kind: str, settings: dict[str, object]) -> Engine:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHARED, **settings)).save_pretrained(directory)
    config = EngineConfig(model=directory, dtype=KvDtype.BFLOAT16, num_slots=8, slot_tokens=128)
    return Engine.load(config, lambda events: None)


def layers(engine: Engine) -> list[torch.nn.Module]:
    return list(engine.runner._model.module.model.layers)


def prompt(tokens: int) -> list[int]:
    return [(11 * i * i + 5 * i + 3) % 150 + 5 for i in range(tokens)]


def logits(engine: Engine, sizes: list[int], slot: int = 0) -> torch.Tensor:
    """Of the last token of every chunk, with another request's beside them."""
    ids = prompt(sum(sizes))
    request, other = (Request.probe(ids, Role.GENERATE, SamplingParams(max_tokens=1)) for _ in range(2))
    request.slot, other.slot = slot, slot + 1
    rows, at = [], 0
    for size in sizes:
        request.tokens = ids[: at + size]
        other.tokens = ids[: at + 1]
        works = [Work(request, at, size)] + ([Work(other, at, 1)] if at % 2 else [])
        requests, out = engine.runner.run(works)
        rows.append(out[requests.index(request)])
        at += size
    return torch.stack(rows)


@pytest.mark.parametrize("kind", REPLACED)
def test_layers_with_llamas_parts_are_replaced(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = engine(tmp_path / "a", kind, REPLACED[kind])
    assert all(isinstance(layer, Block) for layer in layers(fast))
    assert fast.exact
    whole = logits(fast, [100])
    for sizes in ([1] * 100, [33, 50, 17], [99, 1]):
        assert torch.equal(logits(fast, sizes)[-1], whole[-1])
    monkeypatch.setattr("baton.engine.prepare.replace_blocks", lambda *_: None)
    plain = engine(tmp_path / "b", kind, REPLACED[kind])
    assert not any(isinstance(layer, Block) for layer in layers(plain))
    expected = logits(plain, [25, 25, 25, 25])
    # Roundings of single elements, which later layers see: far below the 0.1 that bfloat16 itself may cost.
    assert (logits(fast, [25, 25, 25, 25]) - expected).abs().max() < 0.03 * (expected.max() - expected.min())


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_layers_that_compute_something_else_are_left_alone(kind: str, tmp_path: Path) -> None:
    assert not any(isinstance(layer, Block) for layer in layers(engine(tmp_path, kind, LEFT_ALONE[kind])))


def test_a_layer_is_called_in_a_step_only(tmp_path: Path) -> None:
    made = engine(tmp_path, "llama", {})
    with pytest.raises(EngineError, match="outside a step"):
        made.runner._model.module(input_ids=torch.tensor([[1, 2]]), position_ids=torch.tensor([[0, 1]]))


def test_what_is_not_a_number_stays_in_its_row(tmp_path: Path) -> None:
    made = engine(tmp_path, "llama", {})
    clean = logits(made, [20])
    embedding = made.runner._model.module.model.embed_tokens.weight
    poisoned = Request.probe([3, 4], Role.GENERATE, SamplingParams(max_tokens=1))
    poisoned.slot = 5
    with torch.inference_mode():
        embedding[4] = torch.nan
    request = Request.probe(prompt(20), Role.GENERATE, SamplingParams(max_tokens=1))
    request.slot = 0
    requests, out = made.runner.run([Work(request, 0, 20), Work(poisoned, 0, 2)])
    assert out[requests.index(poisoned)].isnan().all()
    assert torch.equal(out[requests.index(request)], clean[-1])
