"""The model that figures are measured on, and the shapes read back from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from baton.bench.random_model import SHAPES, Shape, write_model
from baton.bench.shapes import NoLinears, read_linears
from baton.bench.workload import vocabulary
from baton.text.model import TextModel

SMALL = Shape(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=48, vocab=300, context=128)


def test_sizes_are_what_their_names_say() -> None:
    assert SHAPES["120m"].parameters == pytest.approx(120e6, rel=0.1)
    assert SHAPES["500m"].parameters == pytest.approx(500e6, rel=0.1)


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_model(tmp_path / name, SMALL, seed)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == SMALL.parameters


def test_its_tokenizer_reads_any_text_and_writes_any_token(tmp_path: Path) -> None:
    write_model(tmp_path, SMALL)
    text = TextModel.load(tmp_path)
    ids = text.render([("user", "Grüße, 世界")]).token_ids
    assert "Grüße, 世界" in text.tokenizer.decode(ids)
    assert all(0 <= token < SMALL.vocab for token in ids)
    assert all(text.tokenizer.decode([token]) for token in range(5, SMALL.vocab))
    assert vocabulary(tmp_path) == SMALL.vocab


def test_shapes_are_read_back(tmp_path: Path) -> None:
    write_model(tmp_path, SMALL)
    linears = read_linears(tmp_path)
    assert linears.head == (300, 32)
    assert len(linears.layers) == 2 * 7
    assert sorted(linears.layers[:7]) == sorted([(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)])
    inner = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert linears.weights == inner + 300 * 32
    assert linears.flops(tokens=10, sampled=1) == 2 * (10 * inner + 300 * 32)


def test_a_tied_embedding_is_the_head(tmp_path: Path) -> None:
    write_model(tmp_path, replace(SMALL, vocab=400))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path)
    assert read_linears(tmp_path).head == (400, 32)


def test_without_weights_there_are_no_shapes(tmp_path: Path) -> None:
    with pytest.raises(NoLinears):
        read_linears(tmp_path)
