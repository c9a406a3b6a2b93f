"""What memory requests will need, and how long answers are expected to get."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.growth import AnswerLengths, Growth, peak_blocks


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40)), max_size=10), st.integers(1, 8))
def test_peak_is_that_of_growing_token_by_token(growing: list[tuple[int, int]], block: int) -> None:
    sizes = [
        sum(blocks + -(-passed // block) for blocks, tokens in growing if tokens >= passed)
        for passed in range(max((tokens for _, tokens in growing), default=0) + 1)
    ]
    assert peak_blocks([Growth(*each) for each in growing], block) == max(sizes)


def test_with_few_answers_seen_all_that_may_come_is_expected() -> None:
    lengths = AnswerLengths()
    for _ in range(7):
        lengths.ended(3)
    assert lengths.expected(0, 100) == 100
    lengths.ended(3)
    assert lengths.expected(0, 100) == 3
    assert lengths.expected(3, 100) == 100, "none of those got so far"
    assert lengths.expected(0, 2) == 2


def test_one_that_got_far_is_expected_to_get_further() -> None:
    lengths = AnswerLengths()
    for tokens in range(100):
        lengths.ended(tokens)
    assert lengths.expected(0, 1000) == 50
    assert lengths.expected(50, 1000) == 75


def test_only_the_latest_answers_count() -> None:
    lengths = AnswerLengths()
    for _ in range(512):
        lengths.ended(500)
    for _ in range(512):
        lengths.ended(5)
    assert lengths.expected(0, 1000) == 5
    assert lengths.expected(5, 1000) == 1000
    assert len(lengths._ranked) == len(lengths._latest) == 512
