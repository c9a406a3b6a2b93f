"""Linear layers in bfloat16 by a kernel of our own, whose rows are bitwise the same in every batch."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from baton.engine.kernels.build import NoCompiler, library
from baton.engine.kernels.panels import multiplies_pairs
from baton.engine.linear import Linear

_OUTPUTS = 32
"""Of a panel, as in panels.h."""


class PanelLinear(Linear):
    """A linear layer whose weight lies in the panels that panels.h describes.

    Args:
        function: of linear.c.
        weight: [out_features, in_features], bfloat16, in_features even; not kept.
        bias: [out_features] or None.

    Attributes:
        panels: [panels, in_features / 2, 32, 2], the weight, with zeros for the outputs that the last panel lacks.
        panel_bias: float32 [out_features] or None.
    """

    def __init__(self, function: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight)
        self._function = function
        panels = -(-self.out_features // _OUTPUTS)
        padded = weight.new_zeros(panels * _OUTPUTS, self.in_features)
        padded[: self.out_features] = weight
        self.panels = padded.view(panels, _OUTPUTS, self.in_features // 2, 2).transpose(1, 2).contiguous()
        self.panel_bias = None if bias is None else bias.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], bfloat16.

        Raises:
            ValueError: x is of another type or size.
        """
        if x.dtype != torch.bfloat16 or x.shape[-1] != self.in_features:
            raise ValueError(f"a linear layer of {self.in_features} bfloat16 inputs got {list(x.shape)}, {x.dtype}")
        x = x.contiguous()
        rows = x.numel() // self.in_features
        out = x.new_empty(*x.shape[:-1], self.out_features)
        scratch = x.new_empty(rows * self.in_features)
        bias = None if self.panel_bias is None else self.panel_bias.data_ptr()
        self._function(
            *(x.data_ptr(), self.panels.data_ptr(), bias, out.data_ptr(), scratch.data_ptr()),
            *(rows, self.in_features, self.out_features),
        )
        return out


@functools.cache
def _function() -> Any:
    """The kernel; None where it cannot be had, or oneDNN is faster."""
    if not multiplies_pairs():
        return None
    try:
        function = library(Path(__file__).with_name("linear.c")).linear_bfloat16
    except NoCompiler:
        return None
    function.argtypes = [*[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 3]
    function.restype = None
    return function


def panel_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> PanelLinear | None:
    """The layer; None if this machine or this weight needs another one."""
    fits = weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0
    function = _function() if fits else None
    return None if function is None else PanelLinear(function, weight, bias)
