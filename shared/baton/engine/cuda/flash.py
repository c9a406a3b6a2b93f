"""Attention by kernels that read pages where they lie: the flash-attn package, and torch's own build of it.

Both want 16-bit elements, equal sizes of keys and values up to 256, and pages of a multiple of 256 tokens.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from baton.engine.attention import Call
from baton.engine.cuda.inputs import Rows
from baton.engine.layout import LayerSpec

PAGE_SIZE = 256
_LARGEST_HEAD = 256


def _fits(layer: LayerSpec, call: Call, dtype: torch.dtype) -> bool:
    return (
        dtype in (torch.bfloat16, torch.float16)
        and layer.key_dim == layer.value_dim <= _LARGEST_HEAD
        and layer.key_dim % 8 == 0
        and not layer.chunk
        and call.sinks is None
    )


def _window(layer: LayerSpec) -> tuple[int, int]:
    """Keys to the left and to the right that are seen besides a token's own; -1: all."""
    return (layer.window - 1 if layer.window else -1, 0)


class FlashAttention:
    """By the flash-attn package, version 2.

    Args:
        kernels: its module; given in tests.

    Raises:
        ImportError: it is not installed, or not for this torch.
    """

    name = "flash_attn"
    page_size = PAGE_SIZE

    def __init__(self, kernels: Any = None) -> None:
        kernels = kernels if kernels is not None else importlib.import_module("flash_attn")
        self._varlen: Callable[..., torch.Tensor] = kernels.flash_attn_varlen_func
        self._with_cache: Callable[..., torch.Tensor] = kernels.flash_attn_with_kvcache

    def supports(self, layer: LayerSpec, call: Call, dtype: torch.dtype) -> bool:
        """All but sinks, chunks, and sizes and types without a kernel."""
        return _fits(layer, call, dtype)

    def decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: Rows, layer: LayerSpec, call: Call
    ) -> torch.Tensor:
        """One row per request: see `Attention`."""
        out = self._with_cache(
            query.unsqueeze(1),
            keys,
            values,
            cache_seqlens=rows.lengths,
            block_table=rows.tables,
            softmax_scale=call.scaling,
            causal=True,
            window_size=_window(layer),
            softcap=call.softcap or 0.0,
        )
        return out.squeeze(1)

    def prefill(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: Rows, layer: LayerSpec, call: Call
    ) -> torch.Tensor:
        """Any number of rows per request: see `Attention`."""
        return self._varlen(
            query.contiguous(),
            keys,
            values,
            cu_seqlens_q=rows.query_starts,
            cu_seqlens_k=rows.key_starts,
            max_seqlen_q=rows.longest_query,
            max_seqlen_k=rows.longest_key,
            softmax_scale=call.scaling,
            causal=True,
            window_size=_window(layer),
            softcap=call.softcap or 0.0,
            block_table=rows.tables,
        )


class VarlenAttention:
    """By `torch.nn.attention.varlen.varlen_attn`, where it takes block tables.

    Args:
        kernel: the function; given in tests.
        key_starts: whether it is told where keys would start if they were packed, which block tables make pointless:
            some builds refuse to do without, others to do with.

    Raises:
        ImportError: this torch has none, or one without block tables.
    """

    name = "varlen_attn"
    page_size = PAGE_SIZE

    def __init__(self, kernel: Callable[..., Any] | None = None, *, key_starts: bool = False) -> None:
        if kernel is None:
            kernel = getattr(importlib.import_module("torch.nn.attention.varlen"), "varlen_attn", None)
        wanted = {"block_table", "seqused_k", "enable_gqa", "window_size", "scale"}
        if kernel is None or not wanted <= inspect.signature(kernel).parameters.keys():
            raise ImportError("this torch has no varlen_attn with block tables")
        self._kernel = kernel
        self._key_starts = key_starts

    def supports(self, layer: LayerSpec, call: Call, dtype: torch.dtype) -> bool:
        """All but soft caps, sinks, chunks, and sizes and types without a kernel."""
        return _fits(layer, call, dtype) and call.softcap is None

    def decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: Rows, layer: LayerSpec, call: Call
    ) -> torch.Tensor:
        """One row per request: see `Attention`."""
        return self.prefill(query, keys, values, rows, layer, call)

    def prefill(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: Rows, layer: LayerSpec, call: Call
    ) -> torch.Tensor:
        """Any number of rows per request: see `Attention`."""
        out: torch.Tensor = self._kernel(
            query.contiguous(),
            keys,
            values,
            rows.query_starts,
            rows.key_starts if self._key_starts else None,
            rows.longest_query,
            rows.longest_key,
            scale=call.scaling,
            window_size=_window(layer),
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=rows.lengths,
            block_table=rows.tables,
        )
        return out
