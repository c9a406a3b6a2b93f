"""What runs in the next step: pure decisions over requests and a budget. No torch, no clock, no I/O.

Every request has `computed` tokens and catches up to all its tokens; a request in decode is one token behind, a new one
a whole prompt. A step first gives every decoding request its token, then fills up with prompt chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from baton.engine.messages import Role
from baton.engine.request import Request, State


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
    preempted: dict[Request, int] = field(default_factory=dict)  # request -> the slot it lost
    prefill_tokens: int = 0  # tokens in chunks, of prompts and of recomputed requests
    decode_requests: int = 0  # requests that go on by one token


class Scheduler:
    """Owns the queue, the slots' numbers and the block budget. `free` is the only way anything comes back.

    Args:
        limits: what there is to spend.
        num_slots: slots of the pool.
    """

    def __init__(self, limits: Limits, num_slots: int) -> None:
        self.limits = limits
        self.num_slots = num_slots
        self.waiting: list[Request] = []
        self.holding: list[Request] = []  # RESERVED, RUNNING and HELD, in order of admission
        self.used_blocks = 0
        self._free_slots = list(range(num_slots - 1, -1, -1))  # the lowest number is taken first: slots stay dense

    @property
    def free_slots(self) -> int:
        """Slots nobody holds."""
        return len(self._free_slots)

    def has_work(self, now_ns: int) -> bool:
        """Whether a step would compute or admit something."""
        if any(r.state is State.RUNNING for r in self.holding):
            return True
        return bool(self.waiting) and self._fits(min(self.waiting, key=self._urgency(now_ns)))

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

    def free(self, request: Request) -> None:
        """Take everything back from a request, whatever its state. Idempotent."""
        if request.state is State.WAITING and request in self.waiting:
            self.waiting.remove(request)
        if request.slot >= 0:
            self.holding.remove(request)
            self._release(request)
        request.state = State.FINISHED

    def _chunks(self, plan: Plan, budget: int, now_ns: int) -> int:
        planned = {work.request.sequence for work in plan.work}
        behind = [r for r in self.holding if r.state is State.RUNNING and r.pending > 1 and r.sequence not in planned]
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
            request.slot = self._free_slots.pop()
            request.blocks = self._needed(request)
            self.used_blocks += request.blocks
            request.computed = 0
            # A preempted request recomputes here, whoever computed its prompt at first.
            foreign = request.role is Role.RECEIVE and not request.preemptions
            request.state = State.RESERVED if foreign else State.RUNNING
            self.holding.append(request)
            plan.admitted.append(request)

    def _grow(self, request: Request, plan: Plan, now_ns: int) -> bool:
        """Room for one more token, taken from the least urgent if need be. False: the request itself had to go."""
        needed = self._needed(request)
        while needed > request.blocks:
            if self.used_blocks + needed - request.blocks <= self.limits.capacity_blocks:
                self.used_blocks += needed - request.blocks
                request.blocks = needed
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
        plan.preempted[request] = request.slot
        self._release(request)
        request.state = State.WAITING
        request.preemptions += 1
        self.waiting.append(request)

    def _release(self, request: Request) -> None:
        self._free_slots.append(request.slot)
        self._free_slots.sort(reverse=True)
        self.used_blocks -= request.blocks
        request.slot, request.blocks, request.computed = -1, 0, 0

    def _needed(self, request: Request) -> int:
        """Blocks for all its tokens and the next one."""
        return self.limits.blocks(len(request.tokens) + 1)

    def _fits(self, request: Request) -> bool:
        room = self.limits.capacity_blocks - self.used_blocks
        return bool(self._free_slots) and self._needed(request) <= room

    def _urgency(self, now_ns: int) -> Callable[[Request], tuple[int, int]]:
        """Sort key, most urgent first: priority, raised while it waits, then order of arrival."""
        aging = self.limits.aging_ns

        def key(request: Request) -> tuple[int, int]:
            return -(request.priority + (now_ns - request.arrival_ns) // aging), request.sequence

        return key
