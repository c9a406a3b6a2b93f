"""What a model's attention calls look like: found by watching a forward, since configurations do not tell."""

from __future__ import annotations

from typing import Any

import torch

from baton.engine.attention import Call, attend, attending, causal_mask
from baton.engine.layout import LayerSpec


class Recorder:
    """Serves a forward of a few tokens as plain causal attention and notes the shape of every call.

    Attributes:
        layers: one per call, in order.
    """

    def __init__(self, config: Any) -> None:
        self.layers: list[LayerSpec] = []
        self._types = getattr(config, "layer_types", None) or []
        self._chunk = getattr(config, "attention_chunk_size", None) or 0
        self._calls: dict[int, int] = {}  # module's layer index -> calls so far

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call) -> torch.Tensor:
        """Note and serve one call."""
        times = self._calls.get(call.layer_index, 0)
        self._calls[call.layer_index] = times + 1
        # Llama 4 says it in the configuration only, not in the call.
        chunked = 0 <= call.layer_index < len(self._types) and self._types[call.layer_index] == "chunked_attention"
        self.layers.append(
            LayerSpec(
                key=f"{call.layer_index}.{times}" if times else str(call.layer_index),
                heads=key.shape[1],
                key_dim=key.shape[3],
                value_dim=value.shape[3],
                window=call.window or 0,
                chunk=self._chunk if chunked else 0,
            )
        )
        tokens = query.shape[2]
        return attend(query, key, value, call, causal_mask(tokens, query.dtype)).transpose(1, 2)


def record(model: torch.nn.Module, config: Any) -> tuple[LayerSpec, ...]:
    """The model's attention calls, from one forward of two tokens."""
    recorder = Recorder(config)
    with attending(recorder):
        model(
            input_ids=torch.zeros(1, 2, dtype=torch.long),
            position_ids=torch.arange(2).view(1, 2),
            past_key_values=None,
            use_cache=False,
        )
    return tuple(recorder.layers)
