"""Placement, without any network."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.worker.step_cost import StepCost
from baton_router.placement import (
    MAX_PREFILL_CANDIDATES,
    Candidate,
    Policy,
    Prompt,
    Reason,
    Strategy,
    answers_of,
    order_prefill,
    pick_decode,
    prevailing_fingerprint,
)
from baton_router.rents import Rents
from baton_router.targets import check_target

COST = StepCost(0.01, 0.0002, 0.005, 0.0001, 0.0, 512)
FLAT = Policy(slack_seconds=0.0)


def a_worker(number: int, **fields: object) -> Candidate:
    usual = {"slots": 8, "free_tokens": 100_000, "cost": COST}
    return Candidate(f"{number}:1", str(number), "m", **(usual | fields))  # type: ignore[arg-type]


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        target=st.integers(1, 99).map("{}:1".format),
        incarnation=st.just("1"),
        fingerprint=st.sampled_from(["old", "new"]),
        quantization=st.sampled_from(["none", "int8"]),
        draining=st.booleans(),
        streams=st.integers(0, 9),
        waiting=st.booleans(),
        slots=st.integers(0, 9),
        free_tokens=st.integers(-1000, 1000),
        queued_tokens=st.integers(0, 4000),
        cached_tokens=st.integers(0, 600),
        cost=st.sampled_from([None, COST, replace(COST, seconds_per_token=0.001)]),
    ),
    max_size=8,
)
STRATEGIES = st.sampled_from(list(Strategy))


@given(workers=CANDIDATES)
def test_prevailing_fingerprint(workers: list[Candidate]) -> None:
    votes = [w.fingerprint for w in workers if not w.draining]
    chosen = prevailing_fingerprint(workers)
    assert (chosen is None) == (not votes)
    assert all(votes.count(chosen or "") >= votes.count(other) for other in votes)
    assert prevailing_fingerprint(reversed(workers)) == chosen


def test_quantized_weights_have_answers_of_their_own() -> None:
    def answers(*kinds: str) -> str:
        return answers_of("m", [a_worker(i, quantization=kind) for i, kind in enumerate(kinds)])

    assert answers() == answers("none") == answers("none", "none") == "m"
    assert answers("int8", "none") == answers("none", "int8", "none")
    assert len({answers("none"), answers("int8"), answers("int8", "none")}) == 3
    others = [Candidate("a:1", "1", "n", "int8"), Candidate("a:1", "2", "m", "int8", draining=True)]
    assert answers_of("m", others) == "m"


@given(workers=CANDIDATES, strategy=STRATEGIES, beginning=st.integers(0, 2**64 - 1), tokens=st.integers(1, 900))
def test_some_are_chosen_and_the_best_first(
    workers: list[Candidate], strategy: Strategy, beginning: int, tokens: int
) -> None:
    prompt, rng = Prompt(tokens, 16, beginning), random.Random(0)
    policy = replace(FLAT, strategy=strategy)
    ordered = order_prefill(prompt, workers, policy, rng).choices
    assert len(ordered) == min(len(workers), MAX_PREFILL_CANDIDATES)
    assert len({id(choice.candidate) for choice in ordered}) == len(ordered)
    assert (ordered and ordered[0].reason is Reason.ONLY) == (len(workers) == 1) or not ordered
    if strategy is not Strategy.HASH:
        assert [choice.seconds for choice in ordered] == sorted(choice.seconds for choice in ordered)
    if workers:
        picked = pick_decode(prompt, workers, policy, rng)
        assert picked.candidate in workers
        if any(w.free_tokens >= tokens + 16 and not w.waiting and w.streams < w.slots for w in workers):
            assert picked.candidate.free_tokens + picked.candidate.cached_tokens >= tokens + 16
            assert not picked.candidate.waiting


def test_a_prefix_is_worth_a_queue_but_not_any_queue() -> None:
    prompt = Prompt(2000)
    free, queued, busy = (
        a_worker(1),
        a_worker(2, cached_tokens=1600, queued_tokens=800),
        a_worker(3, cached_tokens=1600),
    )
    assert order_prefill(prompt, [free, queued], FLAT, random.Random(0)).choices[0].candidate is queued
    buried = replace(busy, queued_tokens=4000)
    first, second = order_prefill(prompt, [free, buried], FLAT, random.Random(0)).choices
    assert (first.candidate, first.reason, second.candidate) == (free, Reason.SPILL, buried)
    by_load = order_prefill(prompt, [free, queued], Policy(Strategy.LOAD), random.Random(0)).choices
    assert (by_load[0].candidate, by_load[0].reason) == (free, Reason.LOAD)


def test_a_prefix_that_many_wait_for_gets_a_copy() -> None:
    prompt = Prompt(2000)
    free, holder = a_worker(1), a_worker(2, cached_tokens=1984, queued_tokens=500)
    order = order_prefill(prompt, [free, holder], FLAT, random.Random(0))
    assert (order.choices[0].candidate, order.choices[0].reason) == (holder, Reason.PREFIX)
    assert order.rent == pytest.approx(COST.prefill(500))
    price = COST.prefill(2000) - COST.prefill(16, 1984)
    paid, turns = 0.0, 0
    rents = Rents()
    while (order := order_prefill(prompt, [free, holder], FLAT, random.Random(0), paid)).choices[0].candidate is holder:
        rents.pay(7, order.rent, now=turns)
        paid = rents.paid(7, now=turns)
        turns += 1
    assert order.choices[0].reason is Reason.COPY
    assert order.choices[1].candidate is holder
    assert turns == int(price / order.rent)
    idle = order_prefill(prompt, [free, replace(holder, queued_tokens=0)], FLAT, random.Random(0), paid=99.0)
    assert (idle.choices[0].reason, idle.rent) == (Reason.PREFIX, 0.0), "nobody waits"
    rents.pay(8, 1.0, now=100.0)
    assert rents.paid(8, now=130.0) == pytest.approx(0.5)
    rents.settle(8)
    assert rents.paid(8, now=130.0) == 0.0


def test_equal_beginnings_meet_and_others_spread() -> None:
    workers = [a_worker(i) for i in range(8)]
    for policy in (Policy(), Policy(Strategy.HASH)):
        firsts = {
            beginning: {
                order_prefill(Prompt(100, beginning=beginning), workers, policy, random.Random(seed))
                .choices[0]
                .candidate.target
                for seed in range(3)
            }
            for beginning in range(1, 200)
        }
        assert all(len(targets) == 1 for targets in firsts.values()), "chance decides nothing"
        assert len(set.union(*firsts.values())) == 8


def test_by_hash_a_busy_worker_is_passed_by_and_nobody_else_moves() -> None:
    workers = [a_worker(i) for i in range(8)]
    policy = Policy(Strategy.HASH)

    def owners(of: list[Candidate]) -> dict[int, str]:
        return {
            b: order_prefill(Prompt(64, beginning=b), of, policy, random.Random(0)).choices[0].candidate.target
            for b in range(1, 300)
        }

    before = owners(workers)
    busy = owners([replace(workers[0], queued_tokens=5000), *workers[1:]])
    gone = owners(workers[1:])
    moved = {b for b, target in before.items() if target == "0:1"}
    assert moved
    assert all(busy[b] == gone[b] != "0:1" for b in moved), "as if it were not there"
    assert all(busy[b] == gone[b] == before[b] for b in before.keys() - moved)


def test_decode_with_room_before_decode_with_the_prefix() -> None:
    prompt = Prompt(1000, 100)
    holder = a_worker(1, cached_tokens=900)
    free = a_worker(2)
    assert pick_decode(prompt, [holder, free], FLAT, random.Random(0)).candidate is holder
    for full in (replace(holder, free_tokens=100), replace(holder, waiting=True), replace(holder, streams=8)):
        choice = pick_decode(prompt, [full, free], FLAT, random.Random(0))
        assert (choice.candidate, choice.reason) == (free, Reason.SPILL)
    crammed = [a_worker(1, free_tokens=-500), a_worker(2, free_tokens=300), a_worker(3, free_tokens=100)]
    assert pick_decode(prompt, crammed, FLAT, random.Random(0)).candidate is crammed[1]


def test_a_quick_prefill_tier_makes_affinity_of_decode_worth_less() -> None:
    prompt = Prompt(2000, 200)
    holder, free = a_worker(1, cached_tokens=1984, streams=6), a_worker(2)
    assert pick_decode(prompt, [holder, free], FLAT, random.Random(0)).candidate is free
    assert pick_decode(prompt, [replace(holder, streams=1), free], FLAT, random.Random(0)).candidate.target == "1:1"
    quick = pick_decode(prompt, [replace(holder, streams=1), free], FLAT, random.Random(0), remote_seconds=0.01)
    assert quick.candidate is free


def test_ties_are_broken_by_chance() -> None:
    workers = [a_worker(i) for i in range(4)]
    rng = random.Random(1)
    picked = [pick_decode(Prompt(1), workers, Policy(), rng).candidate for _ in range(400)]
    assert all(50 < picked.count(worker) < 150 for worker in workers)


def test_what_is_measured_of_equal_workers_does_not_decide() -> None:
    workers = [a_worker(i, cost=replace(COST, seconds_per_token=0.0001 * (1 + i / 50))) for i in range(4)]
    rng = random.Random(1)
    firsts = {order_prefill(Prompt(2000), workers, FLAT, rng).choices[0].candidate.target for _ in range(100)}
    assert len(firsts) == 4


@pytest.mark.parametrize("target", ["", "host", "host:", ":1", "host:0", "host:99999", "dns:///host", "host:http"])
def test_bad_targets_are_refused_at_start(target: str) -> None:
    with pytest.raises(ValueError, match="neither"):
        check_target(target)
