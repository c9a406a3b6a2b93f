"""Attention over pages is plain attention; kernels are called as they are documented, and only where they serve."""

from __future__ import annotations

import inspect
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.varlen import varlen_attn

from baton.engine.attention import Call
from baton.engine.cuda.attention import PagedForward, choose, proves_itself
from baton.engine.cuda.flash import FlashAttention, VarlenAttention
from baton.engine.cuda.inputs import Inputs
from baton.engine.cuda.pool import PagedPool
from baton.engine.cuda.sdpa import GatheredAttention
from baton.engine.cuda.streams import HostStreams
from baton.engine.layout import KvDtype, LayerSpec, PoolLayout
from baton.engine.scheduler import Work
from tests.engine.test_step import SLOT_TOKENS, SLOTS, Case, Part, a_request, cases, reference

CPU = torch.device("cpu")


def check(case: Case, dtype: KvDtype, page_size: int, tolerance: float, seed: int) -> None:
    """All of a case's layers, through pages full of NaN but for what belongs to its requests."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.float32 if dtype is KvDtype.FLOAT32 else torch.bfloat16

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(kind)

    layout = PoolLayout.build(case.layers, dtype, SLOTS, SLOT_TOKENS)
    pool = PagedPool(layout, SLOTS * SLOT_TOKENS, page_size, CPU, HostStreams())
    for pages in (*pool.key_pages, *pool.value_pages):
        pages.fill_(torch.nan)
    works = [Work(a_request(part), part.start, part.count) for part in case.parts]
    for part in case.parts:
        pool.prepare(part.slot, 0, part.start + part.count)
    total = sum(part.count for part in case.parts)
    padding = 0
    spans = ()
    if all(part.count == 1 for part in case.parts):
        padding = 2
    inputs = Inputs(total + padding, SLOTS + padding, pool.pages, CPU, pinned=False)
    filled = inputs.fill(works, {}, pad_to=total + padding)
    spans = () if padding else filled
    told: list[int] = []
    rows = inputs.rows(total + padding, len(works) + padding, spans)
    step = PagedForward(pool, GatheredAttention(page_size), rows, told.append)
    for number, layer in enumerate(case.layers):
        heads = layer.heads * case.groups
        sinks = random(heads).float() if case.sinks else None
        call = Call(case.scaling, case.softcap, sinks, layer.window or None, number)
        query = random(total + padding, heads, layer.key_dim)
        key, value = (random(total + padding, layer.heads, dim) for dim in (layer.key_dim, layer.value_dim))
        past = {}
        for part in case.parts:
            k, v = (random(part.start, layer.heads, dim) for dim in (layer.key_dim, layer.value_dim))
            past[part.slot] = k, v
            places = torch.from_numpy(pool.pages.places(part.slot, 0, part.start)).long()
            pool.key_pages[number].flatten(0, 1)[places] = k
            pool.value_pages[number].flatten(0, 1)[places] = v
        packed = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)]
        got = step(packed[0], packed[1], packed[2], call)
        assert told == list(range(number + 1))
        assert got.shape == (1, total + padding, heads, layer.value_dim)
        for work, span in zip(works, filled, strict=True):
            own = slice(span.row, span.row + span.count)
            slot = work.request.slot
            k, v = torch.cat((past[slot][0], key[own])), torch.cat((past[slot][1], value[own]))
            wanted = reference(query[own], k, v, layer, work.start, call)
            torch.testing.assert_close(got[0, own].double(), wanted, rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(case=cases(), page_size=st.sampled_from([1, 4, 16, 256]), seed=st.integers(0, 1000))
def test_equals_dense_attention(case: Case, page_size: int, seed: int) -> None:
    check(case, KvDtype.FLOAT32, page_size, 1e-5, seed)


@settings(max_examples=20, deadline=None)
@given(case=cases(), seed=st.integers(0, 1000))
def test_equals_dense_attention_in_bfloat16(case: Case, seed: int) -> None:
    check(case, KvDtype.BFLOAT16, 16, 5e-2, seed)


@settings(max_examples=60, deadline=None)
@given(case=cases(), page_size=st.sampled_from([1, 16]), seed=st.integers(0, 1000))
def test_decode_rows_equal_dense_attention(case: Case, page_size: int, seed: int) -> None:
    """One row per request: what a graph holds, with rows of nobody behind."""
    parts = tuple(part._replace(count=1) for part in case.parts)
    single = Case(case.layers, case.groups, parts, case.softcap, case.sinks, case.scaling)
    check(single, KvDtype.FLOAT32, page_size, 1e-5, seed)


# ------------------------------------------------------------------------------------------- kernels


def paged_kernel(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
    scale: float | None,
    window: tuple[int, int],
    softcap: float = 0.0,
) -> torch.Tensor:
    """What the kernels are documented to compute, request by request: causal to the bottom right."""
    out = []
    for i in range(len(lengths)):
        length = int(lengths[i])
        rows = q[int(starts[i]) : int(starts[i + 1])]
        k, v = (pages[table[i].long()].flatten(0, 1)[:length] for pages in (keys, values))
        layer = LayerSpec(key="", heads=1, key_dim=1, value_dim=1, window=window[0] + 1)
        assert window[1] == 0
        call = Call(scale, softcap or None, None, None, 0)
        out.append(reference(rows, k, v, layer, length - len(rows), call))
    return torch.cat(out).to(q.dtype)


def flash_module() -> Any:
    """The flash-attn package, as its version 2 is documented."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, *, block_table=None,
    ):  # fmt: skip  # type: ignore[no-untyped-def]
        assert causal
        assert q.is_contiguous()
        assert k.shape[1] % 256 == 0
        assert max_seqlen_q == (cu_seqlens_q[1:] - cu_seqlens_q[:-1]).max()
        lengths = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
        assert max_seqlen_k == lengths.max()
        return paged_kernel(
            q, k, v, starts=cu_seqlens_q, lengths=lengths, table=block_table, scale=softmax_scale,
            window=(window_size[0], 0), softcap=softcap,
        )  # fmt: skip

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, block_table=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0,
    ):  # fmt: skip  # type: ignore[no-untyped-def]
        assert causal
        assert q.shape[1] == 1
        assert k_cache.shape[1] % 256 == 0
        starts = torch.arange(len(q) + 1)
        return paged_kernel(
            q[:, 0], k_cache, v_cache, starts=starts, lengths=cache_seqlens, table=block_table, scale=softmax_scale,
            window=(window_size[0], 0), softcap=softcap,
        ).unsqueeze(1)  # fmt: skip

    return types.SimpleNamespace(
        flash_attn_varlen_func=flash_attn_varlen_func, flash_attn_with_kvcache=flash_attn_with_kvcache
    )


def torch_kernel(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip  # type: ignore[no-untyped-def]
    """`varlen_attn`, as it is documented."""
    assert enable_gqa == (query.shape[1] != key.shape[2])
    assert cu_seq_k is None
    return paged_kernel(
        query, key, value, starts=cu_seq_q, lengths=seqused_k, table=block_table, scale=scale, window=window_size
    )


@pytest.mark.parametrize(
    "backend", [FlashAttention(flash_module()), VarlenAttention(torch_kernel)], ids=["fa2", "torch"]
)
def test_kernels_are_given_the_arguments_they_are_documented_to_want(backend: Any) -> None:
    assert proves_itself(backend, CPU, torch.bfloat16)


def test_torchs_own_kernel_still_has_the_signature_that_is_used() -> None:
    theirs, ours = inspect.signature(varlen_attn), inspect.signature(torch_kernel)
    assert list(theirs.parameters) == list(ours.parameters)
    VarlenAttention()


@pytest.mark.parametrize("fault", ["window", "lengths", "table"])
def test_a_kernel_that_gives_something_else_is_found_out(fault: str) -> None:
    def wrong(*args: Any, **arguments: Any) -> Any:
        if fault == "window":
            arguments["window_size"] = (-1, 0)
        elif fault == "lengths":
            arguments["seqused_k"] = arguments["seqused_k"] - 1
        else:
            arguments["block_table"] = arguments["block_table"].flip(0)
        return torch_kernel(*args, **arguments)

    wrong.__signature__ = inspect.signature(torch_kernel)  # type: ignore[attr-defined]
    assert not proves_itself(VarlenAttention(wrong), CPU, torch.bfloat16)


def test_without_block_tables_there_is_no_kernel() -> None:
    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None):  # type: ignore[no-untyped-def]
        raise AssertionError

    with pytest.raises(ImportError):
        VarlenAttention(old)


def test_sdpa_where_there_is_no_device() -> None:
    def never() -> Any:
        raise AssertionError("a kernel for CUDA on a CPU")

    assert isinstance(choose(CPU, torch.bfloat16, [never]), GatheredAttention)


LAYER = LayerSpec(key="0", heads=2, key_dim=64, value_dim=64)
PLAIN = Call(None, None, None, None, 0)


@pytest.mark.parametrize(
    ("layer", "call", "dtype", "flash", "varlen"),
    [
        (LAYER, PLAIN, torch.bfloat16, True, True),
        (LAYER, PLAIN, torch.float32, False, False),
        (LAYER, Call(0.3, 20.0, None, None, 0), torch.bfloat16, True, False),
        (LAYER, Call(None, None, torch.zeros(4), None, 0), torch.bfloat16, False, False),
        (LayerSpec(key="0", heads=2, key_dim=64, value_dim=64, window=8), PLAIN, torch.bfloat16, True, True),
        (LayerSpec(key="0", heads=2, key_dim=64, value_dim=64, chunk=8), PLAIN, torch.bfloat16, False, False),
        (LayerSpec(key="0", heads=2, key_dim=64, value_dim=32), PLAIN, torch.bfloat16, False, False),
        (LayerSpec(key="0", heads=2, key_dim=512, value_dim=512), PLAIN, torch.bfloat16, False, False),
    ],
)
def test_what_each_kernel_serves(layer: LayerSpec, call: Call, dtype: torch.dtype, flash: bool, varlen: bool) -> None:
    assert FlashAttention(flash_module()).supports(layer, call, dtype) is flash
    assert VarlenAttention(torch_kernel).supports(layer, call, dtype) is varlen
    assert GatheredAttention().supports(layer, call, dtype)


def test_calls_without_a_kernel_go_to_sdpa() -> None:
    """Layer by layer: one of a model may have sinks, another none."""
    case = Case((LAYER,), 2, (Part(0, 3, 1, 4),), None, True, None)
    layout = PoolLayout.build(case.layers, KvDtype.BFLOAT16, SLOTS, SLOT_TOKENS)
    pool = PagedPool(layout, SLOTS * SLOT_TOKENS, 256, CPU, HostStreams())
    pool.prepare(0, 0, 4)
    inputs = Inputs(1, 1, pool.pages, CPU, pinned=False)
    inputs.fill([Work(a_request(case.parts[0]), 3, 1)], {})
    calls = []

    def counted(*args: Any, **arguments: Any) -> Any:
        calls.append(1)
        return torch_kernel(*args, **arguments)

    counted.__signature__ = inspect.signature(torch_kernel)  # type: ignore[attr-defined]
    rows = torch.ones(1, 4, 1, 64, dtype=torch.bfloat16)
    for sinks, expected in ((torch.zeros(4), 0), (None, 1)):
        step = PagedForward(pool, VarlenAttention(counted), inputs.rows(1, 1))
        step(rows, rows[:, :2], rows[:, :2], Call(None, None, sinks, None, 0))
        assert len(calls) == expected
