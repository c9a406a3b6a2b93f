"""The interval around a median is as sure as it says."""

from __future__ import annotations

import random

import pytest

from baton.verify.estimate import Estimate


@pytest.mark.parametrize(
    ("count", "low", "high"),
    # Ranks from a table of the binomial distribution, 95 %.
    [(1, 1, 1), (5, 1, 5), (6, 1, 6), (8, 1, 8), (9, 2, 8), (15, 4, 12), (20, 6, 15), (60, 22, 39)],
)
def test_ranks_are_those_of_the_tables(count: int, low: int, high: int) -> None:
    values = list(range(1, count + 1))
    random.Random(count).shuffle(values)
    estimate = Estimate.of(values)
    assert (estimate.low, estimate.high) == (low, high)
    assert estimate.median == (count + 1) / 2


@pytest.mark.parametrize("count", [6, 15, 40])
def test_the_interval_holds_the_true_median_as_often_as_it_says(count: int) -> None:
    rng = random.Random(1)
    hits = 0
    for _ in range(2000):
        # Lopsided on purpose, with a median of ln 2.
        estimate = Estimate.of([rng.expovariate(1) for _ in range(count)])
        hits += estimate.low <= 0.6931 <= estimate.high
    assert hits >= 0.94 * 2000


def test_sure_is_only_what_the_whole_interval_says() -> None:
    assert Estimate(0.01, -0.05, 0.05).surely_within(-0.05, 0.05)
    assert not Estimate(0.01, -0.05, 0.06).surely_within(-0.05, 0.05)
    assert not Estimate(0.01, -0.06, 0.05).surely_within(-0.05, 0.05)
