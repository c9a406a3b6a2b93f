"""The tiny model's network: a small Llama with grouped-query attention and tied embeddings."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tiny_model.tokenizer import BEGIN, CONTEXT, END
from tiny_model.training import Outcome
from tiny_model.wiring import wire


def new_network(tokenizer: Tokenizer, seed: int) -> LlamaForCausalLM:
    """An untrained network of about 3 million parameters."""
    torch.manual_seed(seed)
    end = tokenizer.token_to_id(END)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BEGIN),
        eos_token_id=end,
        pad_token_id=end,
    )
    network = LlamaForCausalLM(config)
    wire(network)
    return network


def save_network(network: LlamaForCausalLM, directory: Path, trained: Sequence[Outcome]) -> None:
    """Write config.json, generation_config.json and model.safetensors, weights in bfloat16.

    Args:
        network: what to save.
        directory: where to.
        trained: its trainings, which config.json keeps under "trainings".
    """
    network.config.trainings = [asdict(training) for training in trained]
    stored = copy.deepcopy(network).to(torch.bfloat16)
    stored.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=network.config.bos_token_id,
        eos_token_id=network.config.eos_token_id,
        pad_token_id=network.config.pad_token_id,
    )
    directory.mkdir(parents=True, exist_ok=True)
    stored.save_pretrained(directory)
    # The library writes a temporary file, readable by its owner only, and renames it.
    (directory / "model.safetensors").chmod(0o644)


def load_network(directory: Path) -> LlamaForCausalLM:
    """The saved network in float32, ready to answer."""
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, use_safetensors=True).eval()


def trainings(network: LlamaForCausalLM) -> list[Outcome]:
    """The trainings a saved network has had."""
    return [Outcome(**training) for training in network.config.trainings]
