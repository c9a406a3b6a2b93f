"""Tenants get their shares, priorities count within a tenant only, nobody starves, and bounds hold."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from baton_router.fair_queue import Bounds, Entry, FairQueue

STEP = 0.1


def an_entry(tenant: str = "a", cost: float = 10.0, priority: int = 0, arrived: float = 0.0) -> Entry:
    return Entry(tenant=tenant, priority=priority, cost=cost, arrived=arrived)


def drain(queue: FairQueue) -> list[Entry]:
    order = []
    while (entry := queue.head()) is not None:
        queue.take(entry)
        order.append(entry)
    assert len(queue) == 0
    assert queue.tokens == 0
    return order


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.floats(0.1, 20), min_size=2, max_size=5),
    costs=st.lists(st.integers(1, 500), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
)
def test_shares_differ_by_no_more_than_a_request_of_each(weights: list[float], costs: list[int], seed: int) -> None:
    """While both wait, whatever they ask for and with whatever priority; a third one comes and goes."""
    chance = random.Random(seed)
    queue = FairQueue(STEP)
    names = [str(number) for number in range(len(weights))]
    largest = dict(zip(names, costs, strict=False))
    served = dict.fromkeys(names, 0.0)

    def ask(tenant: str, arrived: float) -> None:
        cost = chance.uniform(1, largest[tenant])
        queue.push(an_entry(tenant, cost, chance.randint(-100, 100), arrived), weights[int(tenant)])

    for tenant in names:
        for _ in range(3):
            ask(tenant, 0.0)
    for step in range(300):
        if chance.random() < 0.2:  # somebody who has never enough waiting to count
            queue.push(an_entry("visitor", chance.uniform(1, 100)), 1.0)
        entry = queue.head()
        assert entry is not None
        queue.take(entry)
        if entry.tenant in served:
            served[entry.tenant] += entry.cost
            ask(entry.tenant, float(step))
        for one in names:
            for other in names:
                mine, theirs = served[one] / weights[int(one)], served[other] / weights[int(other)]
                bound = largest[one] / weights[int(one)] + largest[other] / weights[int(other)]
                assert abs(mine - theirs) <= bound + 1e-6


def test_who_was_away_has_saved_nothing_up() -> None:
    queue = FairQueue(STEP)
    for _ in range(100):
        queue.push(an_entry("a"), 1)
    for _ in range(50):
        entry = queue.head()
        assert entry is not None
        queue.take(entry)
    for _ in range(50):
        queue.push(an_entry("b"), 1)
    order = [entry.tenant for entry in drain(queue)]
    assert all(abs(order[:n].count("a") - order[:n].count("b")) <= 1 for n in range(100))


def test_who_may_have_no_more_loses_its_turn_and_does_not_get_it_back() -> None:
    queue = FairQueue(STEP)
    for _ in range(60):
        queue.push(an_entry("a"), 1)
        queue.push(an_entry("b"), 1)
    for _ in range(20):
        entry = queue.head(lambda tenant: tenant != "a")
        assert entry is not None
        assert entry.tenant == "b"
        queue.take(entry)
    order = [entry.tenant for entry in drain(queue)][:40]
    assert abs(order.count("a") - order.count("b")) <= 2


def test_priority_counts_within_a_tenant_only() -> None:
    queue = FairQueue(STEP)
    for _ in range(10):
        queue.push(an_entry("loud", priority=100), 1)
        queue.push(an_entry("quiet", priority=-100), 1)
    order = [entry.tenant for entry in drain(queue)]
    assert all(abs(order[:n].count("loud") - order[:n].count("quiet")) <= 1 for n in range(20))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 30), st.integers(-100, 100)), min_size=1, max_size=40))
def test_order_within_a_tenant(asked: list[tuple[float, int]]) -> None:
    """First come first served among equals, and nobody is overtaken by one that came much later."""
    queue = FairQueue(STEP)
    for arrived, priority in sorted(asked):
        queue.push(an_entry(priority=priority, arrived=arrived), 1)
    order = drain(queue)
    for place, entry in enumerate(order):
        for later in order[place + 1 :]:
            assert entry.priority != later.priority or entry.arrived <= later.arrived
            # `later` was overtaken by `entry`, which came after it: by no more than the priorities are worth.
            assert entry.arrived - later.arrived <= max(0, entry.priority - later.priority) * STEP + 1e-9
            assert entry.arrived - later.arrived <= 200 * STEP + 1e-9


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 8), st.integers(10, 200))
def test_bounds_hold_and_the_greedy_pay(data: st.DataObject, requests: int, tokens: int) -> None:
    queue, bounds = FairQueue(STEP), Bounds(requests, tokens)
    inside: Counter[str] = Counter()
    for step in range(40):
        tenant = data.draw(st.sampled_from("abc"))
        entry = an_entry(tenant, data.draw(st.integers(1, 60)), data.draw(st.integers(-2, 2)), float(step))
        queue.push(entry, 1)
        inside[tenant] += 1
        for out in queue.overflow(bounds):
            inside[out.tenant] -= 1
        assert len(queue) == inside.total() <= requests
        assert queue.tokens <= tokens
    # With one request at least of its own waiting, nobody was pushed out by those who have more.
    before = Counter(inside)
    greedy = max(before, key=lambda tenant: before[tenant])
    rare = "rare"
    queue.push(an_entry(rare, 1), 1)
    out = queue.overflow(bounds)
    if before[greedy] > 1 and out and len(queue) == requests:
        assert rare not in {entry.tenant for entry in out}
    assert len(drain(queue)) == inside.total() + 1 - len(out)


def test_removing_leaves_no_trace() -> None:
    queue = FairQueue(STEP)
    entries = [an_entry(tenant, priority=p) for tenant in "ab" for p in (0, 5, -5)]
    for entry in entries:
        queue.push(entry, 1)
    for entry in entries:
        assert queue.remove(entry)
        assert not queue.remove(entry)
    assert queue.head() is None
    assert (len(queue), queue.tokens) == (0, 0)


def test_what_was_charged_too_much_comes_back() -> None:
    """An answer was expected to be long and was not: its tenant is behind by that."""
    queue = FairQueue(STEP)
    for _ in range(20):
        queue.push(an_entry("a", 100), 1)
        queue.push(an_entry("b", 100), 1)
    first = queue.head()
    assert first is not None
    queue.take(first)
    queue.settle(first, -90.0)
    served = Counter({first.tenant: 10.0})
    for _ in range(21):
        entry = queue.head()
        assert entry is not None
        queue.take(entry)
        served[entry.tenant] += 100
    assert abs(served["a"] - served["b"]) <= 200


def test_what_was_charged_while_nobody_waited_is_no_credit_later() -> None:
    """Long answers were expected, none was long, and that shows only when somebody else waits as well."""
    queue = FairQueue(STEP)
    early = [an_entry("a", 1000) for _ in range(20)]
    for entry in early:
        queue.push(entry, 1)
        queue.take(entry)
    for _ in range(40):
        queue.push(an_entry("a"), 1)
        queue.push(an_entry("b"), 1)
    for entry in early:
        queue.settle(entry, -990.0)
    order = [entry.tenant for entry in drain(queue)]
    assert all(abs(order[:n].count("a") - order[:n].count("b")) <= 1 for n in range(80))


def test_tokens_ahead() -> None:
    queue = FairQueue(STEP)
    assert queue.ahead(an_entry("a"), 1) == 0
    for _ in range(4):
        queue.push(an_entry("a", 10), 1)
    assert queue.ahead(an_entry("a", arrived=1), 1) == 40
    assert queue.ahead(an_entry("a", arrived=1, priority=100), 1) == 0, "it would go first"
    assert queue.ahead(an_entry("b", arrived=1), 1) == 10, "at most one before its own turn"
