"""The arithmetic of scripts/measure_cache.py."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from cache_measurements.findings import Findings, interval
from cache_measurements.zipf import Trace, best_reuse


def test_the_same_trace_is_drawn_again() -> None:
    trace = Trace(requests=500, questions=50, exponent=1.0, seed=4)
    assert trace.draw() == trace.draw() != Trace(500, 50, 1.0, seed=5).draw()


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.5])
def test_popularity_follows_zipf(exponent: float) -> None:
    drawn = Counter(Trace(requests=200_000, questions=20, exponent=exponent, seed=1).draw())
    for rank in (2, 5, 10, 20):
        assert drawn[0] / drawn[rank - 1] == pytest.approx(rank**exponent, rel=0.1)


def test_best_reuse() -> None:
    assert best_reuse([7]) == 0.0
    assert best_reuse([1, 2, 3]) == 0.0
    assert best_reuse([1, 1, 2, 1]) == 0.5


def test_an_interval_holds_its_figure_and_narrows_with_more_values() -> None:
    few, many = interval(list(range(20))), interval([value / 100 for value in range(2000)])
    for middle, low, high in (few, many):
        assert low <= middle <= high
        assert middle == pytest.approx(9.75, abs=0.5)
    assert many[2] - many[1] < (few[2] - few[1]) / 3


def test_a_target_that_is_not_known_to_be_reached_is_missed() -> None:
    found = Findings("")
    found.expect("reached", 3.0, 3.0)
    found.expect("missed", 3.1, 3.0)
    found.expect("nothing was measured", float("nan"), 3.0)
    assert [miss.partition(":")[0] for miss in found.misses] == ["missed", "nothing was measured"]
