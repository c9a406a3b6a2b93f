"""Who broke the engine: suspects, one at a time."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from baton.rpc.retry_budget import RetryBudget
from baton.worker.trials import PROOF_TOKENS, Blame, Trials


async def test_one_at_a_time_and_who_got_furthest_first() -> None:
    trials = Trials(60)
    with ExitStack() as stack:
        first, little, much = (stack.enter_context(trials.suspect(delivered)) for delivered in (0, 3, 30))
        turns = [first, little, much]
        assert [trial.turn.is_set() for trial in turns] == [True, False, False]
        trials.got(first, PROOF_TOKENS - 1, finished=False)
        assert not much.turn.is_set()
        trials.got(first, 1, finished=False)
        assert [trial.turn.is_set() for trial in turns] == [True, False, True]
        trials.got(much, 1, finished=True)
        assert little.turn.is_set()


async def test_who_leaves_makes_room_whether_its_turn_had_come_or_not() -> None:
    trials = Trials(60)
    with trials.suspect(0) as on:
        with trials.suspect(5):
            pass
        with ExitStack() as stack:
            last = stack.enter_context(trials.suspect(1))
            assert on.turn.is_set()
            assert not last.turn.is_set()
            trials.got(on, 100, finished=True)
            assert last.turn.is_set()


async def test_the_one_on_trial_is_guilty_and_its_mates_are_not() -> None:
    for guilty_is_first in (True, False):
        trials = Trials(60)
        with trials.suspect(0) as on, trials.suspect(0) as waiting, ExitStack() as stack:
            proven = stack.enter_context(trials.suspect(9))
            blames = {}
            asked = [("on", on, True), ("waiting", waiting, False), ("mate", None, True), ("proven", proven, True)]
            for name, trial, computed in asked if guilty_is_first else reversed(asked):
                blames[name] = trials.blame(trial, computed=computed)
            assert blames == {
                "on": Blame.GUILTY,
                "waiting": Blame.NONE,
                "mate": Blame.NONE,
                "proven": Blame.NONE,
            }


async def test_the_verdict_stands_while_they_leave_one_by_one() -> None:
    """The guilty one is gone and the next one's turn has come before the last mate asks."""
    trials = Trials(60)
    with ExitStack() as stack:
        with trials.suspect(0) as on:
            next_one = stack.enter_context(trials.suspect(0))
            assert trials.blame(on, computed=True) is Blame.GUILTY
        assert next_one.turn.is_set()
        assert trials.blame(next_one, computed=True) is Blame.NONE
        assert trials.blame(None, computed=True) is Blame.NONE


async def test_of_two_on_trial_the_last_to_ask_is_not_guilty_for_being_left() -> None:
    trials = Trials(0.02)
    with ExitStack() as stack:
        with trials.suspect(0) as stuck:
            second = stack.enter_context(trials.suspect(0))
            await asyncio.wait_for(second.turn.wait(), 10)
            assert trials.blame(stuck, computed=True) is Blame.SUSPECT
        assert trials.blame(second, computed=True) is Blame.SUSPECT
        assert trials.blame(None, computed=True) is Blame.SUSPECT


async def test_whose_turn_comes_on_the_dead_engine_is_not_guilty() -> None:
    """The one on trial was answered, or left, first: whoever follows it was not there when the engine died."""
    for first_asks in (True, False):
        trials = Trials(60)
        with ExitStack() as stack:
            with trials.suspect(0) as on:
                next_one = stack.enter_context(trials.suspect(0))
                verdict = trials.blame(on if first_asks else None, computed=True)
                assert verdict is (Blame.GUILTY if first_asks else Blame.NONE)
            assert next_one.turn.is_set()
            assert trials.blame(next_one, computed=True) is Blame.NONE


async def test_without_a_trial_all_that_was_computed_is_suspect() -> None:
    trials = Trials(60)
    assert trials.blame(None, computed=True) is Blame.SUSPECT
    assert trials.blame(None, computed=False) is Blame.NONE
    with trials.suspect(0) as proven:
        trials.got(proven, PROOF_TOKENS, finished=False)
        assert trials.blame(proven, computed=True) is Blame.SUSPECT


async def test_one_that_is_stuck_does_not_hold_the_others_up_and_blurs_the_verdict() -> None:
    trials = Trials(0.02)
    with trials.suspect(0) as stuck, trials.suspect(0) as second, trials.suspect(0) as third:
        await asyncio.wait_for(second.turn.wait(), 10)
        assert trials.blame(second, computed=True) is Blame.SUSPECT
        assert trials.blame(stuck, computed=True) is Blame.SUSPECT
        trials.got(second, PROOF_TOKENS, finished=False)
        assert third.turn.is_set()
        await asyncio.sleep(0.1)
    trials = Trials(0.02)  # to which the death above is not the same
    with trials.suspect(0) as after:
        assert after.turn.is_set()
        assert trials.blame(after, computed=True) is Blame.GUILTY


def test_the_retry_budget_is_a_share_of_the_traffic() -> None:
    budget = RetryBudget(share=0.2, reserve=10)
    assert [budget.spend() for _ in range(12)] == [True] * 10 + [False] * 2
    spent = 0
    for _ in range(1000):
        budget.request()
        spent += budget.spend()
    assert 195 <= spent <= 200
    for _ in range(1000):
        budget.request()
    assert sum(budget.spend() for _ in range(20)) == 10, "what is saved up is bounded"
