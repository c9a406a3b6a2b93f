"""Small random models of many families: what "works with Hugging Face models" is checked on.

Sizes are chosen to be awkward: grouped KV heads, windows and chunks shorter than the prompts, head sizes that are not
hidden size over heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.fixtures.models import write_tokenizer

VOCAB = 384
CONTEXT = 256

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    **_MOE,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 12},
    "ministral": {
        "head_dim": 16,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "gemma": {"head_dim": 24},
    "gemma2": {"head_dim": 24, "sliding_window": 12, "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 24},
    "gemma3_text": {
        "head_dim": 24,
        "sliding_window": 12,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    "olmo2": {},
    "olmo3": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    "starcoder2": {"sliding_window": 12},
    "stablelm": {},
    "cohere": {"logit_scale": 1.0},
    "smollm3": {},
    "glm4": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "gpt_neox": {},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.15},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "head_dim": 24, "mlp_only_layers": [], **_MOE},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "deepseek_v3": _MLA,
    "llama4_text": {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "head_dim": 16,
        "attention_chunk_size": 16,
        "intermediate_size_mlp": 96,
        "layer_types": ["chunked_attention", "chunked_attention", "full_attention"],
    },
}
"""Family -> configuration entries besides the common ones."""

# Families that take no entries of _BASE, because their own names differ.
_OWN_NAMES = {"gpt2": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                       "num_key_value_heads", "max_position_embeddings")}  # fmt: skip

REFUSED: dict[str, dict[str, Any]] = {
    "falcon": {"alibi": True},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 2},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    "phi3-longrope": {
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 64,
        },
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
}
"""Families that cannot be served: own attention, recurrent state, encoder-decoder."""


def build(family: str, directory: Path, seed: int = 0) -> Path:
    """Write a random model of a family, or of a variant of it (phi3-longrope), and a byte tokenizer.

    Returns:
        The directory.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    entries = {key: value for key, value in _BASE.items() if key not in _OWN_NAMES.get(family, ())}
    entries |= FAMILIES.get(family) or REFUSED.get(family) or {}
    config = AutoConfig.for_model(
        family.partition("-")[0], **entries, bos_token_id=None, eos_token_id=0, pad_token_id=None
    )
    torch.manual_seed(seed)
    factory = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32)
    # Some families start norms, biases or sinks at constants that hide mistakes.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" not in name:
                parameter.normal_(0, 0.15)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    write_tokenizer(directory, VOCAB)
    return directory
