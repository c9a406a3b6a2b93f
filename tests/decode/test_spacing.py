"""How far apart messages are: at once where there is room, never longer than the bound."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton_decode.spacing import LONGEST, Spacing, affordable_rate, apart, until_tick

RATES = st.integers(1, 100_000)
STREAMS = st.integers(1, 10_000)


def test_few_streams_do_not_wait() -> None:
    assert apart(1, affordable_rate(2)) == 0.0
    assert apart(8, affordable_rate(64)) == 0.0


@given(streams=STREAMS, rate=RATES)
def test_all_streams_together_keep_the_rate_unless_a_token_would_wait_too_long(streams: int, rate: int) -> None:
    seconds = apart(streams, rate)
    assert 0.0 <= seconds <= LONGEST
    if 0.0 < seconds < LONGEST:
        assert streams / seconds == pytest.approx(rate)


@given(streams=STREAMS, rate=RATES)
def test_more_streams_or_fewer_messages_are_never_closer(streams: int, rate: int) -> None:
    assert apart(streams + 1, rate) >= apart(streams, rate)
    assert apart(streams, rate + 1) <= apart(streams, rate)


def test_one_event_loop_is_the_limit_of_many_cores() -> None:
    assert affordable_rate(4) == 2 * affordable_rate(2)
    assert affordable_rate(1000) == affordable_rate(2000)


@given(seconds=st.floats(0.001, LONGEST), now=st.floats(0, 1e6), later=st.floats(0, 1))
def test_all_streams_wait_for_the_same_instants(seconds: float, now: float, later: float) -> None:
    assert 0.0 < until_tick(seconds, now) <= seconds
    ticks = (now + until_tick(seconds, now) - (now + later + until_tick(seconds, now + later))) / seconds
    assert ticks == pytest.approx(round(ticks), abs=1e-3)


def test_without_spacing_nobody_waits() -> None:
    assert until_tick(0.0, 123.4) == 0.0


def test_only_streams_that_run_count() -> None:
    spacing = Spacing(100, clock=lambda: 0.0)
    assert spacing.seconds() == 0.0
    with spacing.streaming(), spacing.streaming():
        assert spacing.seconds() == 0.02
        with pytest.raises(ZeroDivisionError), spacing.streaming():
            raise ZeroDivisionError
        assert spacing.seconds() == 0.02
    assert spacing.seconds() == 0.0
