"""The requests for one model that have no place at a worker yet, and those that have one. Pure: time is an argument.

A request that comes gets a place at once if there is one and nobody waits, waits, or is refused: when what waits
already exceeds its bounds, when it would wait for too long, and when its first token would come after its deadline.
`pump` gives places that became free to whose turn it is. `leave` is the only way out, for all that came in, and may
be called twice.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from baton.rpc.errors import BatonError, DeadlineUnreachable, Overloaded
from baton_router.capacity import Capacity, Held, fits
from baton_router.fair_queue import Bounds, FairQueue
from baton_router.forecast import OutputLength, Pace, Ratio
from baton_router.ticket import Shed, State, Ticket

_SHORTEST_RETRY: Final = 0.1
_LONGEST_RETRY: Final = 30.0
_REPORT_SECONDS: Final = 1.0
"""No report of a worker is older than this, as long as it counts."""
_DOUBT: Final = 0.5
"""Of what is predicted for workers that have nothing else to do: only a request that is hopeless by half is refused
there, since nothing but requests can tell that the prediction was wrong."""


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """Settings of admission.

    Attributes:
        bounds: of what may wait, requests and tokens.
        max_queue_seconds: a request waits.
        seconds_per_priority: see `FairQueue`.
        prefill_ahead_seconds: of prompts that may wait at the workers.
    """

    bounds: Bounds
    max_queue_seconds: float
    seconds_per_priority: float
    prefill_ahead_seconds: float


class ModelQueue:
    """See above.

    Args:
        policy: settings.
        weight_of: a tenant's weight.
        places_of: how many of so many places a tenant may have.
        now: seconds.
    """

    def __init__(
        self,
        policy: QueuePolicy,
        weight_of: Callable[[str], float],
        places_of: Callable[[str, int], int],
        now: float,
    ) -> None:
        self._policy = policy
        self._weight_of = weight_of
        self._places_of = places_of
        self._queue = FairQueue(policy.seconds_per_priority)
        self._holders: set[Ticket] = set()
        self._held_by: Counter[str] = Counter()  # tenant
        self._held_at: Counter[str] = Counter()  # incarnation
        self._peak = _Peak(_REPORT_SECONDS)
        self._ratio = Ratio(now)
        self._pace = Pace()
        self._output = OutputLength()
        self.held = Held()

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def tokens(self) -> float:
        """That what waits is expected to take."""
        return self._queue.tokens

    @property
    def idle(self) -> bool:
        """Whether there is nothing here."""
        return not self._queue and not self.held.requests

    def enter(self, ticket: Ticket, capacity: Capacity, now: float) -> list[Ticket]:
        """A request comes. Returns those whose state this changed, itself perhaps among them."""
        assert ticket.state is State.WAITING
        output = self._output.expected(ticket.max_tokens)
        ticket.arrived = now
        ticket.cost = ticket.computed_tokens + output
        ticket.kv_tokens = ticket.prompt_tokens + output / 2  # on average over its life
        if self._refuse_hopeless(ticket, capacity, now):
            return [ticket]
        self._queue.push(ticket, self._weight_of(ticket.tenant))
        changed = self.pump(capacity, now)
        for entry in self._queue.overflow(self._policy.bounds):
            assert isinstance(entry, Ticket)
            mine = "what waits is at its bound, and most of it is this tenant's"
            self._refuse(entry, Shed.QUEUE_FULL, Overloaded(mine, self._retry(self._wait(entry))))
            changed.append(entry)
        self._note_waiting(now)
        return changed

    def pump(self, capacity: Capacity, now: float) -> list[Ticket]:
        """Give places that are free. Returns those whose state this changed."""
        changed: list[Ticket] = []
        places = capacity.slots + capacity.ahead
        held, held_by = self._at_usable(capacity)
        others = max(0, capacity.requests - self._peak.of(held.requests, now))

        def eligible(tenant: str) -> bool:
            return not places or held_by[tenant] < self._places_of(tenant, places)

        while (ticket := self._queue.head(eligible)) is not None:
            assert isinstance(ticket, Ticket)
            ahead = self._policy.prefill_ahead_seconds / self._ratio.value(now)
            if not fits(capacity, held, others, ticket.computed_tokens, ticket.kv_tokens, ahead):
                break
            predicted = self._predict(ticket, capacity)
            late = self._late(predicted, ticket, now, len(self._queue) - 1)
            if late is not None:
                self._queue.remove(ticket)
                self._refuse(ticket, Shed.DEADLINE, DeadlineUnreachable(late, _SHORTEST_RETRY))
            else:
                self._queue.take(ticket)
                self._pace.left(ticket.cost, now)
                self._hold(ticket, predicted, now)
                if held is not self.held:
                    held.add(ticket.kv_tokens, ticket.computed_tokens)
                    held_by[ticket.tenant] += 1
            changed.append(ticket)
        self._peak.of(held.requests, now)
        self._note_waiting(now)
        return changed

    def moved(self, ticket: Ticket, incarnation: str) -> None:
        """It goes to this decode worker."""
        if ticket.state is State.HELD:
            self._held_at[ticket.worker] -= 1
            ticket.worker = incarnation
            self._held_at[incarnation] += 1
            self._held_at += Counter()  # drops what is 0

    def first_token(self, ticket: Ticket, now: float) -> None:
        """It has its first token. Later calls do nothing."""
        if ticket.state is State.HELD and not ticket.answered:
            ticket.answered = True
            self.held.unanswered -= 1
            self.held.unanswered_tokens -= ticket.computed_tokens
            if ticket.predicted is not None:
                self._ratio.came(ticket.predicted, now - ticket.taken_at, now)

    def leave(self, ticket: Ticket, now: float, *, complete: bool = False) -> None:
        """It is over, whatever way. What it took is known only now.

        Args:
            ticket: which.
            now: seconds.
            complete: its answer came to its own end.
        """
        if ticket.state is State.WAITING:
            self._queue.remove(ticket)
        elif ticket.state is State.HELD:
            if not ticket.answered:
                self.held.unanswered -= 1
                self.held.unanswered_tokens -= ticket.computed_tokens
                if ticket.predicted is not None:
                    self._ratio.gave_up(ticket.predicted, now - ticket.taken_at, now)
            elif complete:
                self._output.came(ticket.generated, ticket.max_tokens)
            self._holders.discard(ticket)
            self._held_at[ticket.worker] -= 1
            self._held_at += Counter()
            self.held.requests -= 1
            self.held.tokens -= ticket.kv_tokens
            if not self.held.requests:
                self.held.tokens = 0.0  # and no rounding of sums
            self._held_by[ticket.tenant] -= 1
            if not self._held_by[ticket.tenant]:
                del self._held_by[ticket.tenant]
            self._queue.settle(ticket, ticket.computed_tokens + ticket.generated - ticket.cost)
        if ticket.state is not State.REFUSED:
            ticket.state = State.GONE
        self._note_waiting(now)

    def waited_too_long(self, ticket: Ticket) -> BatonError:
        """Why a request that waited for `max_queue_seconds` does not go on waiting."""
        self._queue.remove(ticket)
        wait = f"no worker had a place for {self._policy.max_queue_seconds:g} s"
        error = Overloaded(wait, self._retry(self._wait(ticket)))
        self._refuse(ticket, Shed.QUEUE_TIME, error)
        return error

    def _hold(self, ticket: Ticket, predicted: float | None, now: float) -> None:
        ticket.state = State.HELD
        ticket.taken_at, ticket.queued, ticket.predicted = now, now - ticket.arrived, predicted
        self.held.add(ticket.kv_tokens, ticket.computed_tokens)
        self._holders.add(ticket)
        self._held_at[ticket.worker] += 1
        self._held_by[ticket.tenant] += 1

    def _at_usable(self, capacity: Capacity) -> tuple[Held, Counter[str]]:
        """What workers have that take requests now: one that drains takes up nobody's place while it finishes its
        own."""
        usable = capacity.incarnations
        if not usable or all(not worker or worker in usable for worker in self._held_at):
            return self.held, self._held_by
        held, held_by = Held(), Counter[str]()
        for ticket in self._holders:
            if not ticket.worker or ticket.worker in usable:
                held.add(ticket.kv_tokens, None if ticket.answered else ticket.computed_tokens)
                held_by[ticket.tenant] += 1
        return held, held_by

    def _refuse_hopeless(self, ticket: Ticket, capacity: Capacity, now: float) -> bool:
        """Refuse a request that would wait for too long, or in vain."""
        wait = self._wait(ticket)
        limit = self._policy.max_queue_seconds
        if wait > limit:
            error = Overloaded(
                f"it would wait for about {wait:.1f} s, {limit:g} are allowed", self._retry(wait - limit)
            )
            self._refuse(ticket, Shed.QUEUE_TIME, error)
            return True
        late = self._late(self._predict(ticket, capacity), ticket, now, len(self._queue), wait)
        if late is not None:
            self._refuse(ticket, Shed.DEADLINE, DeadlineUnreachable(late, self._retry(wait)))
        return late is not None

    def _late(self, predicted: float | None, ticket: Ticket, now: float, others: int, wait: float = 0.0) -> str | None:
        """Why its first token would come too late; None: it would not, or nothing is known.

        Args:
            predicted: seconds from a place to the first token, as workers say.
            ticket: which.
            now: seconds.
            others: requests that wait beside it.
            wait: seconds until it has a place.
        """
        if predicted is None:
            return None
        busy = bool(self.held.requests or others)
        seconds = wait + predicted * (self._ratio.value(now) if busy else _DOUBT)
        left = ticket.deadline() - now
        return (
            f"its first token would take about {seconds:.3f} s, {max(0.0, left):.3f} are left"
            if seconds > left
            else None
        )

    def _predict(self, ticket: Ticket, capacity: Capacity) -> float | None:
        """Seconds from a place at the workers to the first token, by what these measured."""
        waiting = max(self.held.unanswered_tokens, capacity.waiting_prompt_tokens)
        return capacity.prompt_seconds(ticket.computed_tokens, waiting)

    def _wait(self, ticket: Ticket) -> float:
        """Seconds that a request which comes now would wait here; 0 if nothing is known."""
        if not self._queue:
            return 0.0
        pace = self._pace.tokens_per_second()
        return self._queue.ahead(ticket, self._weight_of(ticket.tenant)) / pace if pace else 0.0

    def _refuse(self, ticket: Ticket, shed: Shed, error: BatonError) -> None:
        ticket.state, ticket.shed, ticket.error = State.REFUSED, shed, error

    def _note_waiting(self, now: float) -> None:
        if self._queue:
            self._pace.waiting(now)
        else:
            self._pace.idle()

    @staticmethod
    def _retry(seconds: float) -> float:
        return min(_LONGEST_RETRY, max(_SHORTEST_RETRY, seconds))


class _Peak:
    """The highest value of the last seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._values: deque[tuple[float, int]] = deque()  # falling values, each the highest since its time

    def of(self, value: int, now: float) -> int:
        """With this value as of now."""
        while self._values and self._values[-1][1] <= value:
            self._values.pop()
        self._values.append((now, value))
        # One that was overtaken held until the next began.
        while len(self._values) > 1 and self._values[1][0] < now - self._seconds:
            self._values.popleft()
        return self._values[0][1]
