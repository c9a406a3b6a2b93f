"""The ledger is a partition: whatever happens, in whatever order, the parts sum to the whole."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.internal.v1 import timing_pb2
from baton.telemetry.ledger import NEGATIVE_REMAINDERS, Timeline
from baton.v1 import ledger_pb2

KINDS = st.sampled_from([k for k in ledger_pb2.Kind.values() if k])
steps = st.lists(st.tuples(st.integers(0, 10**9), KINDS), max_size=30)


class Clock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@given(steps=steps, callee=st.lists(st.tuples(KINDS, st.integers(0, 10**8)), max_size=5), rest=st.integers(0, 10**6))
def test_parts_sum_to_the_whole(steps: list[tuple[int, int]], callee: list[tuple[int, int]], rest: int) -> None:
    clock = Clock()
    timeline = Timeline(ledger_pb2.HOP_ROUTER, now=clock)
    for wait, kind in steps:
        clock.now += wait
        timeline.enter(kind)
    timeline.enter(ledger_pb2.KIND_NETWORK, ledger_pb2.HOP_DECODE)
    clock.now += 10**9
    entries = [timing_pb2.TimingEntry(hop=ledger_pb2.HOP_DECODE, kind=k, duration_ns=d) for k, d in callee]
    total = sum(d for _, d in callee) + rest
    timeline.book(ledger_pb2.HOP_DECODE, timing_pb2.HopTiming(total_ns=total, entries=entries))
    clock.now += 5
    timing = timeline.timing()
    assert timing.total_ns == clock.now
    assert sum(entry.duration_ns for entry in timing.entries) == clock.now
    network = [
        e.duration_ns for e in timing.entries if (e.hop, e.kind) == (ledger_pb2.HOP_DECODE, ledger_pb2.KIND_NETWORK)
    ]
    booked_as_network = sum(d for k, d in callee if k == ledger_pb2.KIND_NETWORK)
    assert sum(network) == 10**9 + 5 - total + booked_as_network


class Work(NamedTuple):
    kind: int
    ns: int


class Call(NamedTuple):
    hop: int
    there_ns: int
    steps: list[Work | Call]
    back_ns: int


HOPS = st.sampled_from([ledger_pb2.HOP_CACHE, ledger_pb2.HOP_DECODE, ledger_pb2.HOP_PREFILL])
DURATIONS = st.integers(0, 10**9)
WORK = st.builds(Work, KINDS, DURATIONS)
TREES = st.recursive(
    st.lists(WORK, max_size=4),
    lambda inner: st.lists(WORK | st.builds(Call, HOPS, DURATIONS, inner, DURATIONS), max_size=4),
    max_leaves=20,
)


@given(steps=TREES, told=st.booleans())
def test_a_tree_of_calls_is_attributed_exactly(steps: list[Work | Call], told: bool) -> None:
    """Against the truth: every nanosecond of every process in its own entry, none below zero, and no two overlap."""
    clock, truth = Clock(), Counter[tuple[int, int]]()

    def spend(hop: int, kind: int, ns: int) -> None:
        clock.now += ns
        truth[hop, kind] += ns

    def run(hop: int, steps: list[Work | Call]) -> timing_pb2.HopTiming:
        timeline = Timeline(hop, now=clock)  # type: ignore[arg-type]
        for step in steps:
            if isinstance(step, Work):
                timeline.enter(step.kind)  # type: ignore[arg-type]
                spend(hop, step.kind, step.ns)
                continue
            timeline.enter(ledger_pb2.KIND_NETWORK, step.hop)  # type: ignore[arg-type]
            spend(step.hop, ledger_pb2.KIND_NETWORK, step.there_ns)
            timing = run(step.hop, step.steps)
            spend(step.hop, ledger_pb2.KIND_NETWORK, step.back_ns)
            if told:  # a view of it on the way changes nothing
                timeline.copy().book(step.hop, timing)  # type: ignore[arg-type]
            timeline.book(step.hop, timing)  # type: ignore[arg-type]
            timeline.enter(ledger_pb2.KIND_OVERHEAD)
        return timeline.timing()

    timing = run(ledger_pb2.HOP_ROUTER, steps)
    assert {(e.hop, e.kind): e.duration_ns for e in timing.entries} == {k: v for k, v in truth.items() if v}
    assert all(entry.duration_ns > 0 for entry in timing.entries)
    assert sum(entry.duration_ns for entry in timing.entries) == timing.total_ns == clock.now


def test_states_do_not_overlap() -> None:
    clock = Clock()
    timeline = Timeline(ledger_pb2.HOP_DECODE, now=clock)
    clock.now = 3
    timeline.enter(ledger_pb2.KIND_QUEUE)
    clock.now = 10
    timeline.enter(ledger_pb2.KIND_COMPUTE)
    clock.now = 30
    partition = timeline.partition()
    found = {(e.hop, e.kind): e.duration.ToNanoseconds() for e in partition.entries}
    assert found == {
        (ledger_pb2.HOP_DECODE, ledger_pb2.KIND_OVERHEAD): 3,
        (ledger_pb2.HOP_DECODE, ledger_pb2.KIND_QUEUE): 7,
        (ledger_pb2.HOP_DECODE, ledger_pb2.KIND_COMPUTE): 20,
    }
    assert partition.total.ToNanoseconds() == 30
    assert partition.residual.ToNanoseconds() == 0


@pytest.mark.parametrize(
    ("waited", "total", "entry"),
    [pytest.param(5, 10, 10, id="more than the caller saw"), pytest.param(100, 10, 15, id="more than its own total")],
)
def test_every_entry_below_zero_is_counted(waited: int, total: int, entry: int) -> None:
    clock = Clock()
    timeline = Timeline(ledger_pb2.HOP_ROUTER, now=clock)
    timeline.enter(ledger_pb2.KIND_NETWORK, ledger_pb2.HOP_PREFILL)
    clock.now += waited
    counter = NEGATIVE_REMAINDERS.labels("HOP_PREFILL")
    before = counter._value.get()
    compute = timing_pb2.TimingEntry(hop=ledger_pb2.HOP_PREFILL, kind=ledger_pb2.KIND_COMPUTE, duration_ns=entry)
    timing = timing_pb2.HopTiming(total_ns=total, entries=[compute])
    view = timeline.copy()
    view.book(ledger_pb2.HOP_PREFILL, timing)
    assert any(part.duration_ns < 0 for part in view.copy().timing().entries)
    assert counter._value.get() == before, "a view is told, but not counted"
    timeline.book(ledger_pb2.HOP_PREFILL, timing)
    assert any(part.duration_ns < 0 for part in timeline.timing().entries)
    assert counter._value.get() == before + 1
