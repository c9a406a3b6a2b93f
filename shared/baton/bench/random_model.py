"""A Llama-shaped model with random weights, for measuring: every engine loads it, and nobody has to download anything.

The tokenizer is byte-level, filled up to the vocabulary's size with made-up words, so that any text encodes and any
token decodes to a few characters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BEGIN, END = "<|begin|>", "<|end|>"
_ROLES: Final = ("<|system|>", "<|user|>", "<|assistant|>")
_SPECIALS: Final = (BEGIN, END, *_ROLES)
_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SPREAD: Final = 0.02
"""Standard deviation of the weights, the usual one of an untrained network."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama-shaped network."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int = 32_000
    context: int = 4096

    def __post_init__(self) -> None:
        assert self.heads % self.kv_heads == 0
        assert self.vocab >= len(_SPECIALS) + 256

    @property
    def parameters(self) -> int:
        """Weights of all tensors together."""
        return sum(rows * columns for _, (rows, columns) in self.matrices()) + (2 * self.layers + 1) * self.hidden

    def matrices(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """(name, [outputs, inputs]) of every matrix; norms are not among them."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
            yield f"{prefix}.self_attn.q_proj.weight", (queries, self.hidden)
            yield f"{prefix}.self_attn.k_proj.weight", (keys, self.hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (keys, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, queries)
            yield f"{prefix}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def norms(self) -> Iterator[str]:
        """Names of the normalisation weights, each [hidden]."""
        for layer in range(self.layers):
            yield f"model.layers.{layer}.input_layernorm.weight"
            yield f"model.layers.{layer}.post_attention_layernorm.weight"
        yield "model.norm.weight"

    def config(self) -> dict[str, Any]:
        """What config.json says of it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": _SPECIALS.index(BEGIN),
            "eos_token_id": _SPECIALS.index(END),
            "dtype": "bfloat16",
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": _SPREAD,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.context,
            "mlp_bias": False,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocab,
        }


SHAPES: Final = {
    "120m": Shape(hidden=768, layers=12, heads=12, kv_heads=4, head_dim=64, intermediate=2048),
    "500m": Shape(hidden=1536, layers=16, heads=24, kv_heads=8, head_dim=64, intermediate=4096),
}
"""Sizes by name; the names are what they have in parameters, about."""


def write_model(directory: Path, shape: Shape, seed: int = 0) -> None:
    """Write a model directory: bfloat16 safetensors, configuration, tokenizer and chat template.

    The same shape and seed give the same weights.

    Raises:
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.empty(size).normal_(0.0, _SPREAD, generator=generator).to(torch.bfloat16)
        for name, size in shape.matrices()
    }
    tensors |= {name: torch.ones(shape.hidden, dtype=torch.bfloat16) for name in shape.norms()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", shape.config())
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": _SPECIALS.index(BEGIN), "eos_token_id": _SPECIALS.index(END)},
    )
    _tokenizer(shape.vocab).save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "pad_token": END,
            "model_max_length": shape.context,
            "clean_up_tokenization_spaces": False,
            "chat_template": _TEMPLATE,
        },
    )


def _tokenizer(vocab: int) -> Tokenizer:
    """Special tokens first, then the 256 bytes, then words of one space and a number."""
    names = [*_SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"Ġ{number}" for number in range(vocab - len(names))]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _SPECIALS])
    return tokenizer


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
