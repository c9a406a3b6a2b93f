"""The decode attention kernel: one call a layer for all requests that go on by one token."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from baton.engine.attention import Call
from baton.engine.errors import EngineError
from baton.engine.kernels.build import NoCompiler, library


class _Call(ctypes.Structure):
    """`Call` of attention.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "key_dim", "value_dim", "slot_tokens")),
        *((name, ctypes.c_int64) for name in ("query_row", "query_head")),
        *((name, ctypes.c_int64) for name in ("new_key_row", "new_key_head", "new_value_row", "new_value_head")),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
    )


class DecodeKernel:
    """Writes new keys and values into the pool and attends from there.

    Raises:
        NoCompiler: it cannot be had on this machine.
    """

    def __init__(self) -> None:
        compiled = library(Path(__file__).with_name("attention.c"))
        self._functions = {torch.float32: compiled.decode_float32, torch.bfloat16: compiled.decode_bfloat16}
        for function in self._functions.values():
            function.argtypes = [ctypes.POINTER(_Call), *[ctypes.c_void_p] * 10]
            function.restype = ctypes.c_int

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        places: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        call: Call,
    ) -> None:
        """Rows [0, R) of a step, one token each.

        Args:
            query: [1, Hq, >= R, Dk], float32 or bfloat16, as are all.
            key: [1, Hkv, >= R, Dk], of the same tokens.
            value: [1, Hkv, >= R, Dv].
            keys: the pool's, [slots, slot_tokens, Hkv, Dk], contiguous; row r's key is written to its last place.
            values: [slots, slot_tokens, Hkv, Dv].
            out: [1, >= R, Hq, Dv], contiguous; rows [0, R) are written.
            places: int64 [R] each: slot; first key that is seen; keys up to and with the token's own.
            call: scaling, soft cap, sinks.

        Raises:
            RuntimeError: no memory.
            EngineError: the model computes in another element type than the pool holds.
        """
        if {t.dtype for t in (query, key, value)} != {keys.dtype}:
            raise EngineError(f"attention in {query.dtype} over a pool of {keys.dtype}")
        slots, firsts, lengths = places
        query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
        sinks = None if call.sinks is None else call.sinks.float().contiguous()
        arguments = _Call(
            *(len(slots), query.shape[1], key.shape[1], query.shape[3], value.shape[3], keys.shape[1]),
            *(query.stride(2), query.stride(1)),
            *(key.stride(2), key.stride(1), value.stride(2), value.stride(1)),
            query.shape[3] ** -0.5 if call.scaling is None else call.scaling,
            call.softcap or 0.0,
        )
        tensors = (query, keys, values, key, value)
        if self._functions[query.dtype](
            ctypes.byref(arguments),
            *(tensor.data_ptr() for tensor in tensors),
            None if sinks is None else sinks.data_ptr(),
            *(tensor.data_ptr() for tensor in (out, slots, firsts, lengths)),
        ):
            raise RuntimeError("no memory for the scores of a step")


@functools.cache
def decode_kernel() -> DecodeKernel | None:
    """The kernel; None where there is no compiler, and torch's own attention has to do."""
    try:
        return DecodeKernel()
    except NoCompiler:
        return None
