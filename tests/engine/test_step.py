"""Attention through the pool is plain attention, whatever shares the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.attention import Call, attend, causal_mask
from baton.engine.layout import KvDtype, LayerSpec, PoolLayout
from baton.engine.messages import Role, SamplingParams
from baton.engine.pool import Pool
from baton.engine.request import Request
from baton.engine.scheduler import Work
from baton.engine.step import Step

SLOTS, SLOT_TOKENS = 8, 96


class Part(NamedTuple):
    """Tokens [start, start + count) of a request of `total` tokens."""

    slot: int
    start: int
    count: int
    total: int


@dataclass(frozen=True)
class Case:
    layers: tuple[LayerSpec, ...]
    groups: int
    parts: tuple[Part, ...]
    softcap: float | None
    sinks: bool
    scaling: float | None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    heads, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    layers = []
    for i in range(2):
        kind = draw(st.sampled_from(["full", "window", "chunk"]))
        layers.append(
            LayerSpec(
                key=str(i),
                heads=heads,
                key_dim=draw(st.sampled_from([4, 8, 24])),
                value_dim=draw(st.sampled_from([4, 8, 16])),
                window=draw(st.integers(1, 20)) if kind == "window" else 0,
                chunk=draw(st.integers(1, 20)) if kind == "chunk" else 0,
            )
        )
    parts = []
    for slot in sorted(draw(st.sets(st.integers(0, SLOTS - 1), min_size=1))):
        start = draw(st.just(0) | st.integers(0, SLOT_TOKENS - 30))
        count = draw(st.just(1) | st.integers(2, 30))
        parts.append(Part(slot, start, count, start + count + draw(st.just(0) | st.integers(0, 5))))
    return Case(
        tuple(layers),
        groups,
        tuple(draw(st.permutations(parts))),
        draw(st.sampled_from([None, None, 2.0])),
        draw(st.booleans()),
        draw(st.sampled_from([None, 0.3])),
    )


def visible(layer: LayerSpec, position: int, key: int) -> bool:
    """The definition, for one pair of tokens."""
    if key > position:
        return False
    if layer.window and key <= position - layer.window:
        return False
    return not layer.chunk or key // layer.chunk == position // layer.chunk


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerSpec, first: int, call: Call
) -> torch.Tensor:
    """Dense attention in float64, a loop over tokens and heads.

    Args:
        q: [count, Hq, Dk], tokens from `first` on.
        k: [total, Hkv, Dk].
        v: [total, Hkv, Dv].

    Returns:
        [count, Hq, Dv].
    """
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    scaling = q.shape[2] ** -0.5 if call.scaling is None else call.scaling
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    for i in range(q.shape[0]):
        seen = [key for key in range(k.shape[0]) if visible(layer, first + i, key)]
        for head in range(q.shape[1]):
            scores = k[seen, head // group] @ q[i, head] * scaling
            if call.softcap is not None:
                scores = torch.tanh(scores / call.softcap) * call.softcap
            weights = scores.exp()
            total = weights.sum()
            if call.sinks is not None:
                total = total + call.sinks[head].double().exp()
            out[i, head] = (weights / total) @ v[seen, head // group]
    return out


def a_request(part: Part) -> Request:
    request = Request.probe(list(range(100 * part.slot, 100 * part.slot + part.total)), Role.GENERATE, GREEDY)
    request.slot = part.slot
    return request


GREEDY = SamplingParams(max_tokens=1)


def check(case: Case, dtype: KvDtype, tolerance: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        return values if dtype is KvDtype.FLOAT32 else values.bfloat16()

    pool = Pool(PoolLayout.build(case.layers, dtype, SLOTS, SLOT_TOKENS), budget_bytes=0)
    for tensor in (*pool.keys, *pool.values):
        tensor.fill_(50.0)  # what others left behind
    works = [Work(a_request(part), part.start, part.count) for part in case.parts]
    told: list[int] = []
    step = Step(pool, works, told.append)
    rows = sum(part.count for part in case.parts)
    assert step.input_ids.shape == step.position_ids.shape == (1, rows)
    for number, layer in enumerate(case.layers):
        heads = layer.heads * case.groups
        sinks = random(heads).float() if case.sinks else None
        call = Call(case.scaling, case.softcap, sinks, layer.window or None, number)
        query, key, value = (
            random(rows, heads, layer.key_dim),
            *(random(rows, layer.heads, dim) for dim in (layer.key_dim, layer.value_dim)),
        )
        past = {
            part.slot: (
                random(part.start, layer.heads, layer.key_dim),
                random(part.start, layer.heads, layer.value_dim),
            )
            for part in case.parts
        }
        for part in case.parts:
            pool.keys[number][part.slot, : part.start] = past[part.slot][0]
            pool.values[number][part.slot, : part.start] = past[part.slot][1]
        packed = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)]
        got = step(packed[0], packed[1], packed[2], call)
        assert told == list(range(number + 1))
        assert got.shape == (1, rows, heads, layer.value_dim)
        row = 0
        for work in step.work:
            own = slice(row, row + work.count)
            row += work.count
            slot = work.request.slot
            k, v = torch.cat((past[slot][0], key[own])), torch.cat((past[slot][1], value[own]))
            assert torch.equal(pool.keys[number][slot, : len(k)], k)
            assert torch.equal(pool.values[number][slot, : len(v)], v)
            wanted = reference(query[own], k, v, layer, work.start, call)
            torch.testing.assert_close(got[0, own].double(), wanted, rtol=tolerance, atol=tolerance)


@settings(max_examples=80, deadline=None)
@given(case=cases(), seed=st.integers(0, 1000))
def test_equals_dense_attention(case: Case, seed: int) -> None:
    check(case, KvDtype.FLOAT32, 1e-5, seed)


@settings(max_examples=25, deadline=None)
@given(case=cases(), seed=st.integers(0, 1000))
def test_equals_dense_attention_in_bfloat16(case: Case, seed: int) -> None:
    check(case, KvDtype.BFLOAT16, 5e-2, seed)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_rows_are_the_tokens_of_their_requests(case: Case) -> None:
    pool = Pool(PoolLayout.build(case.layers, KvDtype.FLOAT32, SLOTS, SLOT_TOKENS), budget_bytes=0)
    step = Step(pool, [Work(a_request(part), part.start, part.count) for part in case.parts], lambda layer: None)
    assert sorted(w.request.slot for w in step.work) == sorted(part.slot for part in case.parts)
    ids, positions, last = [], [], []
    for work in step.work:
        ids += [100 * work.request.slot + i for i in range(work.start, work.start + work.count)]
        positions += range(work.start, work.start + work.count)
        if work.samples:
            last.append(len(ids) - 1)
    assert step.input_ids[0].tolist() == ids
    assert step.position_ids[0].tolist() == positions
    assert step.sampled.tolist() == last


def test_a_slot_that_was_wiped_of_nan_serves_beside_longer_neighbours() -> None:
    """A row reads past its own end up to its neighbour's: what a failed request left there must be gone."""
    layer = LayerSpec(key="0", heads=2, key_dim=8, value_dim=8)
    pool = Pool(PoolLayout.build((layer,), KvDtype.FLOAT32, 2, 64), budget_bytes=1 << 30)

    def serve() -> torch.Tensor:
        parts = (Part(0, 10, 1, 11), Part(1, 40, 1, 41))
        step = Step(pool, [Work(a_request(part), part.start, part.count) for part in parts], lambda layer: None)
        rows = torch.ones(1, 2, 2, 8)
        return step(rows, rows, rows, Call(None, None, None, None, 0))

    pool.touch(0, 60)
    pool.keys[0][0, :60] = torch.nan
    pool.values[0][0, :60] = torch.nan
    pool.keys[0][0, :10] = pool.values[0][0, :10] = 1.0
    assert serve().isnan().any(), "the rows do not share a call; this test shows nothing"
    pool.release(0, clean=False)
    pool.keys[0][0, :10] = pool.values[0][0, :10] = 1.0
    assert serve().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_causal_equals_its_mask(dtype: torch.dtype, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 8, generator=generator).to(dtype) for heads in (4, 2, 2))
    call = Call(None, softcap, None, None, 0)
    direct = attend(q, k, v, call, None, causal=True)
    masked = attend(q, k, v, call, causal_mask(7, dtype))
    torch.testing.assert_close(direct, masked)
