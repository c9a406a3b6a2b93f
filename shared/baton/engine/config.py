"""Configuration of an engine. Plain data: a service's front builds it without importing torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

import msgspec

from baton.engine.layout import KvDtype


class Quantization(enum.StrEnum):
    """How weights are stored beyond their element type."""

    NONE = "none"
    INT8 = "int8"  # linear layers, in steps of so few rows that it is faster


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What to load and how much room it gets."""

    model: Path  # directory with config.json and safetensors
    dtype: KvDtype = KvDtype.FLOAT32  # element type of weights and KV
    device: str = "cpu"
    quantization: Quantization = Quantization.NONE
    kernels: bool = True  # compile kernels for this CPU where there is a compiler
    num_slots: int = 32  # requests that can hold KV at once
    slot_tokens: int = 0  # most tokens of one request; 0: the model's context, at most 2048
    capacity_tokens: int = 0  # KV tokens of all requests together; 0: num_slots x slot_tokens
    block_tokens: int = 16  # granularity in which KV tokens are counted
    step_tokens: int = 256  # token budget of a step: decode first, prompt chunks after
    max_waiting: int = 256  # requests that may wait; more are refused
    aging_seconds: float = 1.0  # above 0: waiting this long raises a request's effective priority by one
    prefix_cache: bool = True  # free slots keep what they hold for requests that begin alike
    threads: int = 1  # CPU threads of torch

    def to_json(self) -> str:
        """For the engine process's command line."""
        return msgspec.json.encode(self, enc_hook=str).decode()

    @classmethod
    def from_json(cls, text: str) -> EngineConfig:
        """What `to_json` made."""
        return msgspec.json.decode(text, type=cls, dec_hook=lambda kind, value: kind(value))
