"""Callers that ask the same at the same time share one generation."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator

import grpc
import pytest
import redis

from baton.cli.redis_server import EmbeddedRedis
from baton.internal.v1 import response_cache_pb2
from baton_cache.flight import PUBLISH_SECONDS, Flight
from baton_cache.key import Keys
from baton_cache.metrics import REDIS_FAILURES
from baton_cache.names import Names
from baton_cache.relay import Relay
from baton_cache.seat import Misbehaved
from tests.cache.conftest import Cache, an_answer, cache_key, connected_store, eventually, running_cache

LEADER = response_cache_pb2.JOIN_ROLE_LEADER
FOLLOWER = response_cache_pb2.JOIN_ROLE_FOLLOWER
HIT = response_cache_pb2.JOIN_ROLE_HIT
SOON = 5.0


class Caller:
    """One Join call."""

    def __init__(self, cache: Cache, key: response_cache_pb2.CacheKey) -> None:
        self._key = key
        self._call = cache.stub.Join()
        self.role = response_cache_pb2.JOIN_ROLE_UNSPECIFIED
        self.lookup = response_cache_pb2.LookupResponse()

    @classmethod
    @contextlib.asynccontextmanager
    async def seated(cls, cache: Cache, key: response_cache_pb2.CacheKey) -> AsyncIterator[Caller]:
        """Join, and read the seat."""
        caller = cls(cache, key)
        try:
            await caller._call.write(
                response_cache_pb2.JoinRequest(start=response_cache_pb2.JoinStart(key=caller._key))
            )
            seat = (await caller.read()).seat
            caller.role, caller.lookup = seat.role, seat.lookup
            yield caller
        finally:
            caller.leave()

    async def read(self) -> response_cache_pb2.JoinResponse:
        """The next message."""
        async with asyncio.timeout(SOON):
            message = await self._call.read()
        assert isinstance(message, response_cache_pb2.JoinResponse), "the call ended"
        return message

    async def over(self) -> grpc.StatusCode:
        """Wait for the end of the call; nothing but interest comes before it."""
        async with asyncio.timeout(SOON):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while (message := await self._call.read()) is not grpc.aio.EOF:
                    assert message.WhichOneof("message") == "interest"
            return await self._call.code()

    async def wanted(self) -> bool:
        """As a leader: read what is said of the interest."""
        message = await self.read()
        assert message.WhichOneof("message") == "interest"
        return message.interest.wanted

    async def send(self, index: int, *chunks: response_cache_pb2.CachedChunk) -> None:
        part = response_cache_pb2.JoinChunks(index=index, chunks=chunks)
        await self._call.write(response_cache_pb2.JoinRequest(chunks=part))

    async def done(self, answer: response_cache_pb2.CachedAnswer) -> None:
        await self._call.write(response_cache_pb2.JoinRequest(done=response_cache_pb2.JoinDone(answer=answer)))

    async def failed(self) -> None:
        failed = response_cache_pb2.JoinFailed(reason="WORKER_LOST", message="twice")
        await self._call.write(response_cache_pb2.JoinRequest(failed=failed))

    async def answer(self) -> response_cache_pb2.CachedAnswer:
        """As a follower: everything from here on, to the end."""
        answer = response_cache_pb2.CachedAnswer()
        while (message := await self.read()).WhichOneof("message") == "chunks":
            assert message.chunks.index == sum(len(chunk.token_ids) for chunk in answer.chunks)
            answer.chunks.extend(message.chunks.chunks)
        assert message.WhichOneof("message") == "end", message
        answer.finish_reason = message.end.finish_reason
        answer.usage.CopyFrom(message.end.usage)
        return answer

    def leave(self) -> None:
        self._call.cancel()


@pytest.fixture
async def other(redis_server: EmbeddedRedis) -> AsyncIterator[Cache]:
    """A second replica."""
    async with running_cache(redis_server.url) as one:
        yield one


async def test_alone_it_leads_and_stores(cache: Cache, stored: redis.Redis) -> None:
    answer = an_answer()
    async with Caller.seated(cache, cache_key()) as one:
        assert one.role == LEADER
        assert one.lookup.timing.total_ns > 0
        assert one.lookup.miss_reason == response_cache_pb2.MISS_REASON_ABSENT
        await one.done(answer)
        assert await one.over() is grpc.StatusCode.OK
    found = await cache.lookup(cache_key())
    assert found.answer == answer
    assert [name for name in stored.scan_iter() if b"answer" not in name] == [], "the lease was given back"
    async with Caller.seated(cache, cache_key()) as again:
        assert again.role == HIT
        assert again.lookup.answer == answer
        assert again.lookup.entry == found.entry
        assert await again.over() is grpc.StatusCode.OK


async def test_followers_get_all_as_it_comes(cache: Cache) -> None:
    answer = an_answer(chunks=4)
    async with Caller.seated(cache, cache_key()) as leader, Caller.seated(cache, cache_key()) as follower:
        assert (leader.role, follower.role) == (LEADER, FOLLOWER)
        assert await leader.wanted()
        await leader.send(0, answer.chunks[0])
        assert (await follower.read()).chunks.chunks[0] == answer.chunks[0]
        await leader.send(2, answer.chunks[1])
        assert (await follower.read()).chunks.index == 2
        async with Caller.seated(cache, cache_key()) as late:
            await leader.done(answer)
            assert await late.answer() == answer
            assert await late.over() is grpc.StatusCode.OK
        assert (await follower.read()).chunks.chunks == answer.chunks[2:]
        assert (await follower.read()).end.finish_reason == answer.finish_reason


async def test_other_questions_are_not_shared(cache: Cache) -> None:
    async with (
        Caller.seated(cache, cache_key()) as one,
        Caller.seated(cache, cache_key((5, 6, 8))) as other_prompt,
        Caller.seated(cache, cache_key(tenant="b")) as other_tenant,
        Caller.seated(cache, cache_key(top_k=7)) as other_sampling,
    ):
        assert [caller.role for caller in (one, other_prompt, other_tenant, other_sampling)] == [LEADER] * 4


async def test_interest_comes_and_goes(cache: Cache) -> None:
    async with Caller.seated(cache, cache_key()) as leader:
        async with Caller.seated(cache, cache_key()):
            assert await leader.wanted()
        assert not await leader.wanted()


async def test_a_leader_that_leaves_is_followed_by_the_next(cache: Cache) -> None:
    answer = an_answer(chunks=4)
    async with (
        Caller.seated(cache, cache_key()) as leader,
        Caller.seated(cache, cache_key()) as heir,
        Caller.seated(cache, cache_key()) as third,
    ):
        await leader.send(0, *answer.chunks[:2])
        assert len((await heir.read()).chunks.chunks) == 2
        leader.leave()
        assert (await heir.read()).seat.role == LEADER
        assert await heir.wanted()
        await heir.send(4, answer.chunks[2])
        await heir.done(answer)
        assert await heir.over() is grpc.StatusCode.OK
        assert await third.answer() == answer
    assert (await cache.lookup(cache_key())).hit


async def test_who_comes_when_the_last_has_left_goes_on_from_there(cache: Cache, stored: redis.Redis) -> None:
    answer = an_answer(chunks=4)
    async with Caller.seated(cache, cache_key()) as leader:
        async with Caller.seated(cache, cache_key()) as follower:
            await leader.send(0, *answer.chunks[:2])
            assert len((await follower.read()).chunks.chunks) == 2
        stored.client_pause(300)  # the lease cannot be given back at once, so the flight is not over yet
    await asyncio.sleep(0.05)
    async with Caller.seated(cache, cache_key()) as heir:
        if heir.role == FOLLOWER:
            assert (await heir.read()).chunks.chunks == answer.chunks[:2]
            assert (await heir.read()).seat.role == LEADER
            await heir.done(answer)
        else:
            assert heir.role == LEADER
            await heir.done(answer)
        assert await heir.over() is grpc.StatusCode.OK


async def test_when_all_have_left_the_next_begins_anew(cache: Cache) -> None:
    for _ in range(3):
        async with Caller.seated(cache, cache_key()) as one, Caller.seated(cache, cache_key()) as two:
            assert (one.role, two.role) == (LEADER, FOLLOWER)
        await asyncio.sleep(0.05)


async def test_a_failure_is_everyones(cache: Cache) -> None:
    async with Caller.seated(cache, cache_key()) as leader, Caller.seated(cache, cache_key()) as follower:
        await leader.failed()
        failed = (await follower.read()).failed
        assert (failed.reason, failed.message) == ("WORKER_LOST", "twice")
        assert await follower.over() is grpc.StatusCode.OK
    assert await cache.miss(cache_key()) == response_cache_pb2.MISS_REASON_ABSENT


async def test_what_does_not_fit_ends_the_callers_call_only(cache: Cache) -> None:
    answer = an_answer(chunks=4)
    async with Caller.seated(cache, cache_key()) as bad, Caller.seated(cache, cache_key()) as heir:
        assert await bad.wanted()
        await bad.send(7, answer.chunks[0])
        assert await bad.over() is grpc.StatusCode.FAILED_PRECONDITION
        assert (await heir.read()).seat.role == LEADER
        await heir.send(0, answer.chunks[0])
        await heir.done(an_answer("other"))
        assert await heir.over() is grpc.StatusCode.FAILED_PRECONDITION
    other = cache_key((1, 2))
    async with Caller.seated(cache, other) as leader, Caller.seated(cache, other) as follower:
        await follower.done(answer)
        assert await follower.over() is grpc.StatusCode.FAILED_PRECONDITION
        await leader.done(response_cache_pb2.CachedAnswer())
        assert await leader.over() is grpc.StatusCode.INVALID_ARGUMENT
    assert await cache.miss(cache_key()) == response_cache_pb2.MISS_REASON_ABSENT


async def test_bad_starts_are_refused(cache: Cache) -> None:
    unseeded = cache_key(temperature=0.5)
    unseeded.sampling.ClearField("seed")
    for first in (
        response_cache_pb2.JoinRequest(chunks=response_cache_pb2.JoinChunks()),
        response_cache_pb2.JoinRequest(start=response_cache_pb2.JoinStart()),
        response_cache_pb2.JoinRequest(start=response_cache_pb2.JoinStart(key=unseeded)),
    ):
        call = cache.stub.Join()
        await call.write(first)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_too_long_an_answer_is_generated_by_each(redis_server: EmbeddedRedis) -> None:
    async with running_cache(redis_server.url, max_answer_bytes=100) as cache:  # noqa: SIM117
        async with Caller.seated(cache, cache_key()) as leader, Caller.seated(cache, cache_key()) as follower:
            assert await leader.wanted()
            await leader.send(0, *an_answer("x" * 300).chunks)
            assert await leader.over() is grpc.StatusCode.OK
            assert (await follower.read()).seat.role == LEADER


async def test_too_many_flights_are_not_shared(redis_server: EmbeddedRedis) -> None:
    async with running_cache(redis_server.url, max_flights=1) as cache:  # noqa: SIM117
        async with Caller.seated(cache, cache_key()) as one, Caller.seated(cache, cache_key((1,))) as two:
            assert (one.role, two.role) == (LEADER, LEADER)
            assert await two.over() is grpc.StatusCode.OK
            async with Caller.seated(cache, cache_key()) as follower:
                assert follower.role == FOLLOWER


async def test_replicas_share_through_redis(cache: Cache, other: Cache) -> None:
    answer = an_answer(chunks=6)
    async with (
        Caller.seated(cache, cache_key()) as leader,
        Caller.seated(other, cache_key()) as far,
        Caller.seated(other, cache_key()) as far_too,
    ):
        assert [caller.role for caller in (leader, far, far_too)] == [LEADER, FOLLOWER, FOLLOWER]
        assert await leader.wanted(), "the other replica's callers are known"
        await leader.send(0, *answer.chunks[:2])
        assert (await far.read()).chunks.chunks == answer.chunks[:2], "as it comes, not at the end"
        await leader.send(4, answer.chunks[2])
        await leader.done(answer)
        assert await leader.over() is grpc.StatusCode.OK
        assert await far_too.answer() == answer
    assert (await other.lookup(cache_key())).answer == answer


async def test_other_replicas_are_not_written_to_for_every_token(
    cache: Cache, other: Cache, stored: redis.Redis
) -> None:
    answer = an_answer(chunks=50)
    async with Caller.seated(cache, cache_key()) as leader, Caller.seated(other, cache_key()) as far:
        assert await leader.wanted()
        began = time.monotonic()
        for i, chunk in enumerate(answer.chunks):
            await leader.send(2 * i, chunk)
            await asyncio.sleep(0.004)
        name = next(name for name in stored.scan_iter() if b"chunks" in name)
        assert stored.xlen(name) <= (time.monotonic() - began) / PUBLISH_SECONDS + 1
        await leader.done(answer)
        assert await far.answer() == answer


async def test_the_far_interest_ends_too(cache: Cache, other: Cache) -> None:
    async with Caller.seated(cache, cache_key()) as leader:
        async with Caller.seated(other, cache_key()):
            assert await leader.wanted()
        assert not await leader.wanted()


async def test_another_replica_takes_over(cache: Cache, other: Cache) -> None:
    answer = an_answer(chunks=4)
    async with Caller.seated(other, cache_key()) as before:
        assert before.role == LEADER
        async with Caller.seated(cache, cache_key()) as far, Caller.seated(cache, cache_key()) as far_too:
            assert await before.wanted()
            await before.send(0, *answer.chunks[:2])
            assert len((await far.read()).chunks.chunks) == 2
            before.leave()
            assert (await far.read()).seat.role == LEADER
            await far.done(answer)
            assert await far.over() is grpc.StatusCode.OK
            assert await far_too.answer() == answer


async def test_a_dead_replicas_lease_expires(redis_server: EmbeddedRedis, cache: Cache, stored: redis.Redis) -> None:
    async with Caller.seated(cache, cache_key()):
        name = next(name for name in stored.scan_iter() if b"lead" in name)
    await eventually(lambda: _gone(stored, name), SOON)
    stored.set(name, "a replica that died", px=700)
    async with Caller.seated(cache, cache_key()) as one:
        assert one.role == FOLLOWER
        assert (await one.read()).seat.role == LEADER


async def test_a_lease_that_was_not_given_back_holds_no_answer_back(cache: Cache, stored: redis.Redis) -> None:
    answer = an_answer()
    async with Caller.seated(cache, cache_key()):
        name = next(name for name in stored.scan_iter() if b"lead" in name)
    await eventually(lambda: _gone(stored, name), SOON)
    stored.set(name, "a replica that was interrupted", px=60_000)
    async with Caller.seated(cache, cache_key()) as one:
        assert one.role == FOLLOWER
        await cache.fill(cache_key(), answer)
        assert await one.answer() == answer


async def _gone(stored: redis.Redis, name: bytes) -> bool:
    return not stored.exists(name)


async def test_without_redis_one_replica_still_shares(redis_server: EmbeddedRedis, cache: Cache) -> None:
    os.kill(redis_server.pid, signal.SIGKILL)
    answer = an_answer()
    async with Caller.seated(cache, cache_key()) as leader, Caller.seated(cache, cache_key()) as follower:
        assert (leader.role, follower.role) == (LEADER, FOLLOWER)
        assert leader.lookup.miss_reason == response_cache_pb2.MISS_REASON_STORE_FAILED
        await leader.done(answer)
        assert await follower.answer() == answer
        assert await leader.over() is grpc.StatusCode.OK


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_redis_lost_in_between(redis_server: EmbeddedRedis, fault: signal.Signals) -> None:
    answer = an_answer()
    async with running_cache(redis_server.url, redis_timeout=0.1) as cache:  # noqa: SIM117
        async with Caller.seated(cache, cache_key()) as leader, Caller.seated(cache, cache_key()) as follower:
            assert await leader.wanted()
            os.kill(redis_server.pid, fault)
            try:
                await asyncio.sleep(0.6)  # renewals fail
                await leader.send(0, answer.chunks[0])
                assert len((await follower.read()).chunks.chunks) == 1
                await leader.done(answer)
                assert (await follower.read()).chunks.chunks == answer.chunks[1:]
                assert (await follower.read()).end.finish_reason == answer.finish_reason
                assert await leader.over() is grpc.StatusCode.OK
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(redis_server.pid, signal.SIGCONT)


async def test_flushed_in_between(cache: Cache, other: Cache, stored: redis.Redis) -> None:
    answer = an_answer(chunks=4)
    async with Caller.seated(cache, cache_key()) as leader, Caller.seated(other, cache_key()) as far:
        assert await leader.wanted()
        await leader.send(0, *answer.chunks[:2])
        await far.read()
        stored.flushall()
        await leader.send(4, *answer.chunks[2:])
        await leader.done(answer)
        # The other replica either heard it, read the stored answer, or leads now; nothing is lost or twice.
        got = answer.chunks[:2]
        while (message := await far.read()).WhichOneof("message") == "chunks":
            got += message.chunks.chunks
        if message.WhichOneof("message") == "end":
            assert got == answer.chunks[:]
        else:
            assert message.seat.role == LEADER


async def test_garbage_in_the_stream(cache: Cache, stored: redis.Redis) -> None:
    async with Caller.seated(cache, cache_key()):
        lead = next(name for name in stored.scan_iter() if b"lead" in name)
    await eventually(lambda: _gone(stored, lead), SOON)
    chunks = lead.replace(b"lead", b"chunks")
    stored.set(lead, "somebody", px=1000)
    stored.xadd(chunks, {"position": 0, "chunks": b"\xff\xff"})
    async with Caller.seated(cache, cache_key()) as one:
        assert one.role == FOLLOWER
        assert (await one.read()).seat.role == LEADER
    stored.delete(chunks)
    stored.set(lead, "somebody", px=1000)
    stored.set(chunks, "of another type")
    async with Caller.seated(cache, cache_key()) as one:
        while one.role != LEADER:
            one.role = (await one.read()).seat.role


async def test_draining_sends_everyone_elsewhere(redis_server: EmbeddedRedis) -> None:
    async with running_cache(redis_server.url) as cache, Caller.seated(cache, cache_key()) as leader:  # noqa: SIM117
        async with Caller.seated(cache, cache_key()) as follower:
            assert await leader.wanted()
            cache.runtime.draining.set()
            for one in (leader, follower):
                assert await one.over() is grpc.StatusCode.UNAVAILABLE


async def test_nothing_comes_after_the_last_word(redis_server: EmbeddedRedis) -> None:
    """A leader that goes on talking adds nothing to what followers were told is all."""
    answer = an_answer(chunks=2)

    async def find() -> None:
        return None

    async def keep(answer: response_cache_pb2.CachedAnswer, ttl_ms: int) -> None:
        return None

    async with connected_store(redis_server.url) as store:
        flight = Flight(Relay(store, Names("baton:"), "entry"), find, max_bytes=1000)
        leader, follower = flight.take_seat(keep), flight.take_seat(keep)
        running = asyncio.create_task(flight.run())
        responses = follower.responses()
        assert (await anext(responses)).seat.role == FOLLOWER
        leader.done(answer, 1000)
        with pytest.raises(Misbehaved):
            leader.chunks(response_cache_pb2.JoinChunks(index=4, chunks=an_answer(chunks=3).chunks[2:]))
        with pytest.raises(Misbehaved):
            leader.done(an_answer(chunks=3), 1000)
        assert (await anext(responses)).chunks.chunks == answer.chunks
        assert (await anext(responses)).WhichOneof("message") == "end"
        await running


async def test_nobody_is_seated_while_draining(cache: Cache) -> None:
    """One that came just before would keep the service from ending for as long as its generation takes."""
    cache.runtime.draining.set()
    call = cache.stub.Join()
    await call.write(response_cache_pb2.JoinRequest(start=response_cache_pb2.JoinStart(key=cache_key())))
    async with asyncio.timeout(SOON):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_something_else_where_the_lease_would_be(cache: Cache, stored: redis.Redis) -> None:
    """Nobody leads then, whom one could follow."""
    stored.sadd(Names("baton:").lead(Keys(b"").digests(cache_key()).name), "no lease")
    async with Caller.seated(cache, cache_key()) as caller:
        assert caller.role == LEADER


async def test_a_redis_that_does_not_answer_is_waited_for_once(redis_server: EmbeddedRedis) -> None:
    async with running_cache(redis_server.url, redis_timeout=0.2, breaker_failures=1000) as cache:
        claims = REDIS_FAILURES.labels("claim", "no_answer")
        before = claims._value.get()
        os.kill(redis_server.pid, signal.SIGSTOP)
        async with Caller.seated(cache, cache_key()) as leader, Caller.seated(cache, cache_key()) as follower:
            assert (leader.role, follower.role) == (LEADER, FOLLOWER)
        assert claims._value.get() == before
