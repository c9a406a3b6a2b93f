"""Decoder layers as one kernel: those of a model that have Llama's parts, and whose results the kernel reproduces."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from baton.engine.attention import Call, active, attending
from baton.engine.errors import EngineError
from baton.engine.fuse import Share
from baton.engine.kernels.block import BlockKernel, Parts, Workspace, block_library
from baton.engine.kernels.flash import FlashKernel, flash_kernel
from baton.engine.kernels.linear import PanelLinear
from baton.engine.kernels.norm import RmsNorm
from baton.engine.layout import LayerSpec

_TOKENS = 24
"""Of a trial."""

_KNOWN = {"hidden_states", "attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings"}
"""Arguments of a layer whose meaning is known here."""


Serve = Callable[[BlockKernel, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`block` of what serves a forward: kernel, x [1, T, hidden], cosines and sines [1, T, dim] -> [1, T, hidden]."""


class Block(nn.Module):
    """A decoder layer in place of the model's own.

    Args:
        kernel: which computes it.
        original: whose attributes the model's code may ask for.
    """

    def __init__(self, kernel: BlockKernel, original: nn.Module) -> None:
        super().__init__()
        self._kernel = kernel
        for name in ("attention_type", "layer_type"):
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))

    def forward(
        self, hidden_states: torch.Tensor, *, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> torch.Tensor:
        """[1, T, hidden] -> [1, T, hidden].

        Raises:
            EngineError: outside a step, or in one that cannot serve it.
        """
        serve: Serve | None = getattr(active(), "block", None)
        if serve is None:
            raise EngineError("a layer called outside a step")
        cosines, sines = position_embeddings
        return serve(self._kernel, hidden_states.contiguous(), cosines.contiguous(), sines.contiguous())


@torch.inference_mode()
def replace_blocks(model: nn.Module, forward: Callable[[], object]) -> None:
    """Put the kernel in place of every layer that it can compute; the others stay as they are.

    Args:
        model: its linear layers and norms are prepared.
        forward: runs it once on a few tokens.
    """
    compiled, flash = block_library(), flash_kernel()
    if compiled is None or flash is None:
        return
    names = {m: name for name, m in model.named_modules() if hasattr(m, "self_attn") and hasattr(m, "mlp")}
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[names[module]] = args, kwargs

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in names]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    names.clear()  # so that a layer's weights are given back when it is replaced
    workspace = Workspace()
    for name, (args, kwargs) in calls.items():
        if len(args) == 1 and _understood(kwargs):
            block = _block(model.get_submodule(name), kwargs, compiled, flash, workspace)
            if block is not None:
                model.set_submodule(name, block)


def _understood(kwargs: dict[str, Any]) -> bool:
    unknown = [name for name, value in kwargs.items() if value is not None and value is not False]
    return set(unknown) <= _KNOWN and kwargs.get("attention_mask") is None


def _block(
    layer: nn.Module, kwargs: dict[str, Any], compiled: ctypes.CDLL, flash: FlashKernel, workspace: Workspace
) -> Block | None:
    """The layer's replacement; None if it has other parts, or computes something else from them."""
    match kwargs.get("position_embeddings"):
        case (torch.Tensor() as turn, torch.Tensor()) if turn.dtype == torch.bfloat16 and turn.dim() == 3:
            trial = _Trial(flash, dim=turn.shape[2])
        case _:
            return None
    if (parts := _parts(layer, trial.dim, Call(None, None, None, None, -1))) is None:
        return None
    trial.make_pool(parts.kv_heads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _TOKENS, parts.qkv.in_features, generator=generator).bfloat16()
    angles = torch.rand(1, _TOKENS, trial.dim // 2, generator=generator) * 6.28
    cosines, sines = (torch.cat((t, t), -1).bfloat16() for t in (angles.cos(), angles.sin()))
    # Far positions, too: some models scale what is far.
    positions = (torch.arange(_TOKENS) ** 4).view(1, -1)
    given = {**kwargs, "position_embeddings": (cosines, sines), "position_ids": positions}
    with attending(trial):
        expected = layer(x, **given)
    if trial.call is None or not isinstance(expected, torch.Tensor):
        return None
    parts = _parts(layer, trial.dim, trial.call)
    assert parts is not None
    block = Block(BlockKernel(compiled, parts, workspace), layer)
    with attending(trial):
        got = block(x, position_embeddings=(cosines, sines))
    return block if _same(expected.float(), got.float()) else None


def _same(expected: torch.Tensor, got: torch.Tensor) -> bool:
    """Equal but for single roundings: those of an activation, or of a sum in another order, move others after them."""
    near = (expected - got).abs() <= 2**-6 * expected.abs() + 2**-7 * expected.abs().mean()
    return bool(near.all()) and bool((expected != got).float().mean() < 0.1)


class _Trial:
    """Serves one layer's attention, by itself or within a block, over a pool of its own.

    Attributes:
        dim: of a head.
        call: what the layer's own code asked for; None: it did not call, or more than once.
    """

    def __init__(self, flash: FlashKernel, dim: int) -> None:
        self.dim = dim
        self.call: Call | None = None
        self._flash = flash
        self._calls = 0
        self._segments = torch.tensor([[0, 0, _TOKENS, 0]])
        self._pool: tuple[torch.Tensor, torch.Tensor]
        self._kv_heads = 0

    def make_pool(self, kv_heads: int) -> None:
        """Before anything is served."""
        self._kv_heads = kv_heads
        keys, values = torch.zeros(2, 1, _TOKENS, kv_heads, self.dim, dtype=torch.bfloat16)
        self._pool = keys, values

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call) -> torch.Tensor:
        """The layer's own code."""
        self._calls += 1
        self.call = call if self._calls == 1 and key.shape[1] == self._kv_heads else None
        return self._flash(query, key, value, *self._pool, self._segments, self._layer(call), call)

    def block(self, kernel: BlockKernel, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """Its replacement."""
        assert self.call is not None
        out = kernel.attend(x, cosines, sines, *self._pool, self._segments, self._layer(self.call))
        kernel.feed()
        return out

    def _layer(self, call: Call) -> LayerSpec:
        dim, window = self.dim, call.window or 0
        return LayerSpec(key="0", heads=self._kv_heads, key_dim=dim, value_dim=dim, window=window)


@dataclass(frozen=True, slots=True)
class _Names:
    """Of a layer's parts, in the models that share Llama's."""

    before: str = "input_layernorm"
    between: str = "post_attention_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    query: str = "self_attn.q_norm"
    key: str = "self_attn.k_norm"


_NAMES = _Names()


def _parts(layer: nn.Module, dim: int, call: Call) -> Parts | None:
    """A layer's parts; None: some are missing or of another kind."""
    modules = dict(layer.named_modules())
    norms = [modules.get(name) for name in (_NAMES.before, _NAMES.between, _NAMES.query, _NAMES.key)]
    qkv, gate_up = (_fused([modules.get(name) for name in names]) for names in (_NAMES.qkv, _NAMES.gate_up))
    out, down = modules.get(_NAMES.out), modules.get(_NAMES.down)
    if qkv is None or gate_up is None or not isinstance(out, PanelLinear) or not isinstance(down, PanelLinear):
        return None
    before, between, query, key = (norm if isinstance(norm, RmsNorm) else None for norm in norms)
    if before is None or between is None or [query, key] != norms[2:]:
        return None
    (qkv_linear, sizes), (gate_up_linear, halves) = qkv, gate_up
    fits = sizes[1] == sizes[2] and not any(size % dim for size in sizes) and not dim % 2
    fits = fits and len(set(halves)) == 1 and not halves[0] % 16 and sizes[0] == out.in_features
    fits = fits and all(norm is None or len(norm.weight) == dim for norm in (query, key))
    if not fits:
        return None
    return Parts(
        *(sizes[0] // dim, sizes[1] // dim, dim, before, between, query, key),
        *(qkv_linear, out, gate_up_linear, down, call),
    )


def _fused(shares: list[nn.Module | None]) -> tuple[PanelLinear, list[int]] | None:
    """The one linear layer that some are shares of, in this order, and their sizes."""
    found = [share for share in shares if isinstance(share, Share)]
    if len(found) < len(shares) or len({share.fused for share in found}) > 1:
        return None
    fused = found[0].fused
    if not isinstance(fused.linear, PanelLinear) or [s.index for s in found] != list(range(len(fused.sizes))):
        return None
    return fused.linear, fused.sizes
