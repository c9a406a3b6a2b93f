"""Placement and the bounded buffer, without any network."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.rpc.errors import BatonError, SlowReader, Unavailable
from baton.v1 import inference_pb2
from baton_router.placement import Candidate, order_prefill, pick_decode, prevailing_fingerprint
from baton_router.targets import check_target
from baton_router.unsent import buffered

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        target=st.sampled_from(["a:1", "b:1", "c:1"]),
        incarnation=st.sampled_from(["1", "2", "3", "4"]),
        fingerprint=st.sampled_from(["old", "new"]),
        in_flight=st.integers(0, 9),
        slots=st.integers(0, 9),
        draining=st.booleans(),
    ),
    max_size=8,
)


@given(workers=CANDIDATES, avoid=st.sets(st.sampled_from(["1", "2", "3"])), seed=st.integers())
def test_pick_decode(workers: list[Candidate], avoid: set[str], seed: int) -> None:
    picked = pick_decode(workers, "new", avoid, random.Random(seed))
    usable = [w for w in workers if w.fingerprint == "new" and not w.draining and w.incarnation not in avoid]
    if picked is None:
        assert not usable
    else:
        assert picked in usable
        assert picked.pressure == min(w.pressure for w in usable)


@given(workers=CANDIDATES)
def test_prevailing_fingerprint(workers: list[Candidate]) -> None:
    votes = [w.fingerprint for w in workers if not w.draining]
    chosen = prevailing_fingerprint(workers)
    assert (chosen is None) == (not votes)
    assert all(votes.count(chosen or "") >= votes.count(other) for other in votes)
    assert prevailing_fingerprint(reversed(workers)) == chosen


@given(workers=CANDIDATES)
def test_prefill_order(workers: list[Candidate]) -> None:
    ordered = order_prefill(workers, "new", random.Random(0))
    assert len(ordered) <= 3
    assert [w.pressure for w in ordered] == sorted(w.pressure for w in ordered)


def test_ties_are_broken_by_chance() -> None:
    workers = [Candidate(f"{i}:1", str(i), "m", 0, 8, False) for i in range(4)]
    rng = random.Random(1)
    picked = [pick_decode(workers, "m", (), rng) for _ in range(400)]
    assert all(50 < picked.count(worker) < 150 for worker in workers)


@pytest.mark.parametrize("target", ["", "host", "host:", ":1", "host:0", "host:99999", "dns:///host", "host:http"])
def test_bad_targets_are_refused_at_start(target: str) -> None:
    with pytest.raises(ValueError, match="neither"):
        check_target(target)


async def source(count: int, error: BatonError | None = None) -> AsyncGenerator[inference_pb2.TokenChunk, None]:
    for i in range(count):
        yield inference_pb2.TokenChunk(index=i, token_ids=[i])
        await asyncio.sleep(0)
    if error:
        raise error


async def test_buffer_passes_everything_on() -> None:
    async with buffered(source(50), 100) as unsent:
        assert [chunk.index async for chunk in unsent] == list(range(50))


async def test_buffer_raises_after_what_came_before() -> None:
    got = []
    async with buffered(source(5, Unavailable("gone")), 100) as unsent:
        with pytest.raises(Unavailable):  # noqa: PT012 the loop is the statement
            async for chunk in unsent:
                got.append(chunk.index)
    assert got == list(range(5))


async def test_buffer_is_bounded_and_closes_its_source() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[inference_pb2.TokenChunk, None]:
        try:
            async for chunk in source(10**9):
                yield chunk
        finally:
            closed.set()

    async with buffered(endless(), 7) as unsent:
        await asyncio.wait_for(closed.wait(), 2)
        with pytest.raises(SlowReader):
            await anext(aiter(unsent))


async def test_leaving_the_buffer_ends_its_task() -> None:
    before = asyncio.all_tasks()
    async with buffered(source(10**9), 10**9) as unsent:
        assert (await anext(aiter(unsent))).index == 0
    assert asyncio.all_tasks() == before
