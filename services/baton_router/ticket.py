"""A request that asks for a place at the workers, from its arrival to its end. Plain state: `ModelQueue` moves it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.rpc.errors import BatonError
from baton_router.fair_queue import Entry


class State(enum.Enum):
    """Where a request is in its life here."""

    WAITING = enum.auto()
    HELD = enum.auto()  # it has a place
    REFUSED = enum.auto()
    GONE = enum.auto()


class Shed(enum.StrEnum):
    """Why a request was refused."""

    QUEUE_FULL = "queue_full"
    QUEUE_TIME = "queue_time"
    DEADLINE = "deadline"


@dataclass(eq=False, slots=True)
class Ticket(Entry):
    """A request in the queue, and later at the workers.

    Attributes:
        prompt_tokens: 1 or more.
        cached_tokens: of these, that some worker has in its prefix cache.
        max_tokens: of the answer that is still to come, 1 or more.
        deadline: when the first token is worthless, seconds on the queue's clock; it may move.
        error: why it was refused, to be raised.
        shed: the same in a word.
        queued: seconds it waited.
    """

    prompt_tokens: int = 1
    cached_tokens: int = 0
    max_tokens: int = 1
    deadline: Callable[[], float] = field(default=lambda: float("inf"))
    state: State = State.WAITING
    error: BatonError | None = None
    shed: Shed | None = None
    queued: float = 0.0
    kv_tokens: float = 0.0
    worker: str = ""  # incarnation of the decode worker that has it; empty: it is on its way to one
    predicted: float | None = None  # seconds from its place to its first token, before the learned ratio
    taken_at: float = 0.0
    generated: int = 0
    answered: bool = False

    @property
    def computed_tokens(self) -> int:
        """Of its prompt, that have to be computed."""
        return self.prompt_tokens - self.cached_tokens
