"""How long an answer may be served: spread, and never longer than anybody said."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.internal.v1 import response_cache_pb2
from baton.rpc.errors import InvalidArgument
from baton_cache.checks import ttl_ms

CHANCES = st.floats(0, 1, exclude_max=True)
SECONDS = st.floats(0.001, 1e6)


def fill(seconds: float | None) -> response_cache_pb2.FillRequest:
    request = response_cache_pb2.FillRequest()
    if seconds is not None:
        request.ttl.FromNanoseconds(int(seconds * 1e9))
    return request


@given(asked=SECONDS, most=SECONDS, chance=CHANCES)
def test_what_is_asked_for_is_never_exceeded(asked: float, most: float, chance: float) -> None:
    ttl = ttl_ms(fill(asked), 1, most, chance)
    least, longest = 0.9 * min(asked, most) * 1000, min(asked, most) * 1000
    assert max(1, least - 1) <= ttl <= max(1, longest)


@given(default=SECONDS, most=SECONDS, chance=CHANCES)
def test_the_default_is_spread_both_ways(default: float, most: float, chance: float) -> None:
    ttl = ttl_ms(fill(None), default, most, chance)
    assert max(1, 0.9 * min(default, most) * 1000 - 1) <= ttl <= max(1, min(default * 1.1, most) * 1000)


@pytest.mark.parametrize("seconds", [None, 1000])
def test_entries_do_not_expire_together(seconds: float | None) -> None:
    chance = random.Random(7)
    drawn = [ttl_ms(fill(seconds), 1000, 10**6, chance.random()) for _ in range(1000)]
    width = 200_000 if seconds is None else 100_000
    in_each_tenth = [
        sum(900_000 + width * i / 10 <= ttl < 900_000 + width * (i + 1) / 10 for ttl in drawn) for i in range(10)
    ]
    assert min(in_each_tenth) > 60


@pytest.mark.parametrize("seconds", [0, -1])
def test_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(InvalidArgument, match="ttl"):
        ttl_ms(fill(seconds), 1, 1, 0)
