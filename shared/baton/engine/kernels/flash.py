"""The attention kernel for bfloat16: one call a layer for prompts' chunks and single tokens alike."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from baton.engine.attention import Call
from baton.engine.errors import EngineError
from baton.engine.kernels.build import NoCompiler, library
from baton.engine.kernels.panels import multiplies_pairs
from baton.engine.layout import LayerSpec


class FlashArguments(ctypes.Structure):
    """`Call` of flash.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "segments", "heads", "kv_heads", "key_dim", "value_dim")),
        *((name, ctypes.c_int64) for name in ("slot_tokens", "window", "chunk", "query_row", "query_head")),
        *((name, ctypes.c_int64) for name in ("new_key_row", "new_key_head", "new_value_row", "new_value_head")),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
    )


class FlashKernel:
    """Writes new keys and values into the pool and attends from there.

    A row's result is bitwise the same however its prompt was cut into chunks and whatever else is in the step.

    Raises:
        NoCompiler: it cannot be had on this machine.
    """

    def __init__(self) -> None:
        self._function = library(Path(__file__).with_name("flash.c")).attend_bfloat16
        self._function.argtypes = [ctypes.POINTER(FlashArguments), *[ctypes.c_void_p] * 8]
        self._function.restype = ctypes.c_int

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        segments: torch.Tensor,
        layer: LayerSpec,
        call: Call,
    ) -> torch.Tensor:
        """Serve one attention call of a step.

        Args:
            query: [1, Hq, R, Dk], bfloat16, as are all.
            key: [1, Hkv, R, Dk], of the same tokens.
            value: [1, Hkv, R, Dv].
            keys: the pool's, [slots, slot_tokens, Hkv, Dk], contiguous; the new ones are written to their places.
            values: [slots, slot_tokens, Hkv, Dv].
            segments: int64 [requests, 4]: slot, first row, rows, position of that row's token. They cover all rows.
            layer: what of a request a token sees.
            call: scaling, soft cap, sinks.

        Returns:
            [1, R, Hq, Dv].

        Raises:
            RuntimeError: no memory.
            EngineError: the model computes in another element type than the pool holds.
        """
        if {t.dtype for t in (query, key, value)} != {torch.bfloat16}:
            raise EngineError(f"attention in {query.dtype} over a pool of {keys.dtype}")
        query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
        sinks = None if call.sinks is None else call.sinks.float().contiguous()
        _, heads, rows, key_dim = query.shape
        out = query.new_empty(1, rows, heads, value.shape[3])
        arguments = FlashArguments(
            *(rows, len(segments), heads, key.shape[1], key_dim, value.shape[3]),
            *(keys.shape[1], layer.window, layer.chunk, query.stride(2), query.stride(1)),
            *(key.stride(2), key.stride(1), value.stride(2), value.stride(1)),
            key_dim**-0.5 if call.scaling is None else call.scaling,
            call.softcap or 0.0,
        )
        if self._function(
            ctypes.byref(arguments),
            *(tensor.data_ptr() for tensor in (query, keys, values, key, value)),
            None if sinks is None else sinks.data_ptr(),
            *(out.data_ptr(), segments.data_ptr()),
        ):
            raise RuntimeError("no memory for the scores of a step")
        return out


@functools.cache
def flash_kernel() -> FlashKernel | None:
    """The kernel; None where it cannot be had, or torch's own is faster."""
    if not multiplies_pairs():
        return None
    try:
        return FlashKernel()
    except NoCompiler:
        return None
