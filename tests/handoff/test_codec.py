"""int8: about half the bytes of bfloat16, with a bounded error; what it cannot hold goes raw."""

from __future__ import annotations

import numpy as np
import pytest

from baton.engine.layout import KvDtype, LayerSpec, PoolLayout
from baton.handoff import codec
from baton.handoff.encoding import deserialize, serialize
from baton.handoff.receiver import KvReceiver
from baton.handoff.sender import make_chunk
from baton.handoff.wire import Chunk, HandoffCorrupt, StreamDigest
from baton.internal.v1 import kv_pb2, prefill_pb2

TOKENS = 96
BOTH = (kv_pb2.KV_CODEC_INT8, kv_pb2.KV_CODEC_RAW)


def pool(dtype: KvDtype, scale: float = 1.0, seed: int = 0) -> tuple[PoolLayout, bytearray]:
    """A pool of values as attention sees them: most small, some heads and tokens large."""
    layers = (LayerSpec(key="0", heads=4, key_dim=128, value_dim=64),)
    layout = PoolLayout.build(layers, dtype, 2, TOKENS)
    memory = bytearray(layout.total_bytes)
    rng = np.random.default_rng(seed)
    for part in layout.array(memoryview(memory), 0, 1, 0, TOKENS):
        values = (rng.normal(0, scale, part.shape) * rng.lognormal(0, 2, (*part.shape[:2], 1))).astype(np.float32)
        part[...] = values if dtype is KvDtype.FLOAT32 else codec._bfloat16(values)
    return layout, memory


def moved(layout: PoolLayout, memory: bytearray, codecs: tuple[codec.Codec, ...] = BOTH) -> tuple[Chunk, bytearray]:
    """All of slot 1 over the wire into slot 0 of another pool."""
    chunk = deserialize(serialize(make_chunk(layout, memoryview(memory), 0, 1, 0, TOKENS, codecs[0])))
    assert isinstance(chunk, Chunk)
    target = bytearray(layout.total_bytes)
    receiver = KvReceiver(layout, memoryview(target), 0, 0, TOKENS, 0, codecs)
    receiver.accept(chunk)
    digest = StreamDigest()
    digest.add(chunk.header.checksum, chunk.size)
    receiver.verify(prefill_pb2.Done(chunks=1, bytes=digest.bytes, checksum=digest.value()))
    return chunk, target


def values(layout: PoolLayout, memory: bytearray, slot: int) -> list[np.ndarray]:
    return [codec._floats(part).astype(np.float64) for part in layout.array(memoryview(memory), 0, slot, 0, TOKENS)]


@pytest.mark.parametrize("dtype", list(KvDtype))
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_the_error_is_bounded(dtype: KvDtype, scale: float) -> None:
    layout, memory = pool(dtype, scale)
    chunk, target = moved(layout, memory)
    assert chunk.header.codec == kv_pb2.KV_CODEC_INT8
    for sent, came in zip(values(layout, memory, 1), values(layout, target, 0), strict=True):
        largest = np.abs(sent).max(axis=-1, keepdims=True)
        step = largest / 127 * (1 + 2**-7)  # a scale is a bfloat16, rounded up
        rounding = 0 if dtype is KvDtype.FLOAT32 else np.abs(came) * 2**-8
        assert (np.abs(sent - came) <= step / 2 * (1 + 1e-6) + rounding).all()
        assert np.abs(sent - came).sum() / np.abs(sent).sum() < 0.02


def test_half_the_bytes_of_bfloat16() -> None:
    layout, memory = pool(KvDtype.BFLOAT16)
    chunk, _ = moved(layout, memory)
    raw = sum(layout.token_bytes(0)) * TOKENS
    assert chunk.size / raw == (128 + 64 + 4) / (2 * (128 + 64))
    assert chunk.size / raw < 0.52


def test_raw_is_bit_exact() -> None:
    layout, memory = pool(KvDtype.BFLOAT16)
    _, target = moved(layout, memory, (kv_pb2.KV_CODEC_RAW,))
    for sent, came in zip(
        layout.rows(memoryview(memory), 0, 1, 0, TOKENS), layout.rows(memoryview(target), 0, 0, 0, TOKENS), strict=True
    ):
        assert bytes(sent) == bytes(came)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_goes_raw(value: float) -> None:
    layout, memory = pool(KvDtype.FLOAT32)
    layout.array(memoryview(memory), 0, 1, 0, TOKENS)[1][5, 2, 3] = value
    chunk, target = moved(layout, memory)
    assert chunk.header.codec == kv_pb2.KV_CODEC_RAW
    assert layout.array(memoryview(target), 0, 0, 0, TOKENS)[1][5, 2, 3] == pytest.approx(value, nan_ok=True)


def test_zeros_and_the_smallest_numbers_survive() -> None:
    layout, memory = pool(KvDtype.FLOAT32, scale=0.0)
    part = layout.array(memoryview(memory), 0, 1, 0, TOKENS)[0]
    part[3] = 1e-44
    _, target = moved(layout, memory)
    came = values(layout, target, 0)
    assert np.isfinite(came[0]).all()
    assert (np.abs(came[0]) <= 1e-43).all()


def test_int8_that_was_not_asked_for_is_refused() -> None:
    layout, memory = pool(KvDtype.FLOAT32)
    chunk = make_chunk(layout, memoryview(memory), 0, 1, 0, TOKENS, kv_pb2.KV_CODEC_INT8)
    receiver = KvReceiver(layout, memoryview(bytearray(layout.total_bytes)), 0, 0, TOKENS, 0)
    with pytest.raises(HandoffCorrupt, match="not offered"):
        receiver.accept(chunk)


def test_credit_covers_a_coded_handoff() -> None:
    """Coded KV needs less credit than was reckoned with: the sender is granted what is left, and never waits."""
    layout, memory = pool(KvDtype.FLOAT32)
    chunks = [
        make_chunk(layout, memoryview(memory), 0, 1, at, at + 8, kv_pb2.KV_CODEC_INT8) for at in range(0, TOKENS, 8)
    ]
    credit = first_credit = 2 * sum(layout.token_bytes(0)) * 8
    receiver = KvReceiver(layout, memoryview(bytearray(layout.total_bytes)), 0, 0, TOKENS, first_credit, BOTH)
    for chunk in chunks:
        left = receiver.total_bytes - sum(layout.token_bytes(0)) * chunk.header.start
        assert credit >= min(left, sum(layout.token_bytes(0)) * 8)
        credit += receiver.accept(chunk) - chunk.size
        assert credit <= first_credit
    assert receiver.all_granted
    assert receiver.whole
