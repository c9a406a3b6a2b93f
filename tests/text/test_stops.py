"""The stop matcher equals a search of the whole text, however the text is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.text.stops import StopMatcher

SMALL = st.text("ab•", max_size=30)
STOPS = st.lists(st.text("ab•", min_size=1, max_size=5), max_size=4)


def search(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """What must come out, found the slow way: the match that ends first, the longest of those."""
    for end in range(1, len(text) + 1):
        matched = max((len(stop) for stop in stops if text[:end].endswith(stop)), default=0)
        if matched:
            return (text[:end] if include else text[: end - matched]), True
    return text, False


def chunks(text: str, cuts: list[int]) -> list[str]:
    points = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(points)]


@given(text=SMALL, stops=STOPS, include=st.booleans(), cuts=st.lists(st.integers(0, 1000), max_size=30))
def test_equals_a_search_of_the_whole(text: str, stops: list[str], include: bool, cuts: list[int]) -> None:
    matcher = StopMatcher(stops, include)
    shown = ""
    stopped = False
    for chunk in chunks(text, cuts):
        piece, stopped = matcher.push(chunk)
        shown += piece
        assert search(text, stops, include)[0].startswith(shown)
    shown += matcher.flush()
    assert (shown, stopped) == search(text, stops, include)


@given(text=SMALL, stops=STOPS)
def test_holds_back_only_what_may_become_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for char in text:
        piece, stopped = matcher.push(char)
        shown += piece
        if stopped:
            return
    held = text[len(shown) :]
    assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_after_the_stop_nothing_comes_out() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("one EN") == ("one ", False)
    assert matcher.push("D two") == ("", True)
    assert matcher.push("END") == ("", True)
    assert matcher.flush() == ""


def test_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])
