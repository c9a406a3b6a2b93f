"""The history checker can fail: every way to break the promise, put into an honest history, is found and named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.faults.checker import GRACE, Held, Wrong, judge, leaks
from tests.faults.history import Asked, Attempt, Chunk, Ended, History, Question, Started, Summed


@st.composite
def honest(draw: st.DrawFn) -> History:
    """Requests as they should be: whole ones, resumed ones, and ones that were cancelled or ran out of time."""
    answers = draw(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=9), min_size=1, max_size=4))
    book = tuple(Question(i, (5, 6), {"seed": i}, tuple(answer)) for i, answer in enumerate(answers))
    requests = []
    for number, question in enumerate(book):
        ending = draw(st.sampled_from(["OK", "resumed", "CANCELLED", "DEADLINE_EXCEEDED"]))
        kind = {"CANCELLED": "cancels", "DEADLINE_EXCEEDED": "hurried"}.get(ending, "patient")
        asked = Asked(number, number, kind)
        cut = draw(st.integers(1, len(question.answer) - 1))
        if ending in ("OK", "resumed"):
            start = cut if ending == "resumed" else 0
            if start:
                asked.attempts.append(_attempt(draw, question, 0, start, "UNAVAILABLE"))
            asked.attempts.append(_attempt(draw, question, start, len(question.answer), "OK"))
        else:
            asked.attempts.append(_attempt(draw, question, 0, cut, ending))
        requests.append(asked)
    return History(book, requests, closed_at=1000.0)


def _attempt(draw: st.DrawFn, question: Question, first: int, last: int, code: str) -> Attempt:
    attempt = Attempt(f"r{question.number}", "router", asked_at=0.0, deadline_at=60.0, delivered=first, accepted_at=0.1)
    attempt.events.append(Started(0.2, attempt.request_id))
    at, index = 1.0, first
    while index < last:
        count = draw(st.integers(1, last - index))
        attempt.events.append(Chunk(at, index, question.answer[index : index + count]))
        at, index = at + 0.1, index + count
    if code == "OK":
        attempt.events.append(Summed(at, "FINISH_REASON_LENGTH", len(question.answer)))
    if code == "CANCELLED":
        attempt.cancelled_at = at
    attempt.events.append(Ended(60.01 if code == "DEADLINE_EXCEEDED" else at + 0.1, code))
    return attempt


@given(honest())
def test_what_is_honest_is_not_blamed(history: History) -> None:
    assert judge(history) == []


# ------------------------------------------------------------------------------------------------ mutants


def _chunk_at(attempt: Attempt) -> int:
    return max(i for i, event in enumerate(attempt.events) if isinstance(event, Chunk))


def _change(attempt: Attempt, place: int, **fields: object) -> None:
    attempt.events[place] = replace(attempt.events[place], **fields)  # type: ignore[type-var,arg-type]


def skip_a_token(attempt: Attempt) -> None:
    at = _chunk_at(attempt)
    chunk = attempt.events[at]
    assert isinstance(chunk, Chunk)
    _change(attempt, at, index=chunk.index + 1)


def drop_the_first_chunk(attempt: Attempt) -> None:
    """Only where another follows it: else it is an answer that is not whole."""
    chunks = attempt.chunks
    if len(chunks) > 1:
        attempt.events.remove(chunks[0])
    else:
        skip_a_token(attempt)


def repeat_a_chunk(attempt: Attempt) -> None:
    at = _chunk_at(attempt)
    attempt.events.insert(at + 1, attempt.events[at])


def change_a_token(attempt: Attempt) -> None:
    at = _chunk_at(attempt)
    chunk = attempt.events[at]
    assert isinstance(chunk, Chunk)
    _change(attempt, at, token_ids=(*chunk.token_ids[:-1], chunk.token_ids[-1] + 1))


def add_a_token(attempt: Attempt) -> None:
    """More than the whole answer."""
    at = _chunk_at(attempt)
    chunk = attempt.events[at]
    assert isinstance(chunk, Chunk)
    attempt.events.insert(at + 1, Chunk(chunk.at, chunk.index + len(chunk.token_ids), (1, 2, 3, 4, 5, 6, 7, 8, 9)))


def say_nothing_more(attempt: Attempt) -> None:
    del attempt.events[-1]


def say_it_late(attempt: Attempt) -> None:
    _change(attempt, -1, at=attempt.deadline_at + GRACE + 1)


def never_accept(attempt: Attempt) -> None:
    attempt.accepted_at = None
    del attempt.events[-1]


def chunk_after_the_status(attempt: Attempt) -> None:
    attempt.events.append(attempt.events[_chunk_at(attempt)])


def two_statuses(attempt: Attempt) -> None:
    attempt.events.append(attempt.events[-1])


def chunk_after_the_summary(attempt: Attempt) -> None:
    summary = next(i for i, event in enumerate(attempt.events) if isinstance(event, Summed))
    attempt.events.insert(summary + 1, Chunk(5.0, 0, ()))


def no_summary(attempt: Attempt) -> None:
    attempt.events = [event for event in attempt.events if not isinstance(event, Summed)]


def wrong_usage(attempt: Attempt) -> None:
    at = next(i for i, event in enumerate(attempt.events) if isinstance(event, Summed))
    _change(attempt, at, completion_tokens=1)


def stop_early(attempt: Attempt) -> None:
    del attempt.events[_chunk_at(attempt)]


def internal(attempt: Attempt) -> None:
    _change(attempt, -1, code="INTERNAL")


def blame_the_client(attempt: Attempt) -> None:
    _change(attempt, -1, code="INVALID_ARGUMENT")


def cancelled_by_nobody(attempt: Attempt) -> None:
    attempt.cancelled_at = None
    _change(attempt, -1, code="CANCELLED")


def deadline_that_did_not_pass(attempt: Attempt) -> None:
    _change(attempt, -1, code="DEADLINE_EXCEEDED", at=attempt.deadline_at - 1)


def shed_without_advice(attempt: Attempt) -> None:
    _change(attempt, -1, code="RESOURCE_EXHAUSTED")


def shed(attempt: Attempt) -> None:
    _change(attempt, -1, code="RESOURCE_EXHAUSTED", retry_seconds=1.0)


def unavailable(attempt: Attempt) -> None:
    _change(attempt, -1, code="UNAVAILABLE")


def finish_though_cancelled(attempt: Attempt) -> None:
    attempt.cancelled_at = 0.5


ANY = ("OK", "resumed", "CANCELLED", "DEADLINE_EXCEEDED")
WHOLE = ("OK",)
MUTANTS: list[tuple[Callable[[Attempt], None], Wrong, tuple[str, ...]]] = [
    (skip_a_token, Wrong.GAP, ANY),
    (drop_the_first_chunk, Wrong.GAP, ANY),
    (repeat_a_chunk, Wrong.REPEAT, ANY),
    (change_a_token, Wrong.DIFFERENT, ANY),
    (add_a_token, Wrong.DIFFERENT, ANY),
    (say_nothing_more, Wrong.LOST, ANY),
    (say_it_late, Wrong.LOST, ANY),
    (never_accept, Wrong.UNANSWERED, ANY),
    (chunk_after_the_status, Wrong.AFTER_END, ANY),
    (two_statuses, Wrong.AFTER_END, ANY),
    (chunk_after_the_summary, Wrong.AFTER_END, WHOLE),
    (no_summary, Wrong.INCOMPLETE, WHOLE),
    (wrong_usage, Wrong.INCOMPLETE, WHOLE),
    (stop_early, Wrong.INCOMPLETE, WHOLE),
    (internal, Wrong.DISHONEST, ANY),
    (blame_the_client, Wrong.DISHONEST, ANY),
    (cancelled_by_nobody, Wrong.DISHONEST, ANY),
    (deadline_that_did_not_pass, Wrong.DISHONEST, ANY),
    (shed_without_advice, Wrong.DISHONEST, ANY),
    (finish_though_cancelled, Wrong.DISHONEST, WHOLE),
    (shed, Wrong.FAILED, WHOLE),
    (unavailable, Wrong.FAILED, WHOLE),
]


@pytest.mark.parametrize(("mutate", "wrong", "endings"), MUTANTS, ids=[mutant[0].__name__ for mutant in MUTANTS])
@settings(max_examples=15)
@given(history=honest(), data=st.data())
def test_every_broken_promise_is_found(
    mutate: Callable[[Attempt], None], wrong: Wrong, endings: tuple[str, ...], history: History, data: st.DataObject
) -> None:
    fitting = [asked for asked in history.requests if endings == ANY or asked.code in endings]
    assume(fitting)
    broken = copy.deepcopy(history)
    victim = broken.requests[data.draw(st.sampled_from(fitting)).number]
    mutate(victim.attempts[-1])
    found = judge(broken)
    assert wrong in {violation.wrong for violation in found}
    assert {violation.request for violation in found} == {victim.number}, "nobody else is blamed"


def test_what_this_fault_allows_is_allowed() -> None:
    book = (Question(0, (1,), {}, (7, 8)),)
    attempt = Attempt("r", "router", 0.0, 60.0, accepted_at=0.1, events=[Ended(1.0, "UNAVAILABLE")])
    history = History(book, [Asked(0, 0, attempts=[attempt])], closed_at=100.0)
    assert [violation.wrong for violation in judge(history)] == [Wrong.FAILED]
    assert judge(history, allowed=("OK", "UNAVAILABLE")) == []


def test_a_request_still_within_its_time_is_not_lost() -> None:
    attempt = Attempt("r", "router", 0.0, 60.0, accepted_at=0.1)
    history = History((Question(0, (1,), {}, (7,)),), [Asked(0, 0, attempts=[attempt])], closed_at=64.0)
    assert judge(history) == []
    history.closed_at = 66.0
    assert [violation.wrong for violation in judge(history)] == [Wrong.LOST]


def test_a_history_that_forgets_what_a_client_had_is_no_history() -> None:
    attempts = [
        Attempt("a", "router", 0.0, 60.0, accepted_at=0.1, events=[Chunk(1.0, 0, (7,)), Ended(2.0, "UNAVAILABLE")]),
        Attempt("b", "router", 3.0, 60.0, accepted_at=3.1, delivered=0, events=[Ended(4.0, "UNAVAILABLE")]),
    ]
    with pytest.raises(ValueError, match="resumed from 0 tokens and had 1"):
        judge(History((Question(0, (1,), {}, (7, 8)),), [Asked(0, 0, attempts=attempts)], closed_at=100.0))


@pytest.mark.parametrize(
    ("after", "text"),
    [
        (Held("a", requests=1), "w holds 1 requests"),
        (Held("a", lacking_slots=2), "w holds 2 slots, 0 tokens of KV"),
        (Held("a", used_tokens=5), "w holds 0 slots, 5 tokens of KV"),
        (Held("a", tasks=40), "w has 40 tasks, 20 before"),
        (Held("a", descriptors=90), "w has 90 descriptors, 30 before"),
        (Held("b", requests=3), "w holds 3 requests"),
    ],
)
def test_what_is_still_held_is_a_leak(after: Held, text: str) -> None:
    (violation,) = leaks({"w": Held("a", tasks=20, descriptors=30)}, {"w": after})
    assert (violation.wrong, violation.text) == (Wrong.LEAKED, text)


def test_another_process_is_not_compared_with_the_one_before() -> None:
    assert leaks({"w": Held("a", tasks=20)}, {"w": Held("b", tasks=90), "new": Held("c", tasks=5)}) == []
    assert leaks({"w": Held("a", tasks=20)}, {"w": Held("a", tasks=22)}) == []
