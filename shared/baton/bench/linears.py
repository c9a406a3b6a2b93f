"""A model's linear layers and nothing else: what the rest of a step is measured against."""

from __future__ import annotations

import time
from typing import Final

import torch

from baton.bench.shapes import Linears
from baton.engine.kernels.linear import panel_linear
from baton.engine.linear import Linear, PackedLinear

_LEAST: Final = 0.2
"""Seconds measured at least."""


class LinearLayers:
    """Random matrices of a model's shapes, multiplied one after the other: each is cold when its turn comes again.

    As the engine's, they lie in the order that is fastest on this machine.

    Args:
        linears: the shapes.
        dtype: of weights and activations; int8 multiplies into int32.
    """

    def __init__(self, linears: Linears, dtype: torch.dtype = torch.bfloat16) -> None:
        self._dtype = dtype
        self._layers = [_layer(_random(shape, dtype)) for shape in linears.layers]
        self._head = _layer(_random(linears.head, dtype))
        self._inputs: dict[tuple[int, int], torch.Tensor] = {}

    def seconds(self, tokens: int, sampled: int, least: float = _LEAST) -> float:
        """Time of one pass, the mean over as many as take `least` seconds, after one that does not count."""
        self.once(tokens, sampled)
        passes, spent, began = 0, 0.0, time.perf_counter()
        while spent < least:
            self.once(tokens, sampled)
            passes += 1
            spent = time.perf_counter() - began
        return spent / passes

    @torch.inference_mode()
    def once(self, tokens: int, sampled: int) -> None:
        """Pass `tokens` rows through all layers and `sampled` rows through the head."""
        for weight in self._layers:
            self._multiply(weight, tokens)
        if sampled:
            self._multiply(self._head, sampled)

    def _multiply(self, layer: Linear | torch.Tensor, rows: int) -> None:
        inputs = layer.shape[1] if isinstance(layer, torch.Tensor) else layer.in_features
        key = rows, inputs
        if key not in self._inputs:
            self._inputs[key] = _random(key, self._dtype)
        if isinstance(layer, torch.Tensor):
            torch._int_mm(self._inputs[key], layer.t())
        else:
            layer(self._inputs[key])


def _layer(weight: torch.Tensor) -> Linear | torch.Tensor:
    return weight if weight.dtype is torch.int8 else panel_linear(weight, None) or PackedLinear(weight, None)


def _random(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.int8:
        return torch.randint(-127, 127, shape, dtype=torch.int8)
    return torch.randn(shape).to(dtype)
