"""Pool and layout mean the same bytes; what is wiped is zero and nothing else changes; memory comes back."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.layout import KvDtype, LayerSpec, PoolLayout
from baton.engine.pool import TORCH_DTYPES, Pool

BITS = {KvDtype.FLOAT32: torch.int32, KvDtype.BFLOAT16: torch.int16}

HEADS, DIMS = st.integers(1, 3), st.integers(1, 40)

KINDS = pytest.mark.parametrize("dtype", KvDtype)


@st.composite
def layouts(draw: st.DrawFn) -> PoolLayout:
    """Sizes that are hardly ever multiples of a page."""
    layers = tuple(
        LayerSpec(
            key=str(i),
            heads=draw(st.integers(1, 3)),
            key_dim=draw(st.integers(1, 40)),
            value_dim=draw(st.integers(1, 40)),
        )
        for i in range(draw(st.integers(1, 3)))
    )
    return PoolLayout.build(layers, draw(st.sampled_from(KvDtype)), draw(st.integers(1, 4)), draw(st.integers(1, 200)))


def fill(pool: Pool) -> np.ndarray:
    """Random bytes everywhere; returns a copy."""
    content = np.random.default_rng(0).integers(1, 256, pool.layout.total_bytes, dtype=np.uint8)
    pool.memory[:] = content.tobytes()
    return content


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), data=st.data())
def test_views_rows_and_arrays_are_the_same_memory(layout: PoolLayout, data: st.DataObject) -> None:
    pool = Pool(layout, budget_bytes=0)
    fill(pool)
    buffer = memoryview(pool.memory)
    layer = data.draw(st.integers(0, len(layout.layers) - 1))
    slot = data.draw(st.integers(0, layout.num_slots - 1))
    start = data.draw(st.integers(0, layout.slot_tokens))
    stop = data.draw(st.integers(start, layout.slot_tokens))
    rows = layout.rows(buffer, layer, slot, start, stop)
    arrays = layout.array(buffer, layer, slot, start, stop)
    for tensor, row, array in zip((pool.keys[layer], pool.values[layer]), rows, arrays, strict=True):
        bits = tensor[slot, start:stop].contiguous().view(BITS[layout.dtype]).numpy()
        assert bits.shape == array.shape
        assert bits.tobytes() == array.tobytes() == bytes(row)
    # And in the other direction: what is received as bytes is what attention reads.
    for tensor, row in zip((pool.keys[layer], pool.values[layer]), rows, strict=True):
        row[:] = bytes(range(1, 256)) * (len(row) // 255) + bytes(len(row) % 255)
        assert tensor[slot, start:stop].contiguous().view(BITS[layout.dtype]).numpy().tobytes() == bytes(row)


@settings(max_examples=60, deadline=None)
@given(layout=layouts())
def test_no_two_tokens_share_a_byte(layout: PoolLayout) -> None:
    pool = Pool(layout, budget_bytes=0)
    count = np.zeros(layout.total_bytes, dtype=np.uint8)
    buffer = memoryview(count)
    for layer in range(len(layout.layers)):
        for slot in range(layout.num_slots):
            for row in layout.rows(buffer, layer, slot, 0, layout.slot_tokens):
                part = np.frombuffer(row, np.uint8)
                assert not part.any()
                part += 1
    held = sum(t.numel() * t.element_size() for t in (*pool.keys, *pool.values))
    assert int(count.sum()) == held


def test_outside_the_pool_is_refused() -> None:
    layout = PoolLayout.build((LayerSpec(key="0", heads=1, key_dim=4, value_dim=4),), KvDtype.FLOAT32, 2, 8)
    buffer = memoryview(bytearray(layout.total_bytes))
    for place in ((1, 0, 0, 1), (-1, 0, 0, 1), (0, 2, 0, 1), (0, -1, 0, 1), (0, 0, 0, 9), (0, 0, -1, 1), (0, 0, 3, 2)):
        with pytest.raises(IndexError, match="outside the pool"):
            layout.rows(buffer, *place)


@settings(max_examples=80, deadline=None)
@given(layout=layouts(), data=st.data())
def test_wiping_zeroes_the_slot_and_nothing_else(layout: PoolLayout, data: st.DataObject) -> None:
    pool = Pool(layout, budget_bytes=layout.total_bytes)
    expected = fill(pool)
    slot = data.draw(st.integers(0, layout.num_slots - 1))
    tokens = data.draw(st.integers(0, layout.slot_tokens))
    for other in range(layout.num_slots):
        pool.touch(other, layout.slot_tokens if other != slot else tokens)
    pool.release(slot, clean=False)
    for layer in range(len(layout.layers)):
        for row in layout.rows(memoryview(expected.data), layer, slot, 0, tokens):
            row[:] = bytes(len(row))
    assert bytes(pool.memory[:]) == expected.tobytes()


@KINDS
def test_a_clean_slot_is_kept_within_the_budget(dtype: KvDtype) -> None:
    layout = PoolLayout.build((LayerSpec(key="0", heads=2, key_dim=8, value_dim=8),), dtype, 2, 64)
    pool = Pool(layout, budget_bytes=layout.total_bytes)
    before = fill(pool)
    pool.touch(0, 64)
    pool.release(0, clean=True)
    assert bytes(pool.memory[:]) == before.tobytes()


def occupied(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


@KINDS
@pytest.mark.parametrize("clean", [True, False])
def test_memory_over_the_budget_goes_back_to_the_system(dtype: KvDtype, clean: bool) -> None:
    layers = tuple(LayerSpec(key=str(i), heads=3, key_dim=33, value_dim=17) for i in range(2))
    layout = PoolLayout.build(layers, dtype, 4, 1000)
    per_slot = 1000 * 2 * 3 * (33 + 17) * dtype.itemsize
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    try:
        pool = Pool(layout, budget_bytes=2 * per_slot, memory_fd=fd)
        assert occupied(fd) == 0
        for slot in range(4):
            pool.touch(slot, 1000)
            for tensor in (*pool.keys, *pool.values):
                tensor[slot] = 1.0
        full = occupied(fd)
        assert full >= 4 * per_slot
        sizes = []
        for slot in range(4):
            pool.release(slot, clean=clean)
            sizes.append(occupied(fd))
        kept = 2 if clean else 0
        # Pages on the edge of two slots stay while one of them is held: at most two per layer and part and slot.
        slack = 4 * 4 * 2 * 4096
        assert kept * per_slot - slack <= sizes[-1] <= kept * per_slot + slack
        assert pool.touched_bytes == kept * per_slot
        # What went is zero, and can be written again.
        pool.keys[0][0] = 2.0
        assert bool((pool.keys[0][0] == 2.0).all())
        assert not bool(pool.keys[1][0].any())
    finally:
        os.close(fd)


@KINDS
def test_a_slot_counts_what_was_ever_written(dtype: KvDtype) -> None:
    layout = PoolLayout.build((LayerSpec(key="0", heads=1, key_dim=4, value_dim=4),), dtype, 2, 32)
    pool = Pool(layout, budget_bytes=layout.total_bytes)
    per_token = (4 + 4) * dtype.itemsize
    pool.touch(1, 20)
    pool.touch(1, 5)
    assert pool.touched_bytes == 20 * per_token
    pool.release(1, clean=True)
    assert pool.touched_bytes == 20 * per_token  # a shorter successor leaves the rest as it is
    pool.touch(1, 5)
    pool.release(1, clean=False)
    assert pool.touched_bytes == 0


@KINDS
def test_tensors_have_the_models_type(dtype: KvDtype) -> None:
    layout = PoolLayout.build((LayerSpec(key="0", heads=2, key_dim=3, value_dim=5),), dtype, 2, 7)
    pool = Pool(layout, budget_bytes=0)
    assert pool.keys[0].dtype == pool.values[0].dtype == TORCH_DTYPES[dtype]
    assert pool.keys[0].shape == (2, 7, 2, 3)
    assert pool.values[0].shape == (2, 7, 2, 5)


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), data=st.data())
def test_what_is_kept_stays_and_the_rest_of_the_slot_is_wiped(layout: PoolLayout, data: st.DataObject) -> None:
    pool = Pool(layout, budget_bytes=layout.total_bytes)
    expected = fill(pool)
    slot = data.draw(st.integers(0, layout.num_slots - 1))
    tokens = data.draw(st.integers(0, layout.slot_tokens))
    kept = data.draw(st.integers(0, layout.slot_tokens))
    pool.touch(slot, tokens)
    pool.release(slot, clean=False, kept=kept)
    for layer in range(len(layout.layers)):
        for row in layout.rows(memoryview(expected.data), layer, slot, min(kept, tokens), tokens):
            row[:] = bytes(len(row))
    assert bytes(pool.memory[:]) == expected.tobytes()
    assert pool.touched_bytes == min(kept, tokens) * layout.bytes_per_token


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), data=st.data())
def test_a_copy_is_of_these_tokens_and_nothing_else(layout: PoolLayout, data: st.DataObject) -> None:
    pool = Pool(layout, budget_bytes=layout.total_bytes)
    expected = fill(pool)
    source, target = (data.draw(st.integers(0, layout.num_slots - 1)) for _ in range(2))
    tokens = data.draw(st.integers(0, layout.slot_tokens))
    pool.copy(source, target, tokens)
    for layer in range(len(layout.layers)):
        rows = [layout.rows(memoryview(expected.data), layer, slot, 0, tokens) for slot in (source, target)]
        for theirs, mine in zip(*rows, strict=True):
            mine[:] = bytes(theirs)
    assert bytes(pool.memory[:]) == expected.tobytes()
    assert pool.touched_bytes == tokens * layout.bytes_per_token


@KINDS
def test_the_last_layer_tells_whether_all_is_finite(dtype: KvDtype) -> None:
    layers = tuple(LayerSpec(key=str(i), heads=2, key_dim=8, value_dim=4) for i in range(2))
    pool = Pool(PoolLayout.build(layers, dtype, 2, 16), budget_bytes=0)
    for tensors in (pool.keys, pool.values):
        for broken in (torch.nan, torch.inf):
            assert pool.finite(1, 0, 16)
            tensors[-1][1, 9, 1, 3] = broken
            assert not pool.finite(1, 0, 16)
            assert pool.finite(1, 0, 9)
            assert pool.finite(1, 10, 16)
            assert pool.finite(0, 0, 16)
            tensors[-1][1, 9, 1, 3] = 0.0
