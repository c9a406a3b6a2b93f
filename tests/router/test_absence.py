"""Admission's look at the workers, on a clock of its own: they go for a moment, and for good, and models with
them."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest

from baton_router.account import Account
from baton_router.admission import Admission
from baton_router.capacity import Capacity
from baton_router.fair_queue import Bounds
from baton_router.model_queue import QueuePolicy
from baton_router.tenants import Tenants
from baton_router.ticket import Ticket

POLICY = QueuePolicy(Bounds(1000, 10**6), max_queue_seconds=60.0, seconds_per_priority=0.1, prefill_ahead_seconds=1.0)
THERE = Capacity(slots=2, ahead=1)
REATTACH = 0.8


class Workers:
    """Of each model, and the time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.models: dict[str, Capacity] = {}
        self.admission = Admission(
            POLICY, Tenants(None), lambda fingerprint: self.models.get(fingerprint, Capacity()), REATTACH
        )


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    workers = Workers()
    monkeypatch.setattr(Admission, "_now", staticmethod(lambda: workers.now))
    return workers


def test_a_short_absence_is_not_seen(workers: Workers) -> None:
    look = workers.admission._look
    assert look("m") == Capacity(), "none ever was there"
    workers.models["m"] = THERE
    assert look("m") == THERE
    workers.models.clear()
    for passed in (0.1, 0.2, 0.39):
        workers.now = 100.0 + passed
        assert look("m") == THERE, "and its time does not begin anew"
    workers.now = 100.0 + 0.41
    assert look("m") == Capacity()
    workers.models["m"] = THERE
    assert look("m") == THERE


async def test_what_waits_stays_in_order_while_the_last_worker_is_away(workers: Workers) -> None:
    workers.models["m"] = THERE
    order: list[int] = []
    places: deque[asyncio.Event] = deque()

    async def asks(number: int) -> None:
        async with workers.admission.place("m", Ticket(tenant=""), Account()):
            order.append(number)
            places.append(asyncio.Event())
            await places[-1].wait()

    async def pumped() -> int:
        workers.admission._pump()
        for _ in range(5):
            await asyncio.sleep(0)
        return len(order)

    async with asyncio.TaskGroup() as group:
        for number in range(40):
            group.create_task(asks(number))
        assert await pumped() == 3
        workers.models.clear()
        workers.now += 0.3
        assert await pumped() == 3, "as many as there were places"
        workers.models["m"] = THERE  # it is back
        workers.now += 0.1
        places.popleft().set()
        assert await pumped() == 4
        workers.models.clear()
        workers.now += 0.5
        assert await pumped() == 40, "nothing to wait for: who looks for a worker says so"
        assert order == list(range(40))
        for place in places:
            place.set()
    assert workers.admission.waiting == 0


async def test_models_that_nobody_asks_for_are_forgotten(workers: Workers) -> None:
    """Each release of a model has a fingerprint of its own, and a router outlives many."""
    admission = workers.admission
    async with admission.place("held", Ticket(tenant=""), Account()):
        for number in range(100):
            workers.models = {str(number): THERE}
            async with admission.place(str(number), Ticket(tenant=""), Account()):
                workers.now += 1.0
        assert "held" in admission._queues
        assert len(admission._queues) <= 12
        assert len(admission._seen) <= 12
    assert {"98", "99"} <= set(admission._queues), "what is learned of those in use stays"
