"""Attention as the model's code calls it: the one function registered with transformers, and its arithmetic.

No mask function is registered beside it, so transformers builds no mask and hands over packed tokens of many requests
as `[1, heads, tokens, dim]`; who may see what is ours to say. The calls of one forward come in a fixed order, and the
i-th is layer i of the KV layout: a model may call twice in one layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from baton.engine.errors import EngineError

NAME = "baton"

# Arguments of the attention interface that change the result in ways not built here. None and False mean "not used".
_UNKNOWN = ("position_bias", "alibi", "head_mask", "relative_position")


@dataclass(frozen=True, slots=True)
class Call:
    """What is particular to one call besides its tensors.

    Attributes:
        scaling: factor on the scores; None: 1 / sqrt(key_dim).
        softcap: scores are capped to (-softcap, softcap) by tanh; None: they are not.
        sinks: [heads], a learned logit per head that takes part in the softmax and has no value; None: there is none.
        window: tokens a query sees at most, its own included, as the model passes it; None: all.
        layer_index: the module's own number; -1 if it has none.
    """

    scaling: float | None
    softcap: float | None
    sinks: torch.Tensor | None
    window: int | None
    layer_index: int


_AMX = torch.cpu._is_amx_tile_supported()


class Attend(Protocol):
    """Serves the attention calls of one forward."""

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call) -> torch.Tensor:
        """query [1, Hq, T, Dk], key [1, Hkv, T, Dk], value [1, Hkv, T, Dv] -> [1, T, Hq, Dv]."""


_active: Attend | None = None


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Serve the attention calls of the forward inside the block. One at a time per process."""
    global _active
    _active = attend
    try:
        yield
    finally:
        _active = None


def active() -> Attend | None:
    """What serves the forward that runs now."""
    return _active


def _forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    if _active is None:
        raise EngineError("attention called outside a step")
    if attention_mask is not None:
        raise EngineError("the model builds its own attention mask")
    for name in _UNKNOWN:
        if arguments.get(name) is not None:
            raise EngineError(f"attention argument {name}")
    index = getattr(module, "layer_idx", None)
    call = Call(scaling, softcap, s_aux, sliding_window, -1 if index is None else index)
    return _active(query, key, value, call), None


AttentionInterface.register(NAME, _forward)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: Call,
    mask: torch.Tensor | None,
    *,
    causal: bool = False,
) -> torch.Tensor:
    """Attention of N requests at once, without repeating or copying keys and values.

    Args:
        query: [N, Hq, T, Dk].
        key: [N, Hkv, S, Dk].
        value: [N, Hkv, S, Dv].
        call: scaling, soft cap, sinks.
        mask: float, 0 or -inf, broadcastable to [N, 1, T, S]; None: everything is seen.
        causal: T == S, and token t sees tokens up to t. Not together with a mask.

    Returns:
        [N, Hq, T, Dv].
    """
    n, heads, tokens, _ = query.shape
    groups = heads // key.shape[1]
    if call.softcap is not None or call.sinks is not None:
        return _explicit(query, key, value, call, causal_mask(tokens, query.dtype) if causal else mask)
    if tokens == 1 and groups > 1 and (query.dtype == torch.float32 or not _AMX):
        # One query token: the heads of a group become the query's rows. 4 times as fast as enable_gqa, except in
        # bfloat16 with AMX, where it takes twice as long.
        packed = query.view(n, key.shape[1], groups, -1)
        out = scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=call.scaling)
        return out.reshape(n, heads, 1, -1)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=call.scaling, enable_gqa=groups > 1
    )


def causal_mask(tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """[tokens, tokens], 0 where token t may look and -inf elsewhere."""
    return torch.full((tokens, tokens), -torch.inf, dtype=dtype).triu_(1)


def _explicit(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call, mask: torch.Tensor | None
) -> torch.Tensor:
    """The same in plain steps: SDPA knows neither soft caps nor sinks."""
    n, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    scaling = dim**-0.5 if call.scaling is None else call.scaling
    # The group's heads join the rows, so that one product per KV head serves all of them.
    rows = query.reshape(n, kv_heads, -1, dim)
    scores = (rows @ key.transpose(-1, -2)).view(n, heads, tokens, -1) * scaling
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if mask is not None:
        scores = scores + mask
    if call.sinks is not None:
        sinks = call.sinks.to(scores.dtype).view(1, heads, 1, 1).expand(n, heads, tokens, 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    if call.sinks is not None:
        weights = weights[..., :-1]
    out = weights.reshape(n, kv_heads, -1, weights.shape[-1]) @ value
    return out.view(n, heads, tokens, -1)
