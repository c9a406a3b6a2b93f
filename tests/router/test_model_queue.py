"""Admission on a virtual clock: whatever comes and goes, bounds hold, places are kept, and everything ends."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.internal.v1 import worker_pb2
from baton.rpc.errors import DeadlineUnreachable, Overloaded
from baton.worker.step_cost import StepCost
from baton_router.capacity import Capacity, WorkerReport
from baton_router.fair_queue import Bounds
from baton_router.model_queue import ModelQueue, QueuePolicy
from baton_router.quotas import places_of
from baton_router.tenants import TenantPolicy
from baton_router.ticket import Shed, State, Ticket

POLICY = QueuePolicy(Bounds(20, 5000), max_queue_seconds=10.0, seconds_per_priority=0.1, prefill_ahead_seconds=1.0)
COST = StepCost(
    decode_seconds=0.01,
    seconds_per_decode=0.0,
    prefill_seconds=0.01,
    seconds_per_token=0.001,
    seconds_per_pair=0.0,
    step_tokens=256,
)
DECODE = WorkerReport(worker_pb2.WORKER_ROLE_DECODE, 4, 4096, 0, 0, COST)


def a_queue(policy: QueuePolicy = POLICY, share: float = 1.0) -> ModelQueue:
    tenant = TenantPolicy(max_share=share)
    return ModelQueue(policy, lambda name: 1.0, lambda name, places: places_of(tenant, places), 0.0)


def a_ticket(
    tenant: str = "", priority: int = 0, prompt: int = 10, output: int = 10, deadline: float = math.inf
) -> Ticket:
    return Ticket(tenant=tenant, priority=priority, prompt_tokens=prompt, max_tokens=output, deadline=lambda: deadline)


class AnyOrder(RuleBasedStateMachine):
    """Anything clients and workers can do, in any order."""

    @initialize(share=st.sampled_from([1.0, 0.5]), slots=st.integers(0, 6), known=st.booleans())
    def start(self, share: float, slots: int, known: bool) -> None:
        self.share = share
        self.queue = a_queue(share=share)
        self.now = 0.0
        self.tickets: list[Ticket] = []
        self.set_workers(slots, known)

    def set_workers(self, slots: int, known: bool) -> None:
        self.capacity = Capacity(
            slots=slots,
            ahead=1 if slots else 0,
            kv_tokens=1500,
            prompt_workers=min(1, slots),
            cost=COST if known else None,
        )

    def check(self, changed: list[Ticket]) -> None:
        assert len(set(map(id, changed))) == len(changed)
        for ticket in changed:
            assert ticket.state in (State.HELD, State.REFUSED)
            assert (ticket.error is None) == (ticket.shed is None) == (ticket.state is State.HELD)

    @rule(
        tenant=st.sampled_from("abc"),
        priority=st.integers(-100, 100),
        prompt=st.integers(1, 900),
        output=st.integers(1, 900),
        patience=st.sampled_from([0.001, 0.1, 1.0, math.inf]),
    )
    def enter(self, tenant: str, priority: int, prompt: int, output: int, patience: float) -> None:
        ticket = a_ticket(tenant, priority, prompt, output, self.now + patience)
        self.tickets.append(ticket)
        self.check(self.queue.enter(ticket, self.capacity, self.now))

    @rule(passed=st.floats(0, 2))
    def time_passes(self, passed: float) -> None:
        self.now += passed
        self.check(self.queue.pump(self.capacity, self.now))

    @rule(slots=st.integers(0, 6), known=st.booleans())
    def workers_change(self, slots: int, known: bool) -> None:
        self.set_workers(slots, known)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), complete=st.booleans(), twice=st.booleans())
    def leave(self, data: st.DataObject, complete: bool, twice: bool) -> None:
        ticket = data.draw(st.sampled_from(self.tickets))
        self.queue.leave(ticket, self.now, complete=complete)
        if twice:
            self.queue.leave(ticket, self.now)
        self.tickets.remove(ticket)
        self.check(self.queue.pump(self.capacity, self.now))

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.tickets))
        ticket.generated += 1
        self.queue.first_token(ticket, self.now)

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "queue"):
            return
        held = [ticket for ticket in self.tickets if ticket.state is State.HELD]
        assert self.queue.held.requests == len(held)
        assert self.queue.held.tokens == pytest.approx(sum(ticket.kv_tokens for ticket in held))
        unanswered = [ticket for ticket in held if not ticket.answered]
        assert self.queue.held.unanswered == len(unanswered)
        assert self.queue.held.unanswered_tokens == sum(ticket.computed_tokens for ticket in unanswered)
        waiting = [ticket for ticket in self.tickets if ticket.state is State.WAITING]
        assert len(self.queue) == len(waiting) <= POLICY.bounds.requests
        assert self.queue.tokens <= POLICY.bounds.tokens
        assert self.queue.tokens == pytest.approx(sum(ticket.cost for ticket in waiting))

    def teardown(self) -> None:
        """Whatever is left: with workers that go on, everybody who may have a place gets one."""
        if not hasattr(self, "queue"):
            return
        self.set_workers(4, known=False)
        for _ in range(200):
            self.now += 2.0
            self.check(self.queue.pump(self.capacity, self.now))
            for ticket in [ticket for ticket in self.tickets if ticket.state is not State.WAITING]:
                self.queue.leave(ticket, self.now)
                self.tickets.remove(ticket)
        assert self.tickets == []
        assert self.queue.idle


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def fill(queue: ModelQueue, capacity: Capacity, count: int, tenant: str = "", now: float = 0.0) -> list[Ticket]:
    tickets = [a_ticket(tenant) for _ in range(count)]
    for ticket in tickets:
        queue.enter(ticket, capacity, now)
    return tickets


def test_places_are_slots_and_a_few_ahead() -> None:
    queue, capacity = a_queue(), Capacity(slots=16, ahead=2)
    tickets = fill(queue, capacity, 20)
    assert [ticket.state for ticket in tickets] == [State.HELD] * 18 + [State.WAITING] * 2
    queue.leave(tickets[0], 1.0)
    assert queue.pump(capacity, 1.0) == [tickets[18]]
    assert tickets[18].queued == 1.0


def test_other_routers_take_places() -> None:
    queue = a_queue()
    tickets = fill(queue, Capacity(slots=4, ahead=1, requests=3), 2)
    tickets += fill(queue, Capacity(slots=4, ahead=1, requests=5), 1, now=0.1)
    assert [ticket.state for ticket in tickets] == [State.HELD, State.HELD, State.WAITING]
    assert queue.pump(Capacity(slots=4, ahead=1, requests=4), 0.2) == [tickets[2]]


def test_no_router_is_kept_out_by_others() -> None:
    """However full others keep the workers, one request in so many slots may wait there."""
    full = Capacity(slots=16, ahead=2, requests=30)
    assert [ticket.state for ticket in fill(a_queue(), full, 3)] == [State.HELD, State.HELD, State.WAITING]


def test_own_requests_in_an_old_report_are_nobody_elses() -> None:
    queue, capacity = a_queue(), Capacity(slots=4, ahead=1)
    tickets = fill(queue, capacity, 6)
    reported = Capacity(slots=4, ahead=1, requests=5)
    queue.leave(tickets[0], 0.1)
    assert queue.pump(reported, 0.1) == [tickets[5]], "the report is from before it left"


def test_who_leaves_keeps_nobody_from_the_places_of_others() -> None:
    """A worker drains and finishes what it has: another one's slots are given out as before."""
    queue = a_queue()
    tickets = fill(queue, Capacity(slots=8, ahead=2, incarnations=frozenset("ab")), 12)
    for number, ticket in enumerate(tickets[:10]):
        queue.moved(ticket, "ab"[number % 2])
    alone = Capacity(slots=4, ahead=1, incarnations=frozenset("b"))
    assert queue.pump(alone, 1.0) == [], "it has as many as it may"
    queue.leave(tickets[0], 1.0)
    assert queue.pump(alone, 1.0) == [], "that one was at the other"
    queue.leave(tickets[1], 1.0)
    assert queue.pump(alone, 1.0) == [tickets[10]]
    queue.moved(tickets[10], "b")
    queue.moved(tickets[2], "b")  # the one that drained was lost after all
    queue.leave(tickets[3], 2.0)
    assert queue.pump(alone, 2.0) == []
    for ticket in tickets:
        queue.leave(ticket, 3.0)
    assert queue.idle
    assert queue.held.requests == queue.held.unanswered == queue.held.unanswered_tokens == 0


def test_cached_prompts_take_no_time() -> None:
    capacity, queue = Capacity.of([DECODE]), a_queue()
    fill(queue, capacity, 1)
    for cached, state in ((0, State.REFUSED), (990, State.HELD)):
        ticket = a_ticket(prompt=1000, deadline=0.5)
        ticket.cached_tokens = cached
        queue.enter(ticket, capacity, 0.0)
        assert ticket.state is state


def test_one_tenant_cannot_have_all_places_at_the_workers() -> None:
    queue, capacity = a_queue(share=0.9), Capacity(slots=8, ahead=2)
    greedy = fill(queue, capacity, 15, "greedy")
    assert sum(ticket.state is State.HELD for ticket in greedy) == 9
    (modest,) = fill(queue, capacity, 1, "modest")
    assert modest.state is State.HELD


def test_memory_limits_places() -> None:
    capacity = Capacity(slots=16, ahead=2, kv_tokens=1000)
    queue = a_queue()
    tickets = [a_ticket(prompt=200, output=100) for _ in range(6)]
    for ticket in tickets:
        queue.enter(ticket, capacity, 0.0)
    assert sum(ticket.state is State.HELD for ticket in tickets) == 4, "250 each, on average over their lives"
    lone = a_queue()
    big = a_ticket(prompt=5000)
    lone.enter(big, capacity, 0.0)
    assert big.state is State.HELD, "what nothing will make room for is for the workers to judge"


def test_prompts_wait_here_where_they_can_be_put_in_order() -> None:
    capacity = Capacity.of([DECODE, WorkerReport(worker_pb2.WORKER_ROLE_DECODE, 64, 10**6, 0, 0, COST)])
    queue = a_queue()
    tickets = [a_ticket(prompt=700) for _ in range(8)]
    for ticket in tickets:
        queue.enter(ticket, capacity, 0.0)
    held = [ticket for ticket in tickets if ticket.state is State.HELD]
    assert len(held) == 2, "two workers, a second ahead of each"
    urgent = a_ticket(priority=50, prompt=700)
    queue.enter(urgent, capacity, 0.1)
    queue.first_token(held[0], 0.8)
    assert queue.pump(capacity, 0.8) == [urgent]


def test_hopeless_deadline_is_refused_at_once() -> None:
    capacity = Capacity.of([DECODE])
    queue = a_queue()
    (busy,) = fill(queue, capacity, 1)
    late = a_ticket(prompt=500, deadline=0.3)  # 500 ms of computing
    assert queue.enter(late, capacity, 0.0) == [late]
    assert late.shed is Shed.DEADLINE
    assert isinstance(late.error, DeadlineUnreachable)
    in_time = a_ticket(prompt=500, deadline=0.8)
    queue.enter(in_time, capacity, 0.0)
    assert in_time.state is State.HELD
    assert busy.state is State.HELD


@pytest.mark.parametrize(("deadline", "state"), [(0.3, State.HELD), (0.2, State.REFUSED)])
def test_idle_workers_get_the_benefit_of_the_doubt(deadline: float, state: State) -> None:
    """They say half a second: what is not hopeless by half is tried, or nothing would tell that they are wrong."""
    ticket = a_ticket(prompt=500, deadline=deadline)
    queue = a_queue()
    queue.enter(ticket, Capacity.of([DECODE]), 0.0)
    assert ticket.state is state
    assert queue.idle is (state is State.REFUSED)


def test_who_knows_nothing_refuses_nothing() -> None:
    queue = a_queue()
    ticket = a_ticket(prompt=5000, deadline=0.001)
    queue.enter(ticket, Capacity(slots=4, ahead=1, prompt_workers=1), 0.0)
    assert ticket.state is State.HELD


def test_what_first_tokens_take_is_learned() -> None:
    """Workers say 0.5 s and take 1.5: who has one second is refused after a while, and again taken when that is old."""
    capacity = Capacity.of([DECODE])

    def asks(queue: ModelQueue, now: float, seconds: float) -> Ticket:
        ticket = a_ticket(prompt=490, deadline=now + seconds)
        queue.enter(ticket, capacity, now)
        return ticket

    for answered in (True, False):  # the second time, all of them give up
        queue, now = a_queue(replace(POLICY, prefill_ahead_seconds=100.0)), 0.0
        queue.enter(a_ticket(prompt=1), capacity, now)  # they are never idle
        for _ in range(20):
            ticket = asks(queue, now, math.inf)
            assert ticket.state is State.HELD
            now += 1.5
            if answered:
                queue.first_token(ticket, now)
            queue.leave(ticket, now)
        refused = asks(queue, now, 1.0)
        assert refused.shed is Shed.DEADLINE
        assert asks(queue, now + 60, 1.0).state is State.HELD


def test_queue_time_is_bounded_by_what_is_known_of_its_pace() -> None:
    capacity = Capacity(slots=1, ahead=1)
    policy = QueuePolicy(Bounds(100, 10**6), max_queue_seconds=2.0, seconds_per_priority=0.1, prefill_ahead_seconds=1.0)
    queue = a_queue(policy)
    held, now = fill(queue, capacity, 3)[:2], 0.0
    refused: list[Ticket] = []
    for _ in range(100):  # ten a second come, two a second go
        for _ in range(5):
            ticket = a_ticket()
            queue.enter(ticket, capacity, now)
            refused += [ticket] if ticket.state is State.REFUSED else []
        now += 0.5
        queue.leave(held.pop(0), now)
        held += [ticket for ticket in queue.pump(capacity, now) if ticket.state is State.HELD]
        assert all(ticket.queued <= 2.0 * 1.5 for ticket in held)
    assert len(refused) > 300
    assert {ticket.shed for ticket in refused} == {Shed.QUEUE_TIME}
    assert all(isinstance(ticket.error, Overloaded) and ticket.error.retry_after >= 0.1 for ticket in refused)
    assert len(queue) >= 3, "and still there is always somebody to go next"


def test_full_queue_loses_the_last_of_the_greedy() -> None:
    queue, capacity = a_queue(), Capacity(slots=1, ahead=1)
    fill(queue, capacity, 2, "greedy")
    greedy = fill(queue, capacity, 20, "greedy")
    one_more = a_ticket("greedy")
    assert queue.enter(one_more, capacity, 0.0) == [one_more]
    assert one_more.shed is Shed.QUEUE_FULL
    modest = a_ticket("modest")
    assert queue.enter(modest, capacity, 0.0) == [greedy[-1]]
    assert modest.state is State.WAITING


def test_capacity_counts_those_who_compute_prompts() -> None:
    prefill = WorkerReport(worker_pb2.WORKER_ROLE_PREFILL, 8, 4096, 3, 700, COST)
    both = Capacity.of([DECODE, DECODE, prefill])
    assert (both.slots, both.ahead, both.kv_tokens, both.prompt_workers) == (8, 2, 8192, 1)
    assert both.waiting_prompt_tokens == 700
    alone = Capacity.of([DECODE, DECODE])
    assert alone.prompt_workers == 2
    assert Capacity.of([]).prompt_seconds(10) is None
    assert both.prompt_seconds(100) == pytest.approx(0.11)
    assert both.prompt_seconds(100, 256) == pytest.approx(0.376)
