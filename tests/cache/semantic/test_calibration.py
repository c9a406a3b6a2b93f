"""How the figures of docs/semantic-cache.md come about: labels without leakage, and bounds that are right."""

from __future__ import annotations

import json
import sys
from math import comb
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
from semantic_pairs.bounds import lower, upper
from semantic_pairs.judging import Judged, choose, figures
from semantic_pairs.pairs import Pair, all_pairs, read, write

from baton_cache.semantic.guard import Rule


def test_enough_pairs_and_none_on_both_sides() -> None:
    pairs = all_pairs()
    held_out = [pair for pair in pairs if pair.split == "held-out"]
    assert len(held_out) >= 600
    assert sum(pair.source == "opposite" for pair in held_out) >= 200
    assert {pair.split for pair in pairs} == {"calibration", "held-out"}
    calibration = {pair.group for pair in pairs if pair.split == "calibration"}
    assert calibration.isdisjoint(pair.group for pair in held_out)
    assert all(pair.one != pair.other for pair in pairs)
    assert not any("{" in pair.one + pair.other for pair in pairs)


def test_the_same_pairs_every_time(tmp_path: Path) -> None:
    write(tmp_path / "one.jsonl", all_pairs())
    assert read(tmp_path / "one.jsonl") == all_pairs()
    (tmp_path / "mine.jsonl").write_text(json.dumps({"one": "a", "other": "b", "same": False}) + "\n")
    assert read(tmp_path / "mine.jsonl") == [Pair("a", "b", False, "calibration", "near", "0")]


@pytest.mark.parametrize(("events", "trials"), [(0, 299), (1, 50), (3, 1171), (49, 50)])
def test_the_bound_is_where_so_few_are_that_unlikely(events: int, trials: int) -> None:
    share = upper(events, trials)
    at_most = sum(comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(events + 1))
    assert at_most == pytest.approx(0.05, rel=1e-6)


def test_known_bounds() -> None:
    assert upper(0, 299) == pytest.approx(1 - 0.05 ** (1 / 299))
    assert upper(0, 299) < 0.01 < upper(0, 298)
    assert upper(5, 5) == 1
    assert upper(0, 0) == 1
    assert lower(0, 10) == pytest.approx(0, abs=1e-9)
    assert lower(10, 10) == pytest.approx(0.05 ** (1 / 10))


def judged(same: bool, similarity: float, rule: Rule | None = None) -> Judged:
    return Judged(Pair("a", "b", same, "calibration", "near", "g"), similarity, rule)


def test_the_threshold_keeps_the_bound() -> None:
    guarded = [judged(False, 0.99, Rule.WORD)] * 400
    true = [judged(True, 0.9)] * 95 + [judged(True, 0.6)] * 5
    assert choose(guarded + true) == 0.9
    wrong = [judged(False, 0.7)] * 10
    assert choose([*guarded, *wrong, *[judged(True, 0.9)] * 10, *[judged(True, 0.6)] * 90]) == pytest.approx(0.9)
    assert choose([judged(False, 0.1)] * 100) is None, "a hundred pairs cannot show a hundredth"
    counted = figures(guarded + wrong + true, 0.65)
    assert (counted.true_hits, counted.false_hits, counted.same, counted.different) == (95, 10, 100, 410)
