"""Flights: one writes, many read, each at its own pace, and nothing flies that nobody wants."""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import AsyncIterator

import pytest

from baton.rpc.errors import BatonError, DeadlineExceeded, SlowReader, Unavailable
from baton.v1 import inference_pb2, ledger_pb2, sampling_pb2
from baton_router.account import Account
from baton_router.chunks import CachedChunk
from baton_router.flight import Ending, Flight, Flights, Reader, Source

KEY = b"key"


def an_ending() -> Ending:
    return Ending(sampling_pb2.FINISH_REASON_LENGTH, sampling_pb2.Usage(), inference_pb2.CACHE_STATUS_MISS)


def writing(count: int, error: BatonError | None = None, pause: float = 0.0) -> Source:
    """A source of so many chunks of one token."""

    async def fly(flight: Flight) -> None:
        for i in range(count):
            flight.push(CachedChunk(token_ids=[i]))
            await asyncio.sleep(pause)
        if error:
            raise error
        flight.land(an_ending())

    return fly


def reader(limit: int | None = None, seconds: float = 60.0) -> Reader:
    return Reader(Account(), asyncio.get_running_loop().time() + seconds, limit)


async def read(flight: Flight, one: Reader | None = None, stop: int | None = None) -> list[int]:
    """Tokens of a flight, or the first of them."""
    got: list[int] = []
    async with flight.reading(one or reader()) as chunks:
        async for chunk in chunks:
            got += chunk.token_ids
            if stop is not None and len(got) >= stop:
                break
    return got[:stop]


@pytest.fixture
async def flights() -> AsyncIterator[Flights]:
    """At the end no task may be left."""
    before = asyncio.all_tasks()
    flights = Flights()
    async with flights.owned():
        yield flights
    assert asyncio.all_tasks() <= before | {asyncio.current_task()}


async def test_everyone_reads_everything(flights: Flights) -> None:
    flight = flights.launch(writing(50), "r", KEY)
    async with asyncio.TaskGroup() as group:
        reading = [group.create_task(read(flight)) for _ in range(3)]
        await asyncio.sleep(0.01)
        late = group.create_task(read(flight))
    assert {tuple(task.result()) for task in [*reading, late]} == {tuple(range(50))}
    assert flights.boardable(KEY) is None, "it has landed"


async def test_a_reader_that_keeps_up_gets_every_chunk_by_itself(flights: Flights) -> None:
    flight = flights.launch(writing(20, pause=0.001), "r", None)
    async with flight.reading(reader()) as chunks:
        assert [list(chunk.token_ids) async for chunk in chunks] == [[i] for i in range(20)]


async def test_a_reader_that_is_behind_gets_what_waits_in_one_piece(flights: Flights) -> None:
    flight = flights.launch(writing(20), "r", KEY)
    one, by_chunk = reader(limit=30), reader()
    by_chunk.joins = False
    async with flight.reading(one) as chunks, flight.reading(by_chunk) as single:
        assert list((await anext(chunks)).token_ids) == [0]
        await asyncio.sleep(0.05)
        assert one.unread_tokens == 19
        assert list((await anext(chunks)).token_ids) == list(range(1, 20))
        assert one.unread_tokens == 0
        assert [list(chunk.token_ids) async for chunk in single] == [[i] for i in range(20)]


async def test_an_error_comes_after_what_was_before(flights: Flights) -> None:
    flight = flights.launch(writing(5, Unavailable("gone")), "r", None)
    got = []
    with pytest.raises(Unavailable):  # noqa: PT012 the loop is the statement
        async with flight.reading(reader()) as chunks:
            async for chunk in chunks:
                got += chunk.token_ids
    assert got == list(range(5))


async def test_boarding_finds_only_what_flies(flights: Flights) -> None:
    flight = flights.launch(writing(10**9), "r", KEY)
    private = flights.launch(writing(10**9), "r", None)
    async with flight.reading(reader()), private.reading(reader()):
        assert flights.boardable(KEY) is flight
        assert flights.boardable(b"other") is None
    assert flights.boardable(KEY) is None


async def test_the_last_to_leave_ends_it(flights: Flights) -> None:
    flight = flights.launch(writing(10**9), "r", KEY)
    async with flight.reading(reader()):
        assert await read(flight, stop=3) == [0, 1, 2]
        assert flight.boardable, "somebody is left"
    assert not flight.boardable
    assert len(asyncio.all_tasks()) == 1, "its source is gone when the last one has left"


async def test_left_before_it_began(flights: Flights) -> None:
    flight = flights.launch(writing(1), "r", KEY)
    async with flight.reading(reader()):
        pass
    assert flight.log.items == []
    assert flights.boardable(KEY) is None


async def test_another_router_keeps_it_going(flights: Flights) -> None:
    flight = flights.launch(writing(10**9), "r", KEY)
    flight.wanted_elsewhere(True)
    await read(flight, stop=2)
    seen = flight.tokens
    await asyncio.sleep(0.01)
    assert flight.tokens > seen
    assert await read(flight, stop=2) == [0, 1], "it can still be boarded"
    flight.wanted_elsewhere(False)
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1


async def test_a_slow_reader_hurts_only_itself(flights: Flights) -> None:
    flight = flights.launch(writing(100), "r", KEY)
    slow = reader(limit=7)
    async with flight.reading(slow) as chunks:
        assert (await anext(chunks)).token_ids == [0]
        assert await read(flight) == list(range(100))
        with pytest.raises(SlowReader):
            await anext(chunks)
    assert flight.ending is not None


async def test_a_slow_reader_alone_ends_it_at_once(flights: Flights) -> None:
    flight = flights.launch(writing(10**9), "r", KEY)
    async with flight.reading(reader(limit=7)) as chunks:
        async with asyncio.timeout(2):
            while len(asyncio.all_tasks()) > 1:  # noqa: ASYNC110 any state can be waited for
                await asyncio.sleep(0)
        assert flight.tokens == 8
        with pytest.raises(SlowReader):
            await anext(chunks)


async def test_what_was_there_before_is_not_slow_reading(flights: Flights) -> None:
    flight = flights.launch(writing(50), "r", KEY)
    async with flight.reading(reader()) as chunks:
        for _ in range(40):
            await anext(chunks)
        late = reader(limit=20)
        assert await read(flight, late) == list(range(50))


async def test_a_stored_answer_may_be_longer_than_the_limit(flights: Flights) -> None:
    async def stored(flight: Flight) -> None:
        flight.replay([CachedChunk(token_ids=[i]) for i in range(100)])
        flight.land(an_ending())

    flight = flights.launch(stored, "r", KEY)
    assert await read(flight, reader(limit=7)) == list(range(100))
    assert flight.tokens == 100


async def test_everyone_has_a_deadline_of_its_own(flights: Flights) -> None:
    flight = flights.launch(writing(10**9, pause=0.001), "r", KEY)
    hasty, patient = reader(seconds=0.05), reader()
    async with flight.reading(patient):
        assert flight.deadline() == patient.deadline
        with pytest.raises(DeadlineExceeded):
            await read(flight, hasty)
        assert flight.boardable
    assert flight.deadline() is None


async def test_after_the_end_the_time_is_the_readers(flights: Flights) -> None:
    flight = flights.launch(writing(3), "r", KEY)
    one = reader()
    one.account.enter(ledger_pb2.KIND_QUEUE)
    async with flight.reading(one) as chunks:
        async for _ in chunks:
            pass
        await asyncio.sleep(0.02)
    spent = {entry.kind: entry.duration.ToNanoseconds() / 1e9 for entry in one.account.ledger().total.entries}
    assert spent[ledger_pb2.KIND_STALL] >= 0.019
    assert spent[ledger_pb2.KIND_QUEUE] < 0.019


async def test_stopping_ends_all() -> None:
    flights = Flights()
    failed: list[BaseException] = []

    async def client(flight: Flight) -> None:
        try:
            await read(flight)
        except BatonError as error:
            failed.append(error)

    with contextlib.suppress(ExceptionGroup):
        async with flights.owned():
            task = asyncio.create_task(client(flights.launch(writing(10**9), "r", KEY)))
            await asyncio.sleep(0.01)
    await task
    assert [type(error) for error in failed] == [Unavailable]


async def test_what_comes_at_once_is_slow_reading_only_for_who_is_behind(flights: Flights) -> None:
    """A follower gets what a leader already has in one message."""

    async def following(flight: Flight) -> None:
        for first in range(0, 300, 100):
            flight.catch_up([CachedChunk(token_ids=[first + i]) for i in range(100)])
            await asyncio.sleep(0.01)
        flight.land(an_ending())

    flight = flights.launch(following, "r", KEY)
    slow = reader(limit=7)
    async with flight.reading(slow) as chunks:
        assert await read(flight, reader(limit=7)) == list(range(300))
        with pytest.raises(SlowReader):
            await anext(chunks)


async def test_many_readers_of_one_error_do_not_pile_it_up(flights: Flights) -> None:
    flight = flights.launch(writing(3, Unavailable("gone")), "r", KEY)
    errors = await asyncio.gather(*(read(flight) for _ in range(50)), return_exceptions=True)
    assert {type(error) for error in errors} == {Unavailable}
    for error in errors:
        assert isinstance(error, Unavailable)
        assert len(traceback.extract_tb(error.__traceback__)) < 20


async def test_what_has_landed_is_stored_before_the_end() -> None:
    stored = False

    async def fly(flight: Flight) -> None:
        nonlocal stored
        flight.land(an_ending())
        await asyncio.sleep(0.05)
        stored = True

    flights = Flights()
    async with flights.owned():
        await read(flights.launch(fly, "r", KEY))
    assert stored


async def test_a_follower_that_leads_goes_on_in_the_leaders_time(flights: Flights) -> None:
    """Or a replay at the original pace would have a jump in it."""
    times: list[int] = []

    async def fly(flight: Flight) -> None:
        flight.catch_up([CachedChunk(token_ids=[1], since_start_us=5_000_000)])
        times.append(flight.since_start_us())
        flight.land(an_ending())

    await read(flights.launch(fly, "r", KEY))
    assert times[0] >= 5_000_000
