"""A decoder layer in two calls: up to and with attention, and the rest."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from baton.engine.attention import Call
from baton.engine.kernels.build import NoCompiler, library
from baton.engine.kernels.flash import FlashArguments
from baton.engine.kernels.linear import PanelLinear
from baton.engine.kernels.norm import RmsNorm
from baton.engine.kernels.panels import multiplies_pairs
from baton.engine.layout import LayerSpec


class _Norm(ctypes.Structure):
    """`Norm` of block.c."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("offset", ctypes.c_float),
        ("rounds", ctypes.c_int64),
    )

    @classmethod
    def of(cls, norm: RmsNorm | None) -> _Norm:
        return cls() if norm is None else cls(norm.weight.data_ptr(), norm.eps, norm.offset, norm.rounds)


class _Weight(ctypes.Structure):
    """`Weight` of block.c."""

    _fields_ = (("panels", ctypes.c_void_p), ("bias", ctypes.c_void_p))

    @classmethod
    def of(cls, panels: torch.Tensor, bias: torch.Tensor | None) -> _Weight:
        return cls(panels.data_ptr(), None if bias is None else bias.data_ptr())


class _Block(ctypes.Structure):
    """`Block` of block.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "dim", "inner")),
        *((name, _Norm) for name in ("before", "between", "query", "key")),
        *((name, _Weight) for name in ("qkv", "out", "gate_up", "down")),
    )


class _Rows(ctypes.Structure):
    """`Rows` of block.c."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "cosines", "sines", "result", "normed", "qkv", "attended", "sum")),
        *((name, ctypes.c_void_p) for name in ("gated", "scratch")),
    )


@dataclass(frozen=True, slots=True)
class Parts:
    """What a layer is made of. All in bfloat16.

    Attributes:
        heads: of queries.
        kv_heads: of keys and values.
        dim: of a head, even.
        before: norm before attention.
        between: norm after attention.
        query: norm of each query head; None: there is none.
        key: norm of each key head; None: there is none.
        qkv: queries, keys and values of all heads, one below the other.
        out: after attention.
        gate_up: gates, and below them what they let through: as many, a multiple of 16.
        down: after them.
        call: of the layer's attention.
    """

    heads: int
    kv_heads: int
    dim: int
    before: RmsNorm
    between: RmsNorm
    query: RmsNorm | None
    key: RmsNorm | None
    qkv: PanelLinear
    out: PanelLinear
    gate_up: PanelLinear
    down: PanelLinear
    call: Call


class Workspace:
    """Memory for what passes between the parts of a layer. Layers that run one after the other share one."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.bfloat16)

    def take(self, sizes: tuple[int, ...]) -> list[int]:
        """Addresses of so many elements each, bfloat16, at multiples of 64 bytes; valid until the next call."""
        starts, end = [], 0
        for size in sizes:
            starts.append(end)
            end += -(-size // 32) * 32
        if end > self._memory.numel():
            self._memory = torch.empty(end, dtype=torch.bfloat16)
        first = self._memory.data_ptr()
        return [first + 2 * start for start in starts]


class BlockKernel:
    """Computes one decoder layer.

    Args:
        library: block.c, compiled.
        parts: of the layer; the linear layers' weights are kept, those of `gate_up` in another order.
        workspace: nobody else's between `attend` and `feed`.
    """

    def __init__(self, library: ctypes.CDLL, parts: Parts, workspace: Workspace) -> None:
        self._attend, self._feed = _functions(library)
        self._workspace = workspace
        self._hidden, self._inner = parts.down.out_features, parts.down.in_features
        self._heads, self._kv_heads, self._dim = parts.heads, parts.kv_heads, parts.dim
        self._width = (parts.heads + 2 * parts.kv_heads) * parts.dim
        self._call = parts.call
        self._sinks = None if parts.call.sinks is None else parts.call.sinks.float().contiguous()
        gate_up = _interleaved(parts.gate_up)
        weights = [(layer.panels, layer.panel_bias) for layer in (parts.qkv, parts.out)]
        weights += [gate_up, (parts.down.panels, parts.down.panel_bias)]
        self._kept = weights, [parts.before, parts.between, parts.query, parts.key]
        self._block = _Block(
            *(self._hidden, self._heads, self._kv_heads, self._dim, self._inner),
            *(_Norm.of(norm) for norm in (parts.before, parts.between, parts.query, parts.key)),
            *(_Weight.of(*weight) for weight in weights),
        )
        self._pointer = ctypes.byref(self._block)
        self._rows = _Rows()

    def attend(
        self,
        x: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        segments: torch.Tensor,
        layer: LayerSpec,
    ) -> torch.Tensor:
        """The layer up to its attention, which `feed` goes on with.

        Args:
            x: [1, R, hidden], bfloat16, as are all; contiguous.
            cosines: [1, R, dim], by which the two halves of a head's elements turn; contiguous.
            sines: the same.
            keys: the pool's, [slots, slot_tokens, kv_heads, dim], contiguous; the new ones are written to their places.
            values: the same.
            segments: as `FlashKernel` has them.
            layer: what of a request a token sees.

        Returns:
            Where `feed` will put the layer's result: [1, R, hidden].

        Raises:
            RuntimeError: no memory.
        """
        count, width, dim = x.shape[1], self._width, self._dim
        heads = self._heads * dim
        longest = max(self._hidden, heads, self._inner)
        out = torch.empty_like(x)
        inner = self._workspace.take(
            tuple(count * size for size in (self._hidden, width, heads, self._hidden, self._inner, longest))
        )
        self._rows = _Rows(count, x.data_ptr(), cosines.data_ptr(), sines.data_ptr(), out.data_ptr(), *inner)
        arguments = FlashArguments(
            *(count, len(segments), self._heads, self._kv_heads, dim, dim),
            *(keys.shape[1], layer.window, layer.chunk, width, dim, width, dim, width, dim),
            dim**-0.5 if self._call.scaling is None else self._call.scaling,
            self._call.softcap or 0.0,
        )
        sinks = None if self._sinks is None else self._sinks.data_ptr()
        pool = keys.data_ptr(), values.data_ptr()
        rows, call = ctypes.byref(self._rows), ctypes.byref(arguments)
        if self._attend(self._pointer, rows, call, *pool, sinks, segments.data_ptr()):
            raise RuntimeError("no memory for the scores of a step")
        return out

    def feed(self) -> None:
        """The rest of the layer, into what `attend` returned. What `attend` was given must be there still."""
        self._feed(self._pointer, ctypes.byref(self._rows))


def _functions(library: ctypes.CDLL) -> tuple[Any, Any]:
    attend, feed = library.block_attend, library.block_feed
    attend.argtypes = [*[ctypes.c_void_p] * 2, ctypes.POINTER(FlashArguments), *[ctypes.c_void_p] * 4]
    attend.restype = ctypes.c_int
    feed.argtypes = [ctypes.c_void_p] * 2
    feed.restype = None
    return attend, feed


def _interleaved(layer: PanelLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Panels of 16 outputs of the layer's first half and the 16 of its second half that belong to them; biases."""
    panels, pairs = layer.panels.shape[:2]
    sixteens = layer.panels.view(panels, pairs, 2, 16, 2).transpose(1, 2).reshape(2, panels, pairs, 16, 2)
    mixed = sixteens.transpose(0, 1).transpose(1, 2)  # [panels, pairs, 2, 16, 2]
    bias = layer.panel_bias
    if bias is not None:
        bias = bias.view(2, panels, 16).transpose(0, 1).contiguous()
    return mixed.reshape(panels, pairs, 32, 2), bias


@functools.cache
def block_library() -> ctypes.CDLL | None:
    """block.c, compiled; None where it cannot be had, or other libraries are faster."""
    if not multiplies_pairs():
        return None
    try:
        return library(Path(__file__).with_name("block.c"))
    except NoCompiler:
        return None
