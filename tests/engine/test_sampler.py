"""A sampled token is what the written rules say it is, and depends on nothing but its own row."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from baton.engine.messages import SamplingParams
from baton.engine.penalties import PenaltyState
from baton.engine.rng import mix64, uniform
from baton.engine.sampler import InvalidRows, SampleRow, sample

EDGE = 1e-5
"""Share of the mass within which float32 and float64 may disagree on which side a number falls."""


# ------------------------------------------------------------------------------------------- reference


def edited(logits: np.ndarray, row: SampleRow) -> np.ndarray:
    """Bias, penalties and blocks, token by token, in float64."""
    p = row.sampling
    line = logits.astype(np.float64)
    for token in range(len(line)):
        line[token] += p.logit_bias.get(token, 0.0)
        if token in row.prompt or token in row.output:
            line[token] *= 1 / p.repetition_penalty if line[token] > 0 else p.repetition_penalty
        count = list(row.output).count(token)
        line[token] -= count * p.frequency_penalty
        line[token] -= p.presence_penalty if count else 0.0
        if token in row.blocked:
            line[token] = -np.inf
    return line


def acceptable(line: np.ndarray, p: SamplingParams, u: float) -> set[int]:
    """The tokens that `u` may pick: one, or a few where a threshold or `u` itself lies on an edge."""
    order = np.lexsort((np.arange(len(line)), -line))
    weights = np.exp((line[order] - line[order[0]]) / p.temperature)
    found: set[int] = set()
    for slack in (0.0, EDGE, -EDGE):
        kept = int((weights >= min(1.0, p.min_p + slack)).sum())
        kept = min(kept, p.top_k or kept)
        after = np.cumsum(weights[:kept])
        before = after - weights[:kept]
        if p.top_p < 1:
            kept = max(1, int((before < (p.top_p + slack) * after[-1]).sum()))
        mass = after[kept - 1]
        hit = (before[:kept] <= (u + EDGE) * mass) & (after[:kept] >= (u - EDGE) * mass) & (weights[:kept] > 0)
        found |= set(order[:kept][hit].tolist())
    return found


# ------------------------------------------------------------------------------------------ strategies

VOCAB = 24
# Quarters: exact in float32 and full of ties.
QUARTERS = st.integers(-60, 60).map(lambda n: n / 4)
LOGIT = QUARTERS | st.floats(-30, 30, width=32) | st.just(-np.inf)
TOKENS = st.integers(0, VOCAB - 1)
HISTORY = st.lists(TOKENS, max_size=12)


@st.composite
def samplings(draw: st.DrawFn) -> SamplingParams:
    penalized = draw(st.booleans())
    return SamplingParams(
        max_tokens=100,
        temperature=draw(st.sampled_from([0.0, 0.25, 0.7, 1.0, 1.5, 10.0])),
        top_p=draw(st.just(1.0) | st.floats(0.01, 1.0)),
        top_k=draw(st.just(0) | st.integers(1, VOCAB + 5)),
        min_p=draw(st.just(0.0) | st.floats(0.0, 1.0)),
        repetition_penalty=draw(st.sampled_from([1.0, 0.5, 1.3, 2.0])) if penalized else 1.0,
        presence_penalty=draw(st.sampled_from([0.0, -1.0, 0.5])) if penalized else 0.0,
        frequency_penalty=draw(st.sampled_from([0.0, -0.25, 0.75])) if penalized else 0.0,
        logit_bias=draw(st.dictionaries(TOKENS, QUARTERS, max_size=4)),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


@st.composite
def sample_rows(draw: st.DrawFn) -> tuple[np.ndarray, SampleRow]:
    line = np.array(draw(st.lists(LOGIT, min_size=VOCAB, max_size=VOCAB)), dtype=np.float32)
    prompt, output = draw(HISTORY), draw(HISTORY)
    blocked = tuple(draw(st.sets(TOKENS, max_size=4)))
    return line, SampleRow(draw(samplings()), len(prompt) + len(output), prompt, output, blocked)


def can_be_sampled(line: np.ndarray, row: SampleRow) -> bool:
    return bool(np.isfinite(edited(line, row)).any())


def sample_one(line: np.ndarray, row: SampleRow) -> int:
    (token,) = sample(torch.from_numpy(line)[None], [row])
    return token


def plain(temperature: float = 1.0, **fields: object) -> SamplingParams:
    return SamplingParams(max_tokens=100, temperature=temperature, **fields)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- the rules of a row


@settings(max_examples=300, deadline=None)
@given(given_row=sample_rows())
def test_token_follows_the_rules(given_row: tuple[np.ndarray, SampleRow]) -> None:
    line, row = given_row
    assume(can_be_sampled(line, row))
    wanted = edited(line, row)
    if row.sampling.temperature == 0:  # float32 arithmetic of penalties may make or break a tie
        assert wanted[sample_one(line, row)] >= wanted.max() - 1e-5
    else:
        u = uniform(row.sampling.seed, row.position)
        assert sample_one(line, row) in acceptable(wanted, row.sampling, u)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), spread=st.sampled_from([0.1, 1.0, 4.0, 20.0]), kind=st.sampled_from(["p", "k", "m"]))
def test_large_vocabularies_follow_the_same_rules(seed: int, spread: float, kind: str) -> None:
    """Where candidates are found in stages: few of them, many of them, all of them."""
    generator = np.random.default_rng(seed)
    line = (generator.standard_normal(5000) * spread).astype(np.float32)
    limits: dict[str, dict[str, object]] = {"p": {"top_p": 0.95}, "k": {"top_k": 700}, "m": {"min_p": 1e-4}}
    for fields in ({}, limits[kind], limits[kind] | {"top_p": 0.999}):
        row = SampleRow(plain(seed=seed, **fields), int(generator.integers(1000)), [], [])
        u = uniform(seed, row.position)
        assert sample_one(line, row) in acceptable(line.astype(np.float64), row.sampling, u)


@settings(max_examples=200, deadline=None)
@given(line=st.lists(st.integers(-2, 2), min_size=1, max_size=12), temperature=st.sampled_from([0.0, 1e-6]))
def test_greedy_takes_the_lowest_of_equal_ids(line: list[int], temperature: float) -> None:
    row = SampleRow(plain(temperature), 5, [], [])
    assert sample_one(np.array(line, np.float32), row) == line.index(max(line))


@given(k=st.integers(1, 10), seed=st.integers(0, 1000))
def test_top_k_of_ties_keeps_exactly_k_of_the_lowest_ids(k: int, seed: int) -> None:
    row = SampleRow(plain(top_k=k, seed=seed), 0, [], [])
    assert sample_one(np.zeros(10, np.float32), row) == int(uniform(seed, 0) * k)


@pytest.mark.parametrize(
    ("fields", "reachable"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.49}, {0}),  # half of the mass is reached by the first alone
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.76}, {0, 1, 2}),
        ({"min_p": 0.24}, {0, 1, 2, 3}),
        ({"min_p": 0.3}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"min_p": 0.3, "top_p": 0.6}, {0}),  # of the two that are left the first has two thirds
        ({"top_k": 3, "top_p": 0.75}, {0, 1}),  # of the three that are left the first has 4/7, two have 6/7
        ({"logit_bias": {3: 50.0}}, {3}),
        ({"logit_bias": {0: -100.0}, "top_k": 1}, {1}),
        ({"temperature": 0.02}, {0}),
    ],
)
def test_which_tokens_can_come(fields: dict[str, object], reachable: set[int]) -> None:
    """Weights 4, 2, 1, 1."""
    line = np.log(np.array([4, 2, 1, 1], np.float32))
    seen = {sample_one(line, SampleRow(plain(**({"seed": seed} | fields)), 3, [], [])) for seed in range(300)}  # type: ignore[arg-type]
    assert seen == reachable


def test_penalties_by_hand() -> None:
    line = np.array([2.0, 2.0, -2.0, -2.0, 1.0], np.float32)
    history = {"prompt": [0, 2], "output": [0, 0, 3]}

    def after(**fields: float) -> list[float]:
        row = SampleRow(plain(**fields), 5, **history)  # type: ignore[arg-type]
        state, copy = PenaltyState(), line.copy()
        state.update(row.prompt, row.output)
        state.apply(copy, row.sampling)
        return copy.tolist()

    assert after(repetition_penalty=2.0) == [1.0, 2.0, -4.0, -4.0, 1.0]
    assert after(presence_penalty=0.5) == [1.5, 2.0, -2.0, -2.5, 1.0]
    assert after(frequency_penalty=0.5) == [1.0, 2.0, -2.0, -2.5, 1.0]
    assert after(repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=1.0) == [-0.5, 2.0, -4.0, -5.25, 1.0]


@settings(max_examples=100, deadline=None)
@given(prompt=HISTORY, outputs=st.lists(HISTORY, min_size=1, max_size=5))
def test_kept_counts_equal_fresh_counts(prompt: list[int], outputs: list[list[int]]) -> None:
    """Also where a request starts over with a shorter history."""
    sampling = plain(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25)
    kept = PenaltyState()
    line = np.linspace(-3, 3, VOCAB, dtype=np.float32)
    history: list[int] = []
    for output in [*outputs, []]:
        history = history + output if output else []
        fresh = PenaltyState()
        results = []
        for state in (kept, fresh):
            state.update(prompt, history)
            results.append(line.copy())
            state.apply(results[-1], sampling)
        assert results[0].tolist() == results[1].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_blocked_tokens_never_come(temperature: float) -> None:
    line = np.array([9.0, 8.0, 0.0, 7.0], np.float32)
    for seed in range(50):
        assert sample_one(line, SampleRow(plain(temperature, seed=seed), 0, [], [], blocked=(0, 1, 3))) == 2


def test_ids_outside_the_vocabulary_are_ignored() -> None:
    row = SampleRow(plain(0.0, logit_bias={-1: 99.0, 4: 99.0}, presence_penalty=1.0), 2, [1], [17], blocked=(-1, 4))
    assert sample_one(np.array([1.0, 3.0, 2.0, 0.0], np.float32), row) == 1


def test_frequencies_are_the_probabilities() -> None:
    """Chi square over 4000 seeds: 11 degrees of freedom, 99.9 % of fair samplers stay below 31.3."""
    line = np.linspace(2, -1, 12, dtype=np.float32)
    weights = np.exp(line.astype(np.float64) / 0.8)
    wanted = 4000 * weights / weights.sum()
    for position in (0, 1000):
        rows = [SampleRow(plain(0.8, seed=seed), position, [], []) for seed in range(4000)]
        seen = Counter(sample(torch.from_numpy(line).expand(4000, -1), rows))
        assert sum((seen[i] - wanted[i]) ** 2 / wanted[i] for i in range(12)) < 31.3
    rows = [SampleRow(plain(0.8, seed=7), position, [], []) for position in range(4000)]
    seen = Counter(sample(torch.from_numpy(line).expand(4000, -1), rows))
    assert sum((seen[i] - wanted[i]) ** 2 / wanted[i] for i in range(12)) < 31.3


# -------------------------------------------------------------------------------- rows and their batch


@settings(max_examples=50, deadline=None)
@given(batch=st.lists(sample_rows(), min_size=2, max_size=8))
def test_rows_do_not_see_each_other(batch: list[tuple[np.ndarray, SampleRow]]) -> None:
    batch = [(line, row) for line, row in batch if can_be_sampled(line, row)]
    assume(batch)
    logits = torch.from_numpy(np.stack([line for line, _ in batch]))
    before = logits.clone()
    together = sample(logits, [row for _, row in batch])
    assert together == [sample_one(line, row) for line, row in batch]
    backwards = sample(logits.flip(0), [row for _, row in reversed(batch)])
    assert together == backwards[::-1]
    assert torch.equal(logits, before), "logits were changed"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_invalid_rows_are_named_and_the_others_can_be_sampled(temperature: float) -> None:
    logits = torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    logits[1, 3] = torch.nan
    logits[2, 9] = torch.inf
    logits[4] = -torch.inf
    rows = [SampleRow(plain(temperature, seed=i), i, [], []) for i in range(7)]
    rows[5] = replace(rows[5], blocked=tuple(range(10)))
    with pytest.raises(InvalidRows, match="4 of 7 rows; row 1") as error:
        sample(logits, rows)
    assert error.value.rows == [1, 2, 4, 5]
    good = [0, 3, 6]
    tokens = sample(logits[good], [rows[i] for i in good])
    assert tokens == [sample_one(logits[i].numpy(), rows[i]) for i in good]


def test_nan_is_found_behind_any_edit() -> None:
    line = np.array([1.0, np.nan, 2.0], np.float32)
    for fields in ({"logit_bias": {0: 1.0}}, {"presence_penalty": 1.0}, {"top_k": 1}):
        with pytest.raises(InvalidRows):
            sample_one(line, SampleRow(plain(**fields), 1, [0], [0]))


@pytest.mark.parametrize("shape", [(2, 5), (1, 0), (5,)])
def test_shapes_must_match(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        sample(torch.zeros(shape), [SampleRow(plain(), 0, [], [])])


def test_no_rows_no_tokens() -> None:
    assert sample(torch.zeros(0, 5), []) == []


def test_bfloat16_logits_are_taken_as_they_are() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    for seed in range(20):
        row = SampleRow(plain(seed=seed), 0, [], [])
        assert sample(logits, [row]) == sample(logits.float(), [row])


# --------------------------------------------------------------------------------------- random numbers

GOLDEN = {
    (0, 0): 0.6524484863740322,
    (0, 1): 0.7012121095215252,
    (0, 100_000): 0.3034580301194316,
    (1, 0): 0.36818951565166946,
    (1, 1): 0.9435642308648544,
    (1, 100_000): 0.5896045672429291,
    (2**64 - 1, 0): 0.3662420901697574,
    (2**64 - 1, 1): 0.7408050620013817,
    (2**64 - 1, 100_000): 0.12423738179155697,
}


def test_random_numbers_never_change() -> None:
    """A stream that is resumed elsewhere, or by a later version, goes on with the same numbers."""
    assert mix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # first output of SplitMix64 seeded with 0
    assert {(seed, position): uniform(seed, position) for seed, position in GOLDEN} == GOLDEN


def test_seed_is_taken_modulo_two_to_the_64() -> None:
    assert uniform(2**64 + 5, 3) == uniform(5, 3)


@pytest.mark.parametrize("by", ["seed", "position"])
def test_random_numbers_are_uniform_and_unrelated(by: str) -> None:
    """99.9 % of fair generators stay below these bounds."""
    n = 20_000
    numbers = np.array([uniform(i, 17) if by == "seed" else uniform(17, i) for i in range(n)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 148.2  # chi square, 99 degrees of freedom
    for lag in (1, 2, 7):
        assert abs(np.corrcoef(numbers[:-lag], numbers[lag:])[0, 1]) < 3.3 / n**0.5


def test_neighbouring_seeds_are_not_shifted_copies() -> None:
    streams = [{uniform(seed, position) for position in range(500)} for seed in range(20)]
    assert len(set().union(*streams)) == 500 * 20


def test_sampling_params_travel_unchanged() -> None:
    sampling = plain(0.7, seed=2**64 - 1, logit_bias={3: -1.5}, stop_token_ids=(4, 5))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sampling), type=SamplingParams) == sampling
