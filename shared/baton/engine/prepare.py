"""Make a loaded model fast on a CPU: linear layers fused, packed and, if asked for, quantized; norms compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from baton.engine.blocks import replace_blocks
from baton.engine.calibrate import Calibration
from baton.engine.config import EngineConfig, Quantization
from baton.engine.fuse import FusedLinear, Share, siblings
from baton.engine.kernels.linear import panel_linear
from baton.engine.kernels.norm import replace_norms
from baton.engine.linear import Int8Linear, Linear, PackedLinear, SwitchedLinear


@torch.inference_mode()
def prepare(model: nn.Module, config: EngineConfig, forward: Callable[[], object]) -> None:
    """Replace the model's linear layers, in place.

    Args:
        model: on CPU.
        config: quantization, kernels, and the longest step.
        forward: runs the model once on a few tokens.
    """
    calibration = Calibration.open(config) if config.quantization is Quantization.INT8 else None
    grouped = siblings(model, forward)
    members = {name for group in grouped for name in group}
    alone = [[n] for n, m in model.named_modules() if type(m) is nn.Linear and n not in members]
    for names in [*grouped, *alone]:
        layers = [layer for name in names if isinstance(layer := model.get_submodule(name), nn.Linear)]
        if len({layer.weight.dtype for layer in layers}) > 1 or layers[0].weight.dtype not in _PACKED:
            continue
        linear = _linear(_weight(layers), _bias(layers), calibration, config)
        if len(layers) == 1:
            model.set_submodule(names[0], linear)
            continue
        fused = FusedLinear(linear, [layer.out_features for layer in layers])
        for index, (name, layer) in enumerate(zip(names, layers, strict=True)):
            model.set_submodule(name, Share(fused, index, layer))
    if config.kernels:
        replace_norms(model)
        replace_blocks(model, forward)
    if calibration is not None:
        calibration.save()


_PACKED = (torch.float32, torch.bfloat16)


def _linear(
    weight: torch.Tensor, bias: torch.Tensor | None, calibration: Calibration | None, config: EngineConfig
) -> Linear:
    packed = (panel_linear(weight, bias) if config.kernels else None) or PackedLinear(weight, bias)
    if calibration is None:
        return packed
    int8 = Int8Linear(weight, bias)
    rows = calibration.rows(int8, packed)
    if rows >= config.step_tokens:
        return int8
    return SwitchedLinear(int8, packed, rows) if rows else packed


def _weight(layers: list[nn.Linear]) -> torch.Tensor:
    weights = [layer.weight.detach() for layer in layers]
    return torch.cat(weights) if len(weights) > 1 else weights[0]


def _bias(layers: list[nn.Linear]) -> torch.Tensor | None:
    """The layers' biases, zeros where a layer has none; None if none has one."""
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat(
        [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers]
    )
