"""The latency ledger: one request's time in one process as a partition, and callees' accounts booked into it.

A `Timeline` is always in exactly one state (hop, kind). `enter` closes the running interval and opens the next, so
entries can neither overlap nor leave a gap. What a callee or the engine reports is *carved* out of the interval in
which this process waited for it. Durations are nanoseconds of this process's monotonic clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from prometheus_client import Counter

from baton.internal.v1 import timing_pb2
from baton.v1 import ledger_pb2

Part = tuple[int, int]  # (ledger_pb2.Hop, ledger_pb2.Kind) values

NEGATIVE_REMAINDERS = Counter(
    "baton_ledger_negative_remainders_total",
    "Times a ledger entry fell below zero: a callee reported more time than its caller saw (clock granularity), or "
    "entries above its own total, by hop",
    ["hop"],
)
for _hop in ("HOP_CACHE", "HOP_DECODE", "HOP_PREFILL"):
    NEGATIVE_REMAINDERS.labels(_hop)  # a zero is a figure, no data is a question


class Timeline:
    """Partition of the time since construction.

    Args:
        hop: this process's hop.
        kind: the state it starts in.
        now: nanosecond clock; tests give their own.
    """

    __slots__ = ("_hop", "_is_view", "_now", "_parts", "_since", "_start", "_state", "hidden_transfer_ns")

    def __init__(
        self,
        hop: ledger_pb2.Hop.ValueType,
        kind: ledger_pb2.Kind.ValueType = ledger_pb2.KIND_OVERHEAD,
        now: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._hop = hop
        self._now = now
        self._start = self._since = now()
        self._state: Part = (hop, kind)
        self._parts: dict[Part, int] = {}
        self._is_view = False
        self.hidden_transfer_ns = 0

    def copy(self) -> Timeline:
        """Another one with the same past, for a view of it that is not to last.

        Negative remainders of a view are not counted: what it books, the lasting one books as well, or corrects.
        """
        twin = object.__new__(Timeline)
        for slot in self.__slots__:
            setattr(twin, slot, getattr(self, slot))
        twin._parts = dict(self._parts)
        twin._is_view = True
        return twin

    def enter(self, kind: ledger_pb2.Kind.ValueType, hop: ledger_pb2.Hop.ValueType | None = None) -> None:
        """From now on the request is in this state. `hop` names the callee while waiting on the NETWORK."""
        self._close(self._now())
        self._state = (self._hop if hop is None else hop, kind)

    def carve(self, source: Part, parts: Mapping[Part, int]) -> None:
        """Re-attribute `parts` (nanoseconds) out of what was booked under `source`.

        A remainder below zero is kept, not clamped: the partition still sums, and the metric counts it.
        """
        self._close(self._now())
        total = sum(parts.values())
        self._parts[source] = self._parts.get(source, 0) - total
        if self._parts[source] < 0:
            self._count_negative(source[0])
        for part, duration in parts.items():
            self._parts[part] = self._parts.get(part, 0) + duration

    def book(self, callee: ledger_pb2.Hop.ValueType, timing: timing_pb2.HopTiming) -> None:
        """Book a callee's account out of the NETWORK time spent waiting for it; the rest stays NETWORK of that hop."""
        parts: dict[Part, int] = {}
        for entry in timing.entries:
            part = (entry.hop, entry.kind)
            parts[part] = parts.get(part, 0) + entry.duration_ns
        # What the callee itself could not attribute is its overhead, not the network's.
        rest = timing.total_ns - sum(parts.values())
        if rest < 0:
            self._count_negative(callee)
        if rest:
            parts[callee, ledger_pb2.KIND_OVERHEAD] = parts.get((callee, ledger_pb2.KIND_OVERHEAD), 0) + rest
        self.carve((callee, ledger_pb2.KIND_NETWORK), parts)
        self.hidden_transfer_ns += timing.hidden_transfer_ns

    def timing(self) -> timing_pb2.HopTiming:
        """The account so far, for the caller of this process."""
        now = self._now()
        self._close(now)
        return timing_pb2.HopTiming(
            total_ns=now - self._start,
            entries=[
                timing_pb2.TimingEntry(hop=hop, kind=kind, duration_ns=duration)
                for (hop, kind), duration in sorted(self._parts.items())
                if duration
            ],
            hidden_transfer_ns=self.hidden_transfer_ns,
        )

    def partition(self) -> ledger_pb2.Partition:
        """The account so far, for the client."""
        return to_partition(self.timing())

    def _close(self, now: int) -> None:
        self._parts[self._state] = self._parts.get(self._state, 0) + now - self._since
        self._since = now

    def _count_negative(self, hop: int) -> None:
        if not self._is_view:
            NEGATIVE_REMAINDERS.labels(ledger_pb2.Hop.Name(hop)).inc()  # type: ignore[arg-type]


def to_partition(timing: timing_pb2.HopTiming) -> ledger_pb2.Partition:
    """A process's account in the public form, with its residual."""
    partition = ledger_pb2.Partition()
    partition.total.FromNanoseconds(timing.total_ns)
    attributed = 0
    for entry in timing.entries:
        attributed += entry.duration_ns
        public = partition.entries.add(hop=entry.hop, kind=entry.kind)
        public.duration.FromNanoseconds(entry.duration_ns)
    partition.residual.FromNanoseconds(timing.total_ns - attributed)
    partition.hidden_transfer.FromNanoseconds(timing.hidden_transfer_ns)
    return partition
