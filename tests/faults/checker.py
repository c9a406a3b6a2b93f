"""Judges a history: what was lost, wrong, dishonest, or is still held. Pure.

The definitions are those of the promise: a request is accepted once initial metadata with its id came, and lost when it
was accepted and has no terminal status by its deadline and five seconds.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from tests.faults.history import Asked, Attempt, Chunk, Ended, History, Question, Started, Summed

GRACE = 5.0  # seconds after its deadline at which a request without a status is lost
EARLY = 0.05  # seconds: so much before the deadline its passing may be told, for two clocks that round differently
HONEST = frozenset({"OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"})
"""How a valid, authenticated request may end. All else blames the client for what is not its fault, or is INTERNAL."""


class Wrong(enum.Enum):
    """Ways to break the promise."""

    LOST = "lost"  # accepted, and no status in time
    UNANSWERED = "unanswered"  # not even accepted, and no status in time
    GAP = "gap"  # tokens are missing between two chunks
    REPEAT = "repeat"  # tokens came twice
    DIFFERENT = "different"  # not the reference's tokens
    INCOMPLETE = "incomplete"  # OK, but not the whole answer, or without its summary
    AFTER_END = "after end"  # something came after the summary or the status
    DISHONEST = "dishonest"  # the status does not say what happened
    FAILED = "failed"  # an honest status, but none that this fault allows
    LEAKED = "leaked"  # still held after quiescence


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise.

    Attributes:
        wrong: which.
        request: number of the request; None: it is of a service.
        text: what was seen.
    """

    wrong: Wrong
    request: int | None
    text: str

    def __str__(self) -> str:
        whose = "" if self.request is None else f" request {self.request}:"
        return f"{self.wrong.value}:{whose} {self.text}"


def judge(history: History, allowed: Collection[str] = ("OK",)) -> list[Violation]:
    """All violations of a history.

    Args:
        history: closed.
        allowed: codes with which a patient client's request may end under this fault. One that cancels may always get
            CANCELLED, one whose deadline is meant to pass always DEADLINE_EXCEEDED, or be refused early.
    """
    return [violation for asked in history.requests for violation in _judge(history, asked, frozenset(allowed))]


def _judge(history: History, asked: Asked, allowed: frozenset[str]) -> Iterator[Violation]:
    question = history.book[asked.question]
    have = 0
    for attempt in asked.attempts:
        if attempt.delivered != have:
            raise ValueError(f"request {asked.number}: it resumed from {attempt.delivered} tokens and had {have}")
        for wrong, text in _stream(question, attempt):
            yield Violation(wrong, asked.number, text)
        for wrong, text in _status(question, attempt, history.closed_at):
            yield Violation(wrong, asked.number, text)
        have += len(attempt.tokens)
    last = asked.attempts[-1]
    if last.ended is None:
        return  # lost, or still under way when the history was closed
    code = last.ended.code
    expected = set(allowed)
    if last.cancelled_at is not None:
        expected |= {"CANCELLED", "OK"}
    if asked.kind == "hurried":
        expected |= {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "OK"}
    if code in HONEST and code not in expected:
        yield Violation(Wrong.FAILED, asked.number, f"{code} {last.ended.reason}: {last.ended.details}")


def _stream(question: Question, attempt: Attempt) -> Iterator[tuple[Wrong, str]]:
    """The tokens of one call, and their order."""
    have = attempt.delivered
    summed = ended = False
    for event in attempt.events:
        if ended or (summed and not isinstance(event, Ended)):
            yield Wrong.AFTER_END, f"{event}"
        match event:
            case Chunk(index=index, token_ids=token_ids):
                if index > have:
                    yield Wrong.GAP, f"token {index} after {have}"
                elif index < have:
                    yield Wrong.REPEAT, f"token {index} after {have}"
                expected = question.answer[index : index + len(token_ids)]
                if token_ids != expected:
                    yield Wrong.DIFFERENT, f"tokens from {index} on: {list(token_ids)} instead of {list(expected)}"
                have = index + len(token_ids)
            case Summed():
                summed = True
            case Ended():
                ended = True
            case Started():
                pass


def _status(question: Question, attempt: Attempt, closed_at: float) -> Iterator[tuple[Wrong, str]]:
    """How one call ended, and whether that is true."""
    ended = attempt.ended
    due = attempt.deadline_at + GRACE
    if ended is None:
        if closed_at >= due:
            yield (Wrong.UNANSWERED if attempt.accepted_at is None else Wrong.LOST), "no status"
        return
    if ended.at > due:
        wrong = Wrong.UNANSWERED if attempt.accepted_at is None else Wrong.LOST
        yield wrong, f"status {ended.at - attempt.deadline_at:.1f} s after the deadline"
    if ended.code not in HONEST:
        yield Wrong.DISHONEST, f"{ended.code} {ended.reason}: {ended.details}"
    match ended.code:
        case "OK":
            yield from _whole(question, attempt)
        case "CANCELLED" if attempt.cancelled_at is None:
            yield Wrong.DISHONEST, "CANCELLED, and the client had not cancelled"
        case "DEADLINE_EXCEEDED" if ended.at < attempt.deadline_at - EARLY:
            yield Wrong.DISHONEST, f"DEADLINE_EXCEEDED {attempt.deadline_at - ended.at:.2f} s before the deadline"
        case "RESOURCE_EXHAUSTED" if ended.retry_seconds is None:
            yield Wrong.DISHONEST, "RESOURCE_EXHAUSTED without RetryInfo"


def _whole(question: Question, attempt: Attempt) -> Iterator[tuple[Wrong, str]]:
    summed = attempt.summed
    have = attempt.delivered + len(attempt.tokens)
    if attempt.accepted_at is None:
        yield Wrong.DISHONEST, "OK, and it was never accepted"
    if summed is None:
        yield Wrong.INCOMPLETE, "OK without a summary"
    elif summed.completion_tokens != len(question.answer):
        yield Wrong.INCOMPLETE, f"the summary tells of {summed.completion_tokens} tokens, not {len(question.answer)}"
    if have < len(question.answer):
        yield Wrong.INCOMPLETE, f"OK after {have} of {len(question.answer)} tokens"
    if summed is not None and attempt.cancelled_at is not None and summed.at > attempt.cancelled_at:
        yield Wrong.DISHONEST, "it was cancelled and finished nevertheless"


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds.

    Attributes:
        incarnation: another one: another process, which cannot be compared.
        requests: ids in the engine, of calls in the front, or how many are in flight.
        lacking_slots: KV slots that are not free.
        used_tokens: KV tokens held.
        tasks: asyncio tasks; 0: not told.
        descriptors: open files.
        memory: resident bytes.
    """

    incarnation: str
    requests: int = 0
    lacking_slots: int = 0
    used_tokens: int = 0
    tasks: int = 0
    descriptors: int = 0
    memory: int = 0


SPARE_TASKS = 8  # those that answer the question itself, and that keep up with a peer that is new
SPARE_DESCRIPTORS = 12  # connections that peers hold now and did not before


def leaks(before: Mapping[str, Held], after: Mapping[str, Held]) -> list[Violation]:
    """What services hold after quiescence that they should not; tasks and descriptors against `before`."""
    found: list[str] = []
    for name, held in after.items():
        if held.requests:
            found.append(f"{name} holds {held.requests} requests")
        if held.lacking_slots or held.used_tokens:
            found.append(f"{name} holds {held.lacking_slots} slots, {held.used_tokens} tokens of KV")
        base = before.get(name)
        if base is None or base.incarnation != held.incarnation:
            continue
        if held.tasks > base.tasks + SPARE_TASKS:
            found.append(f"{name} has {held.tasks} tasks, {base.tasks} before")
        if held.descriptors > base.descriptors + SPARE_DESCRIPTORS:
            found.append(f"{name} has {held.descriptors} descriptors, {base.descriptors} before")
    return [Violation(Wrong.LEAKED, None, text) for text in found]
