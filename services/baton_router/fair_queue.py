"""Who goes next: weighted fairness between tenants, priority within one. Pure: time is an argument.

Between tenants: start-time fair queueing (Goyal, Vin, Cheng 1996) over tokens. Each tenant has a virtual time that
grows by cost / weight with what it is given; the one that is furthest behind goes next. One that was idle starts at
the virtual time of the others: nobody saves up. So while two tenants have requests waiting, what they got, divided by
their weights, differs by no more than one request of each. A priority is worth nothing against another tenant.

Within a tenant: a request goes before those that came later, and before those that came up to so many seconds earlier
as its priority is above theirs. Waiting raises all alike, so the order of two requests never changes, and no request
is overtaken by one that came more than (difference of priorities) x seconds_per_priority after it.

A queue that is too long loses the last request of the tenant that takes most of it for its weight.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Bounds:
    """What may wait."""

    requests: int
    tokens: float


@dataclass(eq=False, slots=True)
class Entry:
    """A request that waits.

    Attributes:
        tenant: whose it is.
        priority: higher goes first within its tenant.
        cost: tokens it is expected to take; above 0.
        arrived: seconds.
    """

    tenant: str
    priority: int = 0
    cost: float = 0.0
    arrived: float = 0.0
    rank: tuple[float, int] = (0.0, 0)
    """Its place within the tenant; set by the queue."""
    flow: _Flow | None = field(default=None, repr=False)
    """What was charged when it went; set by the queue."""


@dataclass(eq=False, slots=True)
class _Flow:
    """A tenant's part of the queue, in order."""

    weight: float
    virtual: float
    entries: list[Entry] = field(default_factory=list)
    tokens: float = 0.0


class FairQueue:
    """See above.

    Args:
        seconds_per_priority: so much longer has a request waited, in the order, for each level of its priority.
    """

    def __init__(self, seconds_per_priority: float) -> None:
        self._seconds_per_priority = seconds_per_priority
        self._flows: dict[str, _Flow] = {}
        self._virtual = 0.0  # of the last one that went
        self._sequence = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> float:
        """That the waiting requests are expected to take."""
        return sum(flow.tokens for flow in self._flows.values())

    def push(self, entry: Entry, weight: float) -> None:
        """Let a request wait. Its tenant has this weight from now on."""
        assert entry.cost > 0
        assert weight > 0
        if not self._length:
            # Nobody waited, so nobody was kept waiting by what others got.
            self._virtual = max((flow.virtual for flow in self._flows.values()), default=self._virtual)
            self._flows.clear()
        flow = self._flows.get(entry.tenant)
        if flow is None:
            flow = self._flows[entry.tenant] = _Flow(weight, self._virtual)
        elif not flow.entries:
            flow.virtual = max(flow.virtual, self._virtual)
        flow.weight = weight
        self._sequence += 1
        entry.rank = (entry.arrived - entry.priority * self._seconds_per_priority, self._sequence)
        insort(flow.entries, entry, key=_rank)
        flow.tokens += entry.cost
        self._length += 1

    def remove(self, entry: Entry) -> bool:
        """Take a request out, wherever it stands; False: it is not in the queue."""
        flow = self._flows.get(entry.tenant)
        at = bisect_left(flow.entries, entry.rank, key=_rank) if flow is not None else 0
        if flow is None or at == len(flow.entries) or flow.entries[at] is not entry:
            return False
        del flow.entries[at]
        flow.tokens = flow.tokens - entry.cost if flow.entries else 0.0
        self._length -= 1
        self._forget(entry.tenant, flow)
        return True

    def head(self, eligible: Callable[[str], bool] = lambda tenant: True) -> Entry | None:
        """The next one of the tenants that may have something now; None: there is none."""
        waiting = [(flow.virtual, flow.entries[0].rank, t) for t, flow in self._flows.items() if flow.entries]
        for _, _, tenant in sorted(waiting):
            if eligible(tenant):
                return self._flows[tenant].entries[0]
        return None

    def take(self, entry: Entry) -> None:
        """A request goes: out of the queue, and its tenant is charged. Only what `head` gave."""
        flow = self._flows[entry.tenant]
        self._virtual = max(self._virtual, flow.virtual)
        flow.virtual += entry.cost / flow.weight
        entry.flow = flow
        for name, other in list(self._flows.items()):
            if other is not flow and other.entries:
                # It was passed over because it has all it may have: that is no claim on later.
                other.virtual = max(other.virtual, self._virtual)
            self._forget(name, other)
        self.remove(entry)

    def settle(self, entry: Entry, tokens: float) -> None:
        """A request that went took so many tokens more than was charged for it; below 0: fewer.

        Nothing comes back of a charge that is forgotten: it would be credit, and others would wait for it.
        """
        flow = entry.flow
        if flow is not None and self._flows.get(entry.tenant) is flow:
            flow.virtual += tokens / flow.weight
            self._forget(entry.tenant, flow)

    def ahead(self, entry: Entry, weight: float) -> float:
        """Tokens that will have gone before a request which comes now, if all others stay and nobody else comes.

        Args:
            entry: the request, with all but its rank.
            weight: of its tenant.
        """
        own = self._flows.get(entry.tenant)
        rank = (entry.arrived - entry.priority * self._seconds_per_priority, self._sequence + 1)
        before = sum(other.cost for other in own.entries if other.rank < rank) if own is not None else 0.0
        # Others get their shares meanwhile, and one request more, but not more than they ask for.
        level = before / weight
        return before + sum(
            min(flow.tokens, level * flow.weight + flow.entries[0].cost)
            for name, flow in self._flows.items()
            if name != entry.tenant and flow.entries
        )

    def overflow(self, bounds: Bounds) -> list[Entry]:
        """Take out what is too much: the last request of whoever takes most for its weight, until the bounds hold."""
        out: list[Entry] = []
        while self._length > bounds.requests:
            out.append(self._last_of(max(self._waiting(), key=lambda f: (len(f.entries) / f.weight, _last(f)))))
        while self._length and self.tokens > bounds.tokens:
            out.append(self._last_of(max(self._waiting(), key=lambda f: (f.tokens / f.weight, _last(f)))))
        return out

    def _waiting(self) -> list[_Flow]:
        return [flow for flow in self._flows.values() if flow.entries]

    def _last_of(self, flow: _Flow) -> Entry:
        entry = flow.entries[-1]
        self.remove(entry)
        return entry

    def _forget(self, tenant: str, flow: _Flow) -> None:
        """A tenant that has nothing here and got no more than others needs no memory."""
        if not flow.entries and flow.virtual <= self._virtual:
            del self._flows[tenant]


def _rank(entry: Entry) -> tuple[float, int]:
    return entry.rank


def _last(flow: _Flow) -> tuple[float, int]:
    return flow.entries[-1].rank
