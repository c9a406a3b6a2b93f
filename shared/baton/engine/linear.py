"""Linear layers in the layouts that CPU kernels are fast on, in place of a model's `nn.Linear`.

`PackedLinear` computes what `nn.Linear` does, from weights reordered once for oneDNN: 2 to 4 times as fast at the row
counts of a step. `Int8Linear` holds int8 weights with a scale per output, and scales each row of its input to int8 by
its own largest value: products are sums of integers, so a row's result is bitwise the same in every batch.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

_INT8_MAX = 127
_INPUT_MAX = _INT8_MAX if torch.cpu._is_vnni_supported() else _INT8_MAX // 2
"""Largest value of a quantized input. Without VNNI fbgemm adds products in pairs of saturating int16: they must fit."""


class Linear(nn.Module):
    """Something that computes `x @ weight.T + bias`, [..., in_features] -> [..., out_features], of the input's type.

    Attributes:
        weight: of the shape and element type of the one it was made from, which is all that model code asks it for;
            its numbers are elsewhere, in the order of the kernel.
    """

    in_features: int
    out_features: int
    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = torch.empty_like(weight, device="meta")


class PackedLinear(Linear):
    """A linear layer whose weight lies in oneDNN's order.

    Args:
        weight: [out_features, in_features], float32 or bfloat16; not kept.
        bias: [out_features] or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight)
        # The layout chosen for 32 rows serves every number of rows, and gives the numbers that nn.Linear gives.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)
        self._bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out


class Int8Linear(Linear):
    """A linear layer with int8 weights, for inputs of few rows.

    The weight is rounded to 127 steps of its largest value in each output; an input row likewise, but to 63 on a CPU
    without VNNI. Relative error of an output is about 1 % for Gaussian data, 2 % without.

    Args:
        weight: [out_features, in_features], floating; not kept.
        bias: [out_features] or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight)
        values = weight.float()
        scales = values.abs().amax(1).clamp_min_(torch.finfo(torch.float32).tiny) / _INT8_MAX
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that quantized tensors moved to another package; the operators did not
            rounded = torch.quantize_per_channel(
                values, scales.double(), torch.zeros(self.out_features, dtype=torch.long), 0, torch.qint8
            )
            self._packed = torch.ops.quantized.linear_prepack(rounded, None)
        self._bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        values = x.float()
        peaks = values.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        out: torch.Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            # An unsigned byte in fbgemm, so zero lies in the middle.
            *(values / peaks, 1 / _INPUT_MAX, _INPUT_MAX + 1, self._packed)
        )
        out = out.mul_(peaks).to(x.dtype)
        return out if self._bias is None else out + self._bias


def int8_is_supported() -> bool:
    """Whether this build of torch has the operators of `Int8Linear` for this CPU: x86 has them, ARM has not."""
    try:
        Int8Linear(torch.ones(1, 1), None)(torch.ones(1, 1))
    except (AttributeError, RuntimeError):  # no such operator, or none for this engine's packed weights
        return False
    return True


class SwitchedLinear(Linear):
    """Int8 for steps of few rows, the weight as it is for longer ones.

    Args:
        few: used up to `rows` rows.
        many: used beyond.
    """

    def __init__(self, few: Linear, many: Linear, rows: int) -> None:
        super().__init__(many.weight)
        self._few, self._many, self._rows = few, many, rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        few = x.numel() <= self._rows * self.in_features
        out: torch.Tensor = self._few(x) if few else self._many(x)
        return out
