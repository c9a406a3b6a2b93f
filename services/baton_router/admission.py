"""Admission: which requests go to the workers now, which wait, and which are refused. See docs/admission.md.

What is decided is pure (`model_queue.py`, `fair_queue.py`, `capacity.py`, `forecast.py`); here are the clock, the
waiting, and what is told of it. The requests for each model wait apart: one model's workers say nothing of another's.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Final

from baton.rpc.errors import BatonError
from baton.telemetry import tracing
from baton.v1 import ledger_pb2
from baton_router import admission_metrics as metrics
from baton_router.account import Account
from baton_router.capacity import Capacity
from baton_router.model_queue import ModelQueue, QueuePolicy
from baton_router.quotas import places_of
from baton_router.tenants import Tenants
from baton_router.ticket import State, Ticket

log = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 0.05
"""While somebody waits, workers are looked at so often: what others took from them or gave back is only seen there."""
_FRESH_SECONDS: Final = 0.02
"""So long a look at the workers holds."""
_FORGET_SECONDS: Final = 10.0
"""A model that nobody asked for so long, its workers may be gone for good."""


class Admission:
    """Places at the workers, given out one request at a time.

    Args:
        policy: settings.
        tenants: whose requests there are.
        capacity: of the workers of a model, by fingerprint, as of now.
        reattach_seconds: a request waits for a worker that may come back. For half of that what waits here stays
            here, in order; the other half is left to those that have a place.
    """

    def __init__(
        self, policy: QueuePolicy, tenants: Tenants, capacity: Callable[[str], Capacity], reattach_seconds: float
    ) -> None:
        self._policy = policy
        self._absence = reattach_seconds / 2
        self._tenants = tenants
        self._capacity = capacity
        self._queues: dict[str, ModelQueue] = {}
        self._seen: dict[str, tuple[float, Capacity]] = {}
        self._places: dict[Ticket, asyncio.Event] = {}
        self._timer: asyncio.TimerHandle | None = None
        metrics.prepare(tenants.classes())

    @property
    def waiting(self) -> int:
        """Requests without a place."""
        return sum(len(queue) for queue in self._queues.values())

    def congested(self, fingerprint: str) -> bool:
        """Whether somebody waits: who comes now may have to, or be refused."""
        queue = self._queues.get(fingerprint)
        return queue is not None and len(queue) > 0

    @asynccontextmanager
    async def place(self, fingerprint: str, ticket: Ticket, account: Account) -> AsyncIterator[Place]:
        """A place at the workers of a model for the length of the block.

        Raises:
            Overloaded, DeadlineUnreachable: it was refused, now or after a while.
        """
        queue = self._queue(fingerprint)
        complete = False
        changed = self._places[ticket] = asyncio.Event()
        try:
            self._tell(queue.enter(ticket, self._look(fingerprint), self._now()))
            if ticket.state is State.WAITING:
                await self._wait(queue, ticket, account, changed)
            if ticket.error is not None:
                raise self._refused(ticket, ticket.error)
            metrics.WAIT_SECONDS.labels(metrics.priority_class(ticket.priority)).observe(ticket.queued)
            yield Place(queue, ticket, self._now, self._pump)
            complete = True
        finally:
            del self._places[ticket]
            queue.leave(ticket, self._now(), complete=complete)
            self._pump()

    async def _wait(self, queue: ModelQueue, ticket: Ticket, account: Account, changed: asyncio.Event) -> None:
        """Until it has a place, or is refused."""
        self._note()
        account.enter(ledger_pb2.KIND_QUEUE)
        try:
            with tracing.phase("queue", {"baton.queue.requests": len(queue), "baton.queue.tokens": queue.tokens}):
                async with asyncio.timeout(self._policy.max_queue_seconds):
                    await changed.wait()
        except TimeoutError:
            if ticket.state is State.WAITING:
                raise self._refused(ticket, queue.waited_too_long(ticket)) from None
        finally:
            account.enter(ledger_pb2.KIND_OVERHEAD)

    def _refused(self, ticket: Ticket, error: BatonError) -> BatonError:
        """Tell of a refusal."""
        assert ticket.shed is not None
        metrics.refused(ticket.shed, self._tenants.policy(ticket.tenant).tenant_class)
        tracing.set_call_attributes({"baton.shed": ticket.shed.value})
        return error

    def _queue(self, fingerprint: str) -> ModelQueue:
        queue = self._queues.get(fingerprint)
        if queue is None:
            # Models come and go with their workers: one without requests needs no memory.
            since = self._now() - max(_FORGET_SECONDS, self._absence)
            self._seen = {name: seen for name, seen in self._seen.items() if seen[0] > since}
            self._queues = {name: other for name, other in self._queues.items() if not other.idle or name in self._seen}
            queue = self._queues[fingerprint] = ModelQueue(
                self._policy,
                lambda tenant: self._tenants.policy(tenant).weight,
                lambda tenant, places: places_of(self._tenants.policy(tenant), places),
                self._now(),
            )
        return queue

    def _look(self, fingerprint: str) -> Capacity:
        """The workers as of now, or a moment ago."""
        now = self._now()
        at, last = self._seen.get(fingerprint, (-math.inf, Capacity()))
        if now - at <= _FRESH_SECONDS:
            return last
        capacity = self._capacity(fingerprint)
        if capacity.slots:
            self._seen[fingerprint] = now, capacity
        elif now - at < self._absence:
            # Without workers all that waits would get a place at once, and come upon the first one that is back.
            return last
        else:
            self._seen.pop(fingerprint, None)
        return capacity

    def _pump(self) -> None:
        """Places may have become free."""
        for fingerprint, queue in self._queues.items():
            if queue:
                self._tell(queue.pump(self._look(fingerprint), self._now()))
        self._note()

    def _tell(self, changed: Iterable[Ticket]) -> None:
        for ticket in changed:
            self._places[ticket].set()

    def _note(self) -> None:
        """Figures, and another look in a while if somebody waits."""
        metrics.QUEUE_REQUESTS.set(self.waiting)
        metrics.QUEUE_TOKENS.set(sum(queue.tokens for queue in self._queues.values()))
        metrics.PLACES.set(sum(queue.held.requests for queue in self._queues.values()))
        if self.waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self._pump()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


class Place:
    """A request's place at the workers. It keeps it while it moves from one to another."""

    def __init__(self, queue: ModelQueue, ticket: Ticket, now: Callable[[], float], pump: Callable[[], None]) -> None:
        self._pump = pump
        self._queue = queue
        self._ticket = ticket
        self._now = now

    def moved(self, incarnation: str) -> None:
        """It goes to this decode worker now."""
        self._queue.moved(self._ticket, incarnation)

    def came(self, tokens: int) -> None:
        """So many tokens more of its answer are here."""
        self._ticket.generated += tokens
        if tokens and not self._ticket.answered:
            self._queue.first_token(self._ticket, self._now())
            self._pump()  # its prompt is out of others' way
