"""The device's sampler gives the host's tokens, or leaves the row to the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.cuda import sampling
from baton.engine.cuda.rng import signed, uniforms
from baton.engine.cuda.sampling import CANDIDATES, UNSETTLED, SamplingInputs, needs_host
from baton.engine.messages import SamplingParams
from baton.engine.rng import uniform
from baton.engine.sampler import SampleRow, sample

CPU = torch.device("cpu")


def on_device(logits: torch.Tensor, rows: list[SampleRow]) -> list[int]:
    tokens: list[int] = SamplingInputs(len(rows), CPU, pinned=False).sample(logits, rows).tolist()
    return tokens


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**31)), min_size=1, max_size=8))
def test_random_numbers_are_the_same_bits(pairs: list[tuple[int, int]]) -> None:
    seeds = torch.tensor([signed(seed) for seed, _ in pairs])
    positions = torch.tensor([position for _, position in pairs])
    assert uniforms(seeds, positions).tolist() == [uniform(seed, position) for seed, position in pairs]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_random_numbers_at_the_edges_of_the_seeds(seed: int) -> None:
    positions = torch.arange(100)
    got = uniforms(torch.full((100,), signed(seed)), positions)
    assert got.tolist() == [uniform(seed, p) for p in range(100)]


# Quarters are exact in float32 and full of ties.
LOGIT = st.integers(-40, 40).map(lambda n: n / 4) | st.floats(-20, 20, width=32) | st.just(-np.inf)


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, list[SampleRow]]:
    vocabulary = draw(st.integers(1, 40))
    count = draw(st.integers(1, 4))
    logits, rows = [], []
    for _ in range(count):
        line = draw(st.lists(LOGIT, min_size=vocabulary, max_size=vocabulary))
        line[draw(st.integers(0, vocabulary - 1))] = draw(st.floats(-5, 5, width=32))  # one that can be drawn
        logits.append(line)
        params = SamplingParams(
            max_tokens=100,
            temperature=draw(st.sampled_from([0.0, 1e-6, 0.3, 1.0, 3.7])),
            top_p=draw(st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01])),
            top_k=draw(st.sampled_from([0, 0, 1, 2, 5, 1000])),
            min_p=draw(st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0])),
            seed=draw(st.integers(0, 2**64 - 1)),
        )
        rows.append(SampleRow(params, draw(st.integers(0, 5000)), (), ()))
    return torch.tensor(logits, dtype=torch.float32), rows


@settings(max_examples=600, deadline=None)
@given(batches())
def test_a_settled_token_is_the_hosts(batch: tuple[torch.Tensor, list[SampleRow]]) -> None:
    logits, rows = batch
    for got, expected, row in zip(on_device(logits, rows), sample(logits, rows), rows, strict=True):
        assert got in (expected, UNSETTLED)
        if row.sampling.temperature < 1e-5:
            assert got == expected


MODES = [
    {"temperature": 0.8},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 50},
    {"temperature": 1.3, "min_p": 0.02},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.2},
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_large_vocabulary_is_settled_almost_always(mode: dict[str, float]) -> None:
    """Peaked as a trained model's logits are: the host would be asked for one row in a hundred at most."""
    generator = torch.Generator().manual_seed(5)
    unsettled = 0
    for i in range(8):
        logits = torch.randn(64, 8 * CANDIDATES, generator=generator) * 4
        rows = [
            SampleRow(SamplingParams(max_tokens=9, seed=1000 * i + j, **mode), 7 * j, (), ())  # type: ignore[arg-type]
            for j in range(64)
        ]
        got, expected = on_device(logits, rows), sample(logits, rows)
        assert all(g in (e, UNSETTLED) for g, e in zip(got, expected, strict=True))
        assert len(set(got)) > 10
        unsettled += got.count(UNSETTLED)
    assert unsettled <= 5


FLAT = [
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.2},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_k": CANDIDATES - 1},
    {"temperature": 1.0, "top_k": 2 * CANDIDATES},
    {"temperature": 1.0, "min_p": 1e-6},
    {"temperature": 1.0, "min_p": 1e-6, "top_k": 3 * CANDIDATES},
]


@pytest.mark.parametrize("mode", FLAT, ids=str)
def test_where_the_candidates_are_not_enough_the_host_decides(mode: dict[str, float]) -> None:
    """Flat as an untrained model's logits are: many tokens, none likely."""
    logits = torch.randn(200, 8 * CANDIDATES, generator=torch.Generator().manual_seed(1)) * 0.3
    rows = [
        SampleRow(SamplingParams(max_tokens=9, seed=j, **mode), 7 * j, (), ())  # type: ignore[arg-type]
        for j in range(200)
    ]
    got = on_device(logits, rows)
    assert all(g in (e, UNSETTLED) for g, e in zip(got, sample(logits, rows), strict=True))
    if mode in (FLAT[2], FLAT[4], FLAT[5], FLAT[6]):
        assert UNSETTLED in got
    if mode == FLAT[3]:
        assert UNSETTLED not in got


def drawn(monkeypatch: pytest.MonkeyPatch, u: float, logits: list[float], **mode: float) -> int:
    """The token that a number picks."""
    monkeypatch.setattr(sampling, "uniforms", lambda seeds, positions: torch.full((1,), u, dtype=torch.float64))
    row = SampleRow(SamplingParams(max_tokens=9, temperature=1.0, **mode), 0, (), ())  # type: ignore[arg-type]
    return on_device(torch.tensor([logits]), [row])[0]


def test_draws_close_to_an_edge_are_left_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens of equal weight: the edge is at a half. With top-k both sides sum in float64."""
    for off, exact in ((-1e-9, 0), (-1e-14, UNSETTLED), (0.0, UNSETTLED), (1e-14, UNSETTLED), (1e-9, 1)):
        assert drawn(monkeypatch, 0.5 + off, [0.0, 0.0], top_k=2) == exact
    for off, rough in ((-1e-5, 0), (-1e-7, UNSETTLED), (1e-7, UNSETTLED), (1e-5, 1)):
        assert drawn(monkeypatch, 0.5 + off, [0.0, 0.0]) == rough
    assert drawn(monkeypatch, 0.0, [0.0, 0.0]) == 0
    assert drawn(monkeypatch, 1 - 2**-53, [0.0, 0.0], top_k=2) == UNSETTLED, "it may round up to all of the mass"


def test_edges_of_top_p_and_min_p_are_left_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [0.0, 0.0, 0.0, 0.0]
    assert drawn(monkeypatch, 0.9, lines, top_p=0.5) == UNSETTLED
    assert drawn(monkeypatch, 0.9, lines, top_p=0.5 - 1e-7) == UNSETTLED, "the mass is from float32 exponentials"
    assert drawn(monkeypatch, 0.9, lines, top_p=0.5 - 1e-5) == 1
    assert drawn(monkeypatch, 0.9, lines, top_p=0.5 + 1e-5) == 2
    assert drawn(monkeypatch, 0.9, lines, top_p=0.5 - 1e-9, top_k=4) == 1
    weight = float(torch.tensor(-1.0, dtype=torch.float64).exp())
    for off, token in ((-1e-9, 1), (0.0, UNSETTLED), (1e-9, 0)):
        assert drawn(monkeypatch, 0.9, [0.0, -1.0], min_p=weight + off) == token


def test_flat_logits_are_left_to_the_host() -> None:
    """All weights tie: which tokens come first is not among the candidates."""
    row = SampleRow(SamplingParams(max_tokens=9, temperature=1.0, seed=3), 10, (), ())
    assert on_device(torch.zeros(1, 4 * CANDIDATES), [row]) == [UNSETTLED]


def test_ties_at_the_edge_of_top_k_keep_the_lowest_ids() -> None:
    logits = torch.zeros(1, 20)
    rows = [SampleRow(SamplingParams(max_tokens=9, temperature=1.0, top_k=3, seed=s), 0, (), ()) for s in range(60)]
    got = on_device(logits.expand(60, 20), rows)
    assert set(got) == {0, 1, 2}
    assert got == sample(logits.expand(60, 20), rows)


@pytest.mark.parametrize("line", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_without_a_token_are_left_to_the_host(line: list[float], temperature: float) -> None:
    good = SampleRow(SamplingParams(max_tokens=9), 3, (), ())
    row = SampleRow(SamplingParams(max_tokens=9, temperature=temperature), 3, (), ())
    assert on_device(torch.tensor([line, [0.0, 1.0]]), [row, good]) == [UNSETTLED, 1]


@pytest.mark.parametrize(
    "row",
    [
        SampleRow(SamplingParams(max_tokens=9, logit_bias={1: 5.0}), 3, (), ()),
        SampleRow(SamplingParams(max_tokens=9, repetition_penalty=1.1), 3, (1, 2), (0,)),
        SampleRow(SamplingParams(max_tokens=9, min_tokens=4), 3, (), (), blocked=(0,)),
    ],
)
def test_rows_whose_logits_change_are_left_to_the_host(row: SampleRow) -> None:
    plain = SampleRow(SamplingParams(max_tokens=9), 3, (), ())
    assert needs_host(row)
    assert not needs_host(plain)
    assert on_device(torch.tensor([[3.0, 1.0], [0.0, 1.0]]), [row, plain]) == [UNSETTLED, 1]
