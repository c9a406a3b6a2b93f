"""What a run of requests saw, as a client sees it. Data only; times are seconds of one monotonic clock."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Question:
    """A request whose answer is known.

    Attributes:
        number: its place in the book.
        prompt: token ids.
        sampling: fields of SamplingParams; a seed is among them.
        answer: the tokens of the single-process reference.
    """

    number: int
    prompt: tuple[int, ...]
    sampling: dict[str, float | int | bool]
    answer: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """The stream's first message came."""

    at: float
    request_id: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens came."""

    at: float
    index: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Summed:
    """The stream's last message came.

    Attributes:
        remote: whether a prefill worker computed the prompt.
        from_cache: whether the response cache or another request's generation answered.
        seconds: of the ledger, by kind.
    """

    at: float
    finish_reason: str
    completion_tokens: int
    migrations: int = 0
    preemptions: int = 0
    remote: bool = False
    from_cache: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ended:
    """The call's status came.

    Attributes:
        code: name of the gRPC status.
        reason: of its ErrorInfo; empty: it has none.
        retry_seconds: of its RetryInfo; None: it has none.
    """

    at: float
    code: str
    reason: str = ""
    retry_seconds: float | None = None
    details: str = ""


Event = Started | Chunk | Summed | Ended


@dataclass(slots=True)
class Attempt:
    """One call.

    Attributes:
        request_id: what the client called it.
        router: which one was asked.
        asked_at: when.
        deadline_at: of the call.
        delivered: tokens of the answer that the client had before, and resumed from.
        accepted_at: when initial metadata with a request id came; None: they did not.
        cancelled_at: when the client cancelled; None: it did not.
        events: in the order in which they came.
    """

    request_id: str
    router: str
    asked_at: float
    deadline_at: float
    delivered: int = 0
    accepted_at: float | None = None
    cancelled_at: float | None = None
    events: list[Event] = field(default_factory=list)

    @property
    def chunks(self) -> list[Chunk]:
        return [event for event in self.events if isinstance(event, Chunk)]

    @property
    def ended(self) -> Ended | None:
        """Its first status; None: it has none."""
        return next((event for event in self.events if isinstance(event, Ended)), None)

    @property
    def summed(self) -> Summed | None:
        return next((event for event in self.events if isinstance(event, Summed)), None)

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]


@dataclass(slots=True)
class Asked:
    """A client's request: one call, and more where the client went on after one that was lost.

    Attributes:
        number: its place in the history.
        question: its place in the book.
        kind: what sort of client this is: "patient", "cancels", "slow", "never reads", "hurried".
        attempts: in order.
    """

    number: int
    question: int
    kind: str = "patient"
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def code(self) -> str:
        """How it ended; empty: it did not."""
        ended = self.attempts[-1].ended if self.attempts else None
        return ended.code if ended else ""

    @property
    def tokens(self) -> list[int]:
        """All it got."""
        return [token for attempt in self.attempts for token in attempt.tokens]

    @property
    def first_token_seconds(self) -> float | None:
        """From being asked to the first token."""
        for attempt in self.attempts:
            for chunk in attempt.chunks:
                if chunk.token_ids:
                    return chunk.at - self.attempts[0].asked_at
        return None

    def gaps(self) -> Iterator[tuple[float, float]]:
        """When a silence between two chunks began, and how long it was, over all attempts."""
        chunks = [chunk for attempt in self.attempts for chunk in attempt.chunks if chunk.token_ids]
        for one, other in itertools.pairwise(chunks):
            yield one.at, other.at - one.at


@dataclass(slots=True)
class History:
    """All requests of a run.

    Attributes:
        book: the questions.
        requests: in the order in which they were asked.
        closed_at: when the run was over: nothing is expected any more.
    """

    book: tuple[Question, ...]
    requests: list[Asked] = field(default_factory=list)
    closed_at: float = 0.0

    def codes(self) -> dict[str, int]:
        """Requests by how they ended."""
        counts: dict[str, int] = {}
        for asked in self.requests:
            counts[asked.code or "none"] = counts.get(asked.code or "none", 0) + 1
        return counts
