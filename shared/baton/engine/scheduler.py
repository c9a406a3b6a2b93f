"""What runs in the next step: pure decisions over requests and a budget. No torch, no clock, no I/O.

Every request has `computed` tokens and catches up to all its tokens; a request in decode is one token behind, a new one
a whole prompt. A step first gives every decoding request its token, then fills up with prompt chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from baton.engine.growth import AnswerLengths, Growth, peak_blocks
from baton.engine.messages import Role
from baton.engine.prefix import PrefixIndex
from baton.engine.request import Request, State
from baton.engine.slots import Slots


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler has to spend."""

    step_tokens: int
    block_tokens: int
    capacity_blocks: int
    aging_ns: int

    def blocks(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_tokens)


@dataclass(frozen=True, slots=True)
class Work:
    """Compute the KV of tokens [start, start + count) of a request in this step."""

    request: Request
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the last token's logits give the request its next token."""
        return self.start + self.count == len(self.request.tokens)

    @property
    def decodes(self) -> bool:
        """Whether it continues an answer by one token, rather than computing a prompt or recomputing."""
        return self.count == 1 and self.samples and self.request.num_generated > 0


@dataclass(slots=True)
class Plan:
    """One step."""

    work: list[Work] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    prefill_tokens: int = 0  # tokens in chunks, of prompts and of recomputed requests
    decode_requests: int = 0  # requests that go on by one token
    looked_up_tokens: int = 0  # of admitted requests that may share prefixes
    hit_tokens: int = 0  # of those, found


class Scheduler:
    """Owns the queue and hands the slots out. `free` is the only way anything comes back.

    What `schedule` and `free` decide about memory waits in `slots` as operations, and is to be carried out after each.

    Args:
        limits: what there is to spend.
        num_slots: slots of the pool.
        prefixes: what slots may keep for later requests; None: nothing.

    Attributes:
        lengths: of answers so far: what is expected of others.
    """

    def __init__(self, limits: Limits, num_slots: int, prefixes: PrefixIndex | None = None) -> None:
        self.limits = limits
        self.slots = Slots(num_slots, limits.capacity_blocks, prefixes)
        self.waiting: list[Request] = []
        self.holding: list[Request] = []  # RESERVED, RUNNING and HELD, in order of admission
        self.lengths = AnswerLengths()

    def has_work(self, now_ns: int) -> bool:
        """Whether a step would compute or admit something."""
        if any(r.state is State.RUNNING for r in self.holding):
            return True
        return bool(self.waiting) and self._fits(min(self.waiting, key=self._urgency(now_ns)))

    @property
    def waiting_prompt_tokens(self) -> int:
        """Tokens of prompts, and of requests to be recomputed, that later steps have to compute."""
        running = sum(r.pending for r in self.holding if r.state is State.RUNNING and r.pending > 1)
        # Whether a prompt that may come from elsewhere is computed here is not known before it has a slot.
        return running + sum(r.pending for r in self.waiting if r.role is not Role.RECEIVE or r.preemptions)

    def submit(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def schedule(self, now_ns: int) -> Plan:
        """Decide the next step. Slots and blocks of what is admitted are taken, of what is preempted given back."""
        plan = Plan()
        budget = self.limits.step_tokens
        for request in sorted((r for r in self.holding if r.state is State.RUNNING), key=self._urgency(now_ns)):
            if request.state is not State.RUNNING or request.pending != 1:
                continue  # preempted for a more urgent one, or still in its prompt
            if budget and self._grow(request, plan, now_ns):
                plan.work.append(Work(request, request.computed, 1))
                budget -= 1
        budget = self._chunks(plan, budget, now_ns)
        self._admit(plan, now_ns)
        self._chunks(plan, budget, now_ns)
        plan.decode_requests = sum(work.decodes for work in plan.work)
        plan.prefill_tokens = sum(work.count for work in plan.work if not work.decodes)
        return plan

    def completed(self, request: Request) -> None:
        """An answer came to its own end: others may be expected to get as long."""
        self.lengths.ended(request.num_generated)

    def expected_growth(self, request: Request) -> int:
        """Tokens that a request is expected to grow by beyond the next one, for which it has room."""
        if request.role is Role.PREFILL:
            return 0
        generated = request.num_generated
        return max(0, self.lengths.expected(generated, request.sampling.max_tokens) - generated - 1)

    def free(self, request: Request) -> None:
        """Take everything back from a request, whatever its state. Idempotent."""
        if request.state is State.WAITING and request in self.waiting:
            self.waiting.remove(request)
        if request.slot >= 0:
            self.holding.remove(request)
            self.slots.give(request)
        request.state = State.FINISHED

    def _chunks(self, plan: Plan, budget: int, now_ns: int) -> int:
        planned = {work.request.sequence for work in plan.work}
        running = (r for r in self.holding if r.state is State.RUNNING and r.sequence not in planned)
        # One that lacks a single token went first if it was here; a prefix may have left a new one no more than that.
        behind = [r for r in running if r.pending > 1 or r in plan.admitted]
        for request in sorted(behind, key=self._urgency(now_ns)):
            if not budget:
                break
            count = min(request.pending, budget)
            plan.work.append(Work(request, request.computed, count))
            budget -= count
        return budget

    def _admit(self, plan: Plan, now_ns: int) -> None:
        """Give slots to waiting requests, most urgent first, as long as memory lasts. Nobody overtakes for memory."""
        for request in sorted(self.waiting, key=self._urgency(now_ns)):
            if request in plan.preempted or not self._fits(request):
                break
            self.waiting.remove(request)
            self.slots.take(request, self._needed(request))
            if self.slots.looks_up(request):
                plan.looked_up_tokens += len(request.tokens)
                plan.hit_tokens += request.hit
            # A preempted request recomputes here, whoever computed its prompt at first.
            foreign = request.role is Role.RECEIVE and not request.preemptions
            request.state = State.RESERVED if foreign else State.RUNNING
            self.holding.append(request)
            plan.admitted.append(request)

    def _grow(self, request: Request, plan: Plan, now_ns: int) -> bool:
        """Room for one more token, taken from the least urgent if need be. False: the request itself had to go."""
        needed = self._needed(request)
        while needed > request.blocks:
            if self.slots.can_grow(needed - request.blocks):
                self.slots.grow(request, needed)
                break
            victim = max(
                (r for r in self.holding if r.preemptible), key=self._urgency(now_ns)
            )  # at least the request itself
            self._preempt(victim, plan)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request, plan: Plan) -> None:
        self.holding.remove(request)
        plan.preempted.append(request)
        self.slots.give(request)
        request.state = State.WAITING
        request.preemptions += 1
        self.waiting.append(request)

    def _needed(self, request: Request) -> int:
        """Blocks for all its tokens and the next one."""
        return self.limits.blocks(len(request.tokens) + 1)

    def _fits(self, request: Request) -> bool:
        """Whether there is memory for it now, and will be for it and all that hold some until they end.

        One that is alone is let in with what it needs now: nobody else will make room.
        """
        needed = self._needed(request)
        if not self.slots.fits(needed):
            return False
        growing = [
            Growth(needed, self.expected_growth(request)),
            *(Growth(r.blocks, self.expected_growth(r)) for r in self.holding),
        ]
        return len(growing) == 1 or peak_blocks(growing, self.limits.block_tokens) <= self.limits.capacity_blocks

    def _urgency(self, now_ns: int) -> Callable[[Request], tuple[int, int]]:
        """Sort key, most urgent first: priority, raised while it waits, then order of arrival."""
        aging = self.limits.aging_ns

        def key(request: Request) -> tuple[int, int]:
            return -(request.priority + (now_ns - request.arrival_ns) // aging), request.sequence

        return key
