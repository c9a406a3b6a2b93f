"""How much the workers of one model can take, and whether one more request fits. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from baton.internal.v1 import worker_pb2
from baton.worker.step_cost import StepCost

AHEAD: Final = 8
"""One request in so many slots, at least one, may be at a worker without a slot: it takes the next one without a
pause."""


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker said of itself that matters here. Its own choice of requests is of no interest: it has the load."""

    role: worker_pb2.WorkerRole.ValueType
    slots: int
    kv_tokens: int
    requests: int
    """Running and waiting there, of all routers."""
    waiting_prompt_tokens: int
    cost: StepCost | None
    incarnation: str = ""

    @staticmethod
    def of(state: worker_pb2.WatchResponse) -> WorkerReport:
        """From its state message."""
        load = state.load
        return WorkerReport(
            role=state.role,
            slots=state.capacity.slots,
            kv_tokens=state.capacity.kv_tokens,
            requests=load.running + load.waiting,
            waiting_prompt_tokens=load.waiting_prompt_tokens,
            cost=StepCost.from_proto(load.step_cost) if load.HasField("step_cost") else None,
            incarnation=state.incarnation,
        )


@dataclass(frozen=True, slots=True)
class Capacity:
    """All workers of a model together.

    Attributes:
        slots: requests they can decode at once; 0: there is nobody.
        ahead: requests that may be there beyond that.
        kv_tokens: they can hold; 0: not known.
        requests: in the decode workers, as these last said.
        prompt_workers: that compute prompts.
        waiting_prompt_tokens: there, as these last said.
        cost: of a step of one that computes prompts; None: not known.
        incarnations: of the decode workers; empty: not known.
    """

    slots: int = 0
    ahead: int = 0
    kv_tokens: int = 0
    requests: int = 0
    prompt_workers: int = 0
    waiting_prompt_tokens: int = 0
    cost: StepCost | None = None
    incarnations: frozenset[str] = frozenset()

    @staticmethod
    def of(reports: Iterable[WorkerReport]) -> Capacity:
        """Of those that take requests now. Prompts count as computed by the prefill tier, where there is one."""
        every = list(reports)
        decode = [report for report in every if report.role == worker_pb2.WORKER_ROLE_DECODE]
        prompts = [report for report in every if report.role == worker_pb2.WORKER_ROLE_PREFILL] or decode
        return Capacity(
            slots=sum(report.slots for report in decode),
            ahead=sum(max(1, report.slots // AHEAD) for report in decode),
            kv_tokens=sum(report.kv_tokens for report in decode),
            requests=sum(report.requests for report in decode),
            prompt_workers=len(prompts),
            waiting_prompt_tokens=sum(report.waiting_prompt_tokens for report in prompts),
            cost=_typical([report.cost for report in prompts if report.cost is not None]),
            incarnations=frozenset(report.incarnation for report in decode),
        )

    def prompt_seconds(self, tokens: float, others: float = 0.0) -> float | None:
        """Seconds until a prompt is computed by the least busy worker, if so many tokens of others wait at all of them.

        None: not known.
        """
        if self.cost is None or not self.prompt_workers:
            return None
        waiting = int(others / self.prompt_workers)
        return (self.cost.prefill(waiting) if waiting else 0.0) + self.cost.prefill(int(tokens))


@dataclass(slots=True)
class Held:
    """What this router has at the workers of a model.

    Attributes:
        requests: how many.
        tokens: KV they are expected to hold.
        unanswered: requests without a first token.
        unanswered_tokens: of their prompts, to be computed.
    """

    requests: int = 0
    tokens: float = 0.0
    unanswered: int = 0
    unanswered_tokens: int = 0

    def add(self, kv_tokens: float, unanswered_tokens: int | None) -> None:
        """One request; None: it has its first token."""
        self.requests += 1
        self.tokens += kv_tokens
        if unanswered_tokens is not None:
            self.unanswered += 1
            self.unanswered_tokens += unanswered_tokens


def fits(
    capacity: Capacity, held: Held, others: int, prompt_tokens: int, kv_tokens: float, prefill_ahead_seconds: float
) -> bool:
    """Whether one more request may go to the workers: they can decode it, hold it, and will get to its prompt soon.

    Args:
        capacity: of the workers.
        held: what is there from here.
        others: requests there from elsewhere.
        prompt_tokens: of the request, to be computed.
        kv_tokens: it is expected to hold.
        prefill_ahead_seconds: prompts that take longer than this need not wait there; here they can still be put in
            order.
    """
    if not capacity.slots:
        return True  # without workers there is nothing to wait for: who looks for one says so
    # A few may always be there: else routers that came first, and take each slot as it becomes free, keep others out.
    if held.requests >= max(1, capacity.ahead) and held.requests + others >= capacity.slots + capacity.ahead:
        return False
    if not held.requests:
        return True  # however large it is: nothing that is here will make room
    if capacity.kv_tokens and held.tokens + kv_tokens > capacity.kv_tokens:
        return False
    if held.unanswered < capacity.prompt_workers:
        return True
    seconds = capacity.prompt_seconds(prompt_tokens, held.unanswered_tokens)
    return seconds is None or seconds <= prefill_ahead_seconds


def _typical(costs: Sequence[StepCost]) -> StepCost | None:
    """The one in the middle, by what a full step takes."""
    ranked = sorted(costs, key=lambda cost: cost.prefill(cost.step_tokens))
    return ranked[(len(ranked) - 1) // 2] if ranked else None
