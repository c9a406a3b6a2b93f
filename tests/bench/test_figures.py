"""Figures: spread, limit, share, and what is missed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton.bench.figures import Figure, Findings, Spread, number, rate


def test_a_share_is_taken_pair_by_pair() -> None:
    figure = rate("decode", [10.0, 40.0, 90.0], "tokens/s", [100.0, 100.0, 100.0], "at best", wanted=0.5)
    assert figure.value == Spread(40.0, 10.0, 90.0, 3)
    assert figure.share == Spread(0.4, 0.1, 0.9, 3)
    assert figure.missed
    # Both halve in a disturbed round: the share stays.
    paired = rate("decode", [10.0, 5.0], "tokens/s", [20.0, 10.0], "at best", wanted=0.5)
    assert paired.share == Spread(0.5, 0.5, 0.5, 2)
    assert not paired.missed


def test_nothing_is_missed_where_nothing_is_wanted() -> None:
    assert not rate("x", [1.0], "GB/s", [10.0], "").missed
    assert not Figure("x", Spread.of([1.0]), "GB/s").missed


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (99.96, "100.0"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.0123")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_findings_are_written_both_ways(tmp_path: Path) -> None:
    figures = [rate("decode", [10.0, 12.0], "tokens/s", [20.0, 20.0], "linear layers only", 0.7)]
    findings = Findings("Engine", "baton bench engine", figures, {"cores": "2"}, ["A note."])
    findings.write(tmp_path / "a.json", tmp_path / "a.md")
    read = json.loads((tmp_path / "a.json").read_text())
    assert read["figures"][0]["share"] == {"median": 0.55, "low": 0.5, "high": 0.6, "times": 2}
    text = (tmp_path / "a.md").read_text()
    assert "| decode | 11.0 (10.0–12.0) | tokens/s | 20.0 linear layers only | 55% (wanted 70%) |" in text
    assert "`baton bench engine`" in text
    assert "cores: 2." in text
    assert text.endswith("A note.\n")
    assert findings.misses == figures
