"""Only safetensors, never code; and workers are interchangeable exactly where the fingerprints say so."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from baton.engine.config import EngineConfig
from baton.engine.errors import EngineError, UnsupportedModel
from baton.engine.layout import KvDtype, PoolLayout
from baton.engine.loader import load
from tests import model_zoo


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    """A model directory to spoil."""
    return shutil.copytree(llama, tmp_path / "copy")


def edit(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_from_the_directory_is_refused(copied: Path, name: str) -> None:
    canary = copied / "ran"
    (copied / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    edit(copied / name, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    with pytest.raises(UnsupportedModel, match=f"{name}: auto_map asks for code from elsewhere"):
        load(EngineConfig(model=copied))
    assert not canary.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_from_a_hub_are_refused(copied: Path, key: str) -> None:
    edit(copied / "config.json", **{key: "somebody/kernels"})
    with pytest.raises(UnsupportedModel, match=f"{key} asks for code"):
        load(EngineConfig(model=copied))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_depend_on_other_requests_are_refused(copied: Path, kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 256}
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} if kind == "longrope" else {}
    edit(copied / "config.json", rope_parameters=rope | factors)
    with pytest.raises(UnsupportedModel, match=f"{kind} position embeddings change"):
        load(EngineConfig(model=copied))


def test_weights_that_can_run_code_are_refused(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="no safetensors"):
        load(EngineConfig(model=copied))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "not JSON"),
        (lambda d: edit(d / "config.json", model_type="no-such-model"), "config.json cannot be read: .*no-such-model"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json: not a JSON object"),
        (lambda d: edit(d / "config.json", vocab_size="many"), "config.json cannot be read: .*vocab_size"),
        (lambda d: edit(d / "config.json", num_attention_heads=0), "the model cannot be loaded|cannot be read"),
        (lambda d: edit(d / "config.json", num_hidden_layers=3), r"9 weights are missing, among them model\.layers\.2"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 100), "the model cannot be loaded"),
        (lambda d: os.truncate(d / "model.safetensors", 10_000), "the model cannot be loaded"),
        (lambda d: edit(d / "config.json", hidden_size=128), "the model cannot be loaded"),
        (shutil.rmtree, "no config.json"),
    ],
)
def test_broken_directories_are_refused_with_a_reason(
    copied: Path, spoil: Callable[[Path], object], words: str
) -> None:
    spoil(copied)
    with pytest.raises(UnsupportedModel, match=words):
        load(EngineConfig(model=copied))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_tied_weights_are_not_missing(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_zoo._BASE, "tie_word_embeddings", True)
    directory = model_zoo.build(family, tmp_path / "model")
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    assert load(EngineConfig(model=directory)).spec.vocab_size == model_zoo.VOCAB


def test_unknown_devices_are_refused(llama: Path) -> None:
    with pytest.raises(EngineError, match="'abacus'"):
        load(EngineConfig(model=llama, device="abacus"))


def test_what_is_said_of_a_model(llama: Path) -> None:
    spec = load(EngineConfig(model=llama)).spec
    assert (spec.name, spec.architecture) == (llama.name, "LlamaForCausalLM")
    assert (spec.vocab_size, spec.max_context, spec.eos_token_ids) == (384, 512, (0,))
    assert [(la.key, la.heads, la.key_dim, la.value_dim) for la in spec.layers] == [("0", 2, 16, 16), ("1", 2, 16, 16)]
    assert PoolLayout.build(spec.layers, spec.dtype, 1, 1).bytes_per_token == 2 * 2 * (16 + 16) * 4


def test_progress_goes_up_to_the_end(llama: Path) -> None:
    seen: list[tuple[str, float]] = []
    load(EngineConfig(model=llama), lambda stage, fraction: seen.append((stage, fraction)))
    fractions = [fraction for stage, fraction in seen if stage == "weights"]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)


def fingerprint(directory: Path, dtype: KvDtype = KvDtype.FLOAT32) -> str:
    return load(EngineConfig(model=directory, dtype=dtype)).spec.fingerprint


def test_fingerprints_are_equal_where_answers_are(llama: Path, copied: Path) -> None:
    edit(copied / "config.json", transformers_version="0.0.1", _name_or_path="elsewhere", use_cache=False)
    (copied / "README.md").write_text("Another name, the same model.")
    assert fingerprint(copied) == fingerprint(llama)


def test_fingerprints_differ_where_answers_do(llama: Path, copied: Path) -> None:
    original = fingerprint(llama)
    generation = copied / "generation_config.json"
    edit(generation, eos_token_id=[0, 9])
    assert fingerprint(copied) != original
    shutil.copy(llama / generation.name, copied)
    assert fingerprint(llama, KvDtype.BFLOAT16) != original
    edit(copied / "config.json", rms_norm_eps=1e-3)
    assert fingerprint(copied) != original
    shutil.copy(llama / "config.json", copied)
    assert fingerprint(copied) == original
    weights = load_file(copied / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(copied) != original


def test_tokenizers_have_a_digest_of_their_own(llama: Path, copied: Path) -> None:
    original = load(EngineConfig(model=llama)).spec
    assert original.tokenizer_digest
    (copied / "tokenizer.json").write_text("{}")
    changed = load(EngineConfig(model=copied)).spec
    assert changed.fingerprint == original.fingerprint
    assert changed.tokenizer_digest != original.tokenizer_digest
    (copied / "tokenizer.json").unlink()
    assert load(EngineConfig(model=copied)).spec.tokenizer_digest == ""


def test_kernels_named_by_a_model_are_refused(copied: Path) -> None:
    edit(copied / "config.json", attn_implementation="somebody/kernel")
    with pytest.raises(UnsupportedModel, match="attn_implementation asks for code"):
        load(EngineConfig(model=copied))


def test_other_end_tokens_are_another_model(copied: Path) -> None:
    """Workers that end answers differently must not continue each other's, nor share cached ones."""
    before = load(EngineConfig(model=copied)).spec.fingerprint
    edit(copied / "generation_config.json", eos_token_id=[5, 6])
    assert load(EngineConfig(model=copied)).spec.fingerprint != before
