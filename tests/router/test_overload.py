"""Three times as many requests as a simulated worker can serve: how many it serves in time, then and after."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from baton_router.capacity import Capacity
from baton_router.fair_queue import Bounds
from baton_router.model_queue import ModelQueue, QueuePolicy
from baton_router.ticket import State, Ticket
from tests.router.test_model_queue import COST

SLO = 1.0
"""Seconds to the first token."""
SLOTS = 8
STEP = 0.01
"""Seconds between two tokens of an answer."""
RATE = 9.0
"""Requests per second that the worker can just serve: 8 slots, 0.2 s of prompt and 0.7 s of answer each."""


@dataclass
class Worker:
    """One worker: requests wait for a slot, then their prompts for each other, then they decode side by side."""

    queue: ModelQueue
    seconds_per_token: float
    at: float = 0.0
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    waiting: deque[Ticket] = field(default_factory=deque)
    running: int = 0
    prompts_free_at: float = 0.0
    first: dict[int, float] = field(default_factory=dict)
    number: int = 0

    def later(self, seconds: float, do: Callable[[], None]) -> None:
        self.number += 1
        heapq.heappush(self.events, (self.at + seconds, self.number, do))

    def run(self) -> None:
        while self.events:
            self.at, _, do = heapq.heappop(self.events)
            do()

    def capacity(self) -> Capacity:
        return Capacity(slots=SLOTS, ahead=1, requests=self.running + len(self.waiting), prompt_workers=1, cost=COST)

    def ask(self, ticket: Ticket) -> None:
        self.changed(self.queue.enter(ticket, self.capacity(), self.at))
        # A client whose first token is late does not wait for it any longer.
        self.later(SLO, lambda: self.leave(ticket) if not ticket.answered and ticket.state is State.WAITING else None)

    def changed(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            if ticket.state is State.HELD:
                self.waiting.append(ticket)
        while self.waiting and self.running < SLOTS:
            self.begin(self.waiting.popleft())

    def begin(self, ticket: Ticket) -> None:
        self.running += 1
        start = max(self.at, self.prompts_free_at)
        self.prompts_free_at = start + ticket.prompt_tokens * self.seconds_per_token
        self.later(self.prompts_free_at - self.at, lambda: self.first_token(ticket))

    def first_token(self, ticket: Ticket) -> None:
        self.first[id(ticket)] = self.at - ticket.arrived
        self.queue.first_token(ticket, self.at)
        ticket.generated = ticket.max_tokens // 2
        self.later(ticket.generated * STEP, lambda: self.end(ticket))
        self.changed(self.queue.pump(self.capacity(), self.at))

    def end(self, ticket: Ticket) -> None:
        self.running -= 1
        self.leave(ticket, complete=True)

    def leave(self, ticket: Ticket, *, complete: bool = False) -> None:
        self.queue.leave(ticket, self.at, complete=complete)
        self.changed(self.queue.pump(self.capacity(), self.at))


def serve(
    phases: list[tuple[float, float]], *, deadlines: bool, seconds_per_token: float
) -> list[list[tuple[float, bool]]]:
    """For each phase (requests per second, seconds): when each request came, and if its first token was in time."""
    chance = random.Random(3)
    policy = QueuePolicy(Bounds(512, 10**6), 0.6 * SLO, seconds_per_priority=0.1, prefill_ahead_seconds=0.3 * SLO)
    worker = Worker(ModelQueue(policy, lambda tenant: 1.0, lambda tenant, places: places, 0.0), seconds_per_token)
    asked: list[list[tuple[float, Ticket]]] = []
    begin = 0.0
    for rate, seconds in phases:
        asked.append([])
        at = begin
        while (at := at + chance.expovariate(rate)) < begin + seconds:
            deadline = at + SLO if deadlines else float("inf")
            ticket = Ticket(
                tenant=chance.choice("ab"),
                priority=chance.choice((0, 0, 10)),
                prompt_tokens=chance.randint(50, 150),
                max_tokens=chance.randint(100, 180),
                deadline=lambda deadline=deadline: deadline,  # type: ignore[misc]
            )
            asked[-1].append((at, ticket))
            worker.later(at, lambda ticket=ticket: worker.ask(ticket))  # type: ignore[misc]
        begin += seconds
    worker.run()
    assert worker.queue.idle, "everything ended"
    return [[(at, worker.first.get(id(ticket), 99.0) <= SLO) for at, ticket in phase] for phase in asked]


@pytest.mark.parametrize("deadlines", [True, False])
@pytest.mark.parametrize("wrong_by", [1.0, 0.3, 3.0])
def test_three_times_too_many(deadlines: bool, wrong_by: float) -> None:
    """Also where prompts take a third, or three times, of what the worker says of its steps."""

    def run(*phases: tuple[float, float]) -> list[list[tuple[float, bool]]]:
        return serve(list(phases), deadlines=deadlines, seconds_per_token=0.001 * wrong_by)

    def goodput(phase: list[tuple[float, bool]]) -> float:
        return sum(good for _, good in phase) / 60

    peak, best = max((goodput(run((RATE * share, 60))[0]), RATE * share) for share in (0.2, 0.3, 0.4, 0.6, 0.8, 1.0))
    calm, over, after = run((best / 2, 60), (best * 3, 60), (best / 2, 60))
    assert goodput(over) >= 0.8 * peak
    usual = sum(good for _, good in calm) / len(calm)
    normal = [good for at, good in after if at > 120 + 10]
    assert sum(normal) >= (usual - 0.05) * len(normal), "within seconds all is as before"
