"""What is learned of first tokens, of the queue's pace and of answers' lengths."""

from __future__ import annotations

import pytest

from baton_router.forecast import OutputLength, Pace, Ratio


def test_ratio_is_learned_and_forgotten() -> None:
    ratio = Ratio(0.0)
    assert ratio.value(0.0) == 1
    for second in range(60):
        ratio.came(1.0, 3.0, second / 10)
    assert ratio.value(6.0) == pytest.approx(3, rel=0.1)
    assert 1.2 < ratio.value(36.0) < 1.6
    assert ratio.value(200.0) == pytest.approx(1, rel=0.02), "nothing confirms it: it does not refuse for ever"


def test_those_who_gave_up_teach_as_well() -> None:
    """Otherwise, of slow workers only the fast answers would be seen."""
    ratio = Ratio(0.0)
    ratio.gave_up(1.0, 0.5, 0.0)
    assert ratio.value(0.0) == 1, "it left before it could have been served: that says nothing"
    for second in range(60):
        ratio.gave_up(1.0, 4.0, second / 10)
    assert ratio.value(6.0) == pytest.approx(4, rel=0.1)


def test_one_odd_observation_moves_little() -> None:
    ratio = Ratio(0.0)
    ratio.came(0.001, 1000.0, 0.0)
    assert ratio.value(0.0) < 1.9
    ratio.came(0.0, 1.0, 0.0)
    assert ratio.value(0.0) > 1.5
    ratio.came(1.0, 0.0, 0.0)
    assert 0.5 < ratio.value(0.0) < 1.5, "one that was there at once moves it no further than others"


def test_pace_counts_only_while_somebody_waits() -> None:
    pace = Pace()
    assert pace.tokens_per_second() is None
    pace.left(1000, 0.0)
    assert pace.tokens_per_second() is None, "nobody waited for it"
    pace.waiting(10.0)
    for step in range(1, 21):
        pace.left(50, 10.0 + step / 10)
    assert pace.tokens_per_second() == pytest.approx(500, rel=0.15)
    pace.idle()
    pace.waiting(1000.0)
    pace.left(50, 1000.1)
    assert pace.tokens_per_second() == pytest.approx(500, rel=0.15), "an idle time is no slow time"


def test_answers_are_expected_to_end_as_others_did() -> None:
    output = OutputLength()
    assert output.expected(200) == 200
    for _ in range(60):
        output.came(50, 200)
    assert output.expected(200) == pytest.approx(50, rel=0.1)
    assert output.expected(1) == 1
