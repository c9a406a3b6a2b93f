"""The state of one request in the engine."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from baton.engine.messages import FinishReason, PromptChunk, Role, SamplingParams, Submit
from baton.engine.penalties import PenaltyState, needs_history


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

    Invariants: 0 <= hit <= proven <= computed <= len(tokens), until it fails; a slot is held exactly in RESERVED,
    RUNNING and HELD.
    """

    request_id: str
    role: Role
    tokens: list[int]  # prompt, then generated tokens
    num_prompt: int
    sampling: SamplingParams
    stop_ids: tuple[int, ...]  # tokens that end it: the model's, unless ignored, and its own
    priority: int
    start_token: int
    arrival_ns: int
    sequence: int  # order of arrival, breaks ties
    state: State = State.WAITING
    slot: int = -1
    blocks: int = 0  # KV blocks counted against the pool's capacity
    prefix_cache: bool = True  # it may use what others computed, and leave what it computed to others
    cache_salt: bytes = b""  # of those others: only such with the same salt
    digests: list[bytes] = field(default_factory=list, repr=False)  # of its first whole blocks, as far as needed so far
    computed: int = 0  # tokens whose KV lies in the slot
    proven: int = 0  # of these, the first ones that are known to be finite
    hit: int = 0  # of these, those that lay in the slot when it was admitted
    preemptions: int = 0
    compute_ns: int = 0
    queue_ns: int = 0
    since_ns: int = 0  # since when the time is not yet in either sum
    chunks: list[PromptChunk] = field(default_factory=list)  # computed, and not told of yet
    penalties: PenaltyState = field(default_factory=PenaltyState, repr=False)

    @classmethod
    def of(cls, command: Submit, eos_token_ids: tuple[int, ...], now_ns: int, sequence: int) -> Request:
        """A request that has just come.

        Args:
            command: what was asked.
            eos_token_ids: of the model.
            now_ns: CLOCK_MONOTONIC.
            sequence: order of arrival.
        """
        sampling = command.sampling
        return cls(
            request_id=command.request_id,
            role=command.role,
            tokens=list(command.token_ids),
            num_prompt=command.num_prompt_tokens,
            sampling=sampling,
            stop_ids=sampling.stop_token_ids if sampling.ignore_eos else sampling.stop_token_ids + eos_token_ids,
            priority=command.priority,
            start_token=command.start_token,
            arrival_ns=now_ns,
            sequence=sequence,
            since_ns=now_ns,
            prefix_cache=command.prefix_cache,
            cache_salt=command.cache_salt,
        )

    @classmethod
    def probe(cls, tokens: list[int], role: Role, sampling: SamplingParams) -> Request:
        """A request that no queue knows, to run tokens by hand."""
        return cls(
            request_id="", role=role, tokens=tokens, num_prompt=len(tokens), sampling=sampling, stop_ids=(),
            priority=0, start_token=0, arrival_ns=0, sequence=-1,
        )  # fmt: skip

    @property
    def pending(self) -> int:
        """Tokens whose KV is still to be computed; the last one's logits give the next token."""
        return len(self.tokens) - self.computed

    @property
    def prompt(self) -> list[int]:
        """Its prompt; empty unless penalties look at it."""
        return self.tokens[: self.num_prompt] if needs_history(self.sampling) else []

    @property
    def output(self) -> list[int]:
        """Its generated tokens; empty unless penalties look at them."""
        return self.tokens[self.num_prompt :] if needs_history(self.sampling) else []

    @property
    def num_generated(self) -> int:
        """Generated tokens, those of an earlier attempt included."""
        return len(self.tokens) - self.num_prompt

    @property
    def preemptible(self) -> bool:
        """Whether its slot may be taken: nobody outside the engine reads or writes it."""
        return self.state is State.RUNNING and self.role is not Role.PREFILL

    @property
    def blocked(self) -> tuple[int, ...]:
        """Tokens that must not come next: those that would end it before min_tokens were generated."""
        return self.stop_ids if self.num_generated < self.sampling.min_tokens else ()

    def finish_reason(self, max_tokens_of_all: int) -> FinishReason | None:
        """Whether its last token, a generated one, ends it.

        Args:
            max_tokens_of_all: prompt and output together, what a slot and the model's context hold.
        """
        if self.tokens[-1] in self.stop_ids:
            return FinishReason.STOP
        if self.num_generated >= self.sampling.max_tokens or len(self.tokens) >= max_tokens_of_all:
            return FinishReason.LENGTH
        return None

    def untold_chunks(self) -> list[PromptChunk]:
        """The chunks not told of yet, which are told now."""
        chunks, self.chunks = self.chunks, []
        return chunks

    def served(self, started_ns: int, ended_ns: int, chunk_tokens: int) -> None:
        """A step computed for it: what passed before was queueing.

        Args:
            started_ns: when the step began.
            ended_ns: when it ended.
            chunk_tokens: tokens of its prompt in the step; 0: it went on by a token.
        """
        if chunk_tokens:
            self.chunks.append(PromptChunk(started_ns, ended_ns, chunk_tokens))
        self.queue_ns += max(0, started_ns - self.since_ns)
        self.compute_ns += ended_ns - started_ns
        self.since_ns = ended_ns
