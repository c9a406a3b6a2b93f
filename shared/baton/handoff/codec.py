"""How KV elements become a chunk's data and back: raw, or a signed byte an element. numpy; bfloat16 is uint16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from baton.engine.layout import KvDtype, PoolLayout
from baton.internal.v1 import kv_pb2

Codec: TypeAlias = kv_pb2.KvCodec.ValueType
Floats = npt.NDArray[np.float32]

_LEVELS = 127


def data_size(codec: Codec, layout: PoolLayout, layer: int, tokens: int) -> int:
    """Bytes of so many tokens of a layer in this codec."""
    if codec == kv_pb2.KV_CODEC_INT8:
        spec = layout.layers[layer]
        return tokens * spec.heads * (spec.key_dim + spec.value_dim + 2 * 2)
    return tokens * sum(layout.token_bytes(layer))


def encode_int8(
    layout: PoolLayout, memory: memoryview, layer: int, slot: int, start: int, stop: int
) -> Sequence[bytes] | None:
    """Tokens [start, stop) as int8 data, in parts; None: they hold what has no finite scale and must go raw.

    A scale is the largest magnitude of a token's head over 127, rounded up to a bfloat16, so that every byte fits. The
    error of an element is half its scale at most, besides the rounding to the pool's own element type.
    """
    bytes_of, scales_of = [], []
    for part in layout.array(memory, layer, slot, start, stop):
        values = _floats(part)
        largest = np.abs(values).max(axis=-1)
        if not np.isfinite(largest).all():
            return None
        scale_bits = _round_up(largest / _LEVELS)
        scales = _floats(scale_bits)
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = np.where(scales > 0, 1 / scales, 0)
        if not np.isfinite(inverse).all():  # smaller than any number whose inverse is one
            return None
        bytes_of.append(np.rint(values * inverse[..., None]).astype(np.int8).tobytes())
        scales_of.append(scale_bits.tobytes())
    return [*bytes_of, *scales_of]


def decode_int8(
    layout: PoolLayout, memory: memoryview, layer: int, slot: int, start: int, stop: int, data: memoryview
) -> None:
    """Write int8 data, of the right size, to tokens [start, stop)."""
    targets = layout.array(memory, layer, slot, start, stop)
    shapes = [target.shape for target in targets]
    counts = [target.size for target in targets]
    scale_at = sum(counts)
    at = 0
    for target, shape, count in zip(targets, shapes, counts, strict=True):
        heads = shape[0] * shape[1]
        quantized = np.frombuffer(data, np.int8, count, at).reshape(shape)
        scales = _floats(np.frombuffer(data, np.uint16, heads, scale_at).reshape(shape[:2]))
        values = quantized * scales[..., None]
        target[...] = values if layout.dtype is KvDtype.FLOAT32 else _bfloat16(values)
        at += count
        scale_at += heads * 2


def _floats(part: npt.NDArray[np.float32] | npt.NDArray[np.uint16]) -> Floats:
    """float32 values of float32, or of bfloat16's bits."""
    if part.dtype == np.uint16:
        return (part.astype(np.uint32) << 16).view(np.float32)
    return part.astype(np.float32, copy=False)


def _bfloat16(values: Floats) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even. Finite values only."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _round_up(values: Floats) -> npt.NDArray[np.uint16]:
    """Bits of the smallest bfloat16 that is not below a finite value of at least 0."""
    return ((values.view(np.uint32) + 0xFFFF) >> 16).astype(np.uint16)
