"""Placement and the bounded buffer, without any network."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton_router.placement import Candidate, answers_of, order_prefill, pick_decode, prevailing_fingerprint
from baton_router.targets import check_target

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        target=st.sampled_from(["a:1", "b:1", "c:1"]),
        incarnation=st.sampled_from(["1", "2", "3", "4"]),
        fingerprint=st.sampled_from(["old", "new"]),
        quantization=st.sampled_from(["none", "int8"]),
        in_flight=st.integers(0, 9),
        slots=st.integers(0, 9),
        draining=st.booleans(),
    ),
    max_size=8,
)


@given(workers=CANDIDATES, avoid=st.sets(st.sampled_from(["1", "2", "3"])), seed=st.integers())
def test_pick_decode(workers: list[Candidate], avoid: set[str], seed: int) -> None:
    picked = pick_decode(workers, "new", avoid, random.Random(seed))
    usable = [w for w in workers if w.fingerprint == "new" and not w.draining and w.incarnation not in avoid]
    if picked is None:
        assert not usable
    else:
        assert picked in usable
        assert picked.pressure == min(w.pressure for w in usable)


@given(workers=CANDIDATES)
def test_prevailing_fingerprint(workers: list[Candidate]) -> None:
    votes = [w.fingerprint for w in workers if not w.draining]
    chosen = prevailing_fingerprint(workers)
    assert (chosen is None) == (not votes)
    assert all(votes.count(chosen or "") >= votes.count(other) for other in votes)
    assert prevailing_fingerprint(reversed(workers)) == chosen


def test_quantized_weights_have_answers_of_their_own() -> None:
    def answers(*kinds: str) -> str:
        return answers_of("m", [Candidate("a:1", str(i), "m", kind, 0, 8, False) for i, kind in enumerate(kinds)])

    assert answers() == answers("none") == answers("none", "none") == "m"
    assert answers("int8", "none") == answers("none", "int8", "none")
    assert len({answers("none"), answers("int8"), answers("int8", "none")}) == 3
    others = [Candidate("a:1", "1", "n", "int8", 0, 8, False), Candidate("a:1", "2", "m", "int8", 0, 8, True)]
    assert answers_of("m", others) == "m"


@given(workers=CANDIDATES)
def test_prefill_order(workers: list[Candidate]) -> None:
    ordered = order_prefill(workers, "new", random.Random(0))
    assert len(ordered) <= 3
    assert [w.pressure for w in ordered] == sorted(w.pressure for w in ordered)


def test_ties_are_broken_by_chance() -> None:
    workers = [Candidate(f"{i}:1", str(i), "m", "none", 0, 8, False) for i in range(4)]
    rng = random.Random(1)
    picked = [pick_decode(workers, "m", (), rng) for _ in range(400)]
    assert all(50 < picked.count(worker) < 150 for worker in workers)


@pytest.mark.parametrize("target", ["", "host", "host:", ":1", "host:0", "host:99999", "dns:///host", "host:http"])
def test_bad_targets_are_refused_at_start(target: str) -> None:
    with pytest.raises(ValueError, match="neither"):
        check_target(target)
