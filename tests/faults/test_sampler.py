"""When a cancelled request was gone is never told too early."""

from __future__ import annotations

from typing import cast

import pytest

from tests.faults.bed import Bed
from tests.faults.history import Asked, Attempt, Ended, History, Question
from tests.faults.sampler import Look, Sampler

HELD, FREE = frozenset({"r"}), frozenset({"other"})


def a_sampler(**looks: list[Look]) -> Sampler:
    return Sampler(cast(Bed, None), {name.replace("_", "-"): list(told) for name, told in looks.items()})


def a_history(**fields: object) -> History:
    attempt = Attempt("r", "router", asked_at=0.0, deadline_at=60.0, **fields)  # type: ignore[arg-type]
    return History((Question(0, (1,), {}),), [Asked(0, 0, attempts=[attempt])])


def test_freed_when_the_last_worker_says_so() -> None:
    sampler = a_sampler(
        prefill_0=[Look(0.9, 0.95, HELD), Look(1.0, 1.05, HELD), Look(1.1, 1.15, FREE)],
        decode_0=[Look(1.0, 1.02, HELD), Look(1.2, 1.22, HELD), Look(1.4, 1.45, FREE)],
    )
    assert list(sampler.freed_after(a_history(cancelled_at=1.0))) == [pytest.approx(0.45)]


def test_a_look_that_was_under_way_at_the_cancel_proves_nothing() -> None:
    """It was asked before: what it says may have been true before, and not hold yet."""
    sampler = a_sampler(decode_0=[Look(0.9, 1.1, FREE), Look(1.2, 1.25, HELD), Look(1.3, 1.35, FREE)])
    (took,) = sampler.freed_after(a_history(cancelled_at=1.0))
    assert abs(took - 0.35) < 1e-9


def test_one_that_is_never_freed_took_for_ever() -> None:
    sampler = a_sampler(decode_0=[Look(1.1, 1.2, HELD), Look(1.3, 1.4, HELD)])
    assert list(sampler.freed_after(a_history(cancelled_at=1.0))) == [float("inf")]


def test_one_that_no_worker_held_says_nothing() -> None:
    sampler = a_sampler(decode_0=[Look(0.5, 0.6, HELD), Look(1.1, 1.2, FREE)])
    assert list(sampler.freed_after(a_history(cancelled_at=1.0))) == []
    assert list(sampler.freed_after(a_history())) == []


def test_a_deadline_counts_like_a_cancel() -> None:
    sampler = a_sampler(decode_0=[Look(60.0, 60.1, HELD), Look(60.2, 60.25, FREE)])
    (took,) = sampler.freed_after(a_history(), by_deadline=True)
    assert abs(took - 0.25) < 1e-9


def test_orphans_are_calls_that_a_fault_ended() -> None:
    sampler = a_sampler(decode_0=[Look(2.1, 2.2, HELD), Look(2.3, 2.4, FREE)])
    lost = a_history(events=[Ended(2.05, "UNAVAILABLE")])
    (took,) = sampler.orphans_after(lost, since=2.0)
    assert abs(took - 0.4) < 1e-9
    assert list(sampler.orphans_after(a_history(events=[Ended(2.05, "OK")]), since=2.0)) == []
