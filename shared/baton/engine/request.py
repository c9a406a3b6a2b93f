"""The state of one request in the engine."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from baton.engine.messages import Role, SamplingParams


class State(enum.Enum):
    """Where a request is in its life."""

    WAITING = enum.auto()  # holds nothing
    RESERVED = enum.auto()  # holds a slot; the front writes its KV
    RUNNING = enum.auto()  # holds a slot; catches up to its tokens, then grows
    HELD = enum.auto()  # PREFILL, computed; the front may still read its KV
    FINISHED = enum.auto()  # holds nothing, and never will again


@dataclass(slots=True, eq=False)
class Request:
    """One request. The scheduler reads and moves it, the runner computes its next tokens.

    Invariants: 0 <= computed <= len(tokens); a slot is held exactly in RESERVED, RUNNING and HELD.
    """

    request_id: str
    role: Role
    tokens: list[int]  # prompt, then generated tokens
    num_prompt: int
    sampling: SamplingParams
    priority: int
    start_token: int
    arrival_ns: int
    sequence: int  # order of arrival, breaks ties
    state: State = State.WAITING
    slot: int = -1
    blocks: int = 0  # KV blocks counted against the pool's capacity
    computed: int = 0  # tokens whose KV lies in the slot
    preemptions: int = 0
    compute_ns: int = 0
    queue_ns: int = 0
    since_ns: int = 0  # since when the time is not yet in either sum
    counts: dict[int, int] = field(default_factory=dict)  # generated token -> occurrences, for penalties

    @property
    def pending(self) -> int:
        """Tokens whose KV is still to be computed; the last one's logits give the next token."""
        return len(self.tokens) - self.computed

    @property
    def num_generated(self) -> int:
        """Generated tokens, those of an earlier attempt included."""
        return len(self.tokens) - self.num_prompt

    @property
    def preemptible(self) -> bool:
        """Whether its slot may be taken: nobody outside the engine reads or writes it."""
        return self.state is State.RUNNING and self.role is not Role.PREFILL

    def append(self, token: int) -> None:
        """Add a generated token."""
        self.tokens.append(token)
        self.counts[token] = self.counts.get(token, 0) + 1
