"""Whatever happens to Redis is a miss, and a quick one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from urllib.parse import unquote

import grpc
import pytest
import redis

from baton.cli.redis_server import EmbeddedRedis
from baton.internal.v1 import response_cache_pb2
from baton.rpc.breaker import Breaker
from baton.verify.proxy import Proxy
from baton_cache.settings import CacheSettings
from tests.cache.conftest import Cache, an_answer, cache_key, eventually, name_of, running_cache

FAILED = response_cache_pb2.MISS_REASON_STORE_FAILED
TIMEOUT = 0.3
PAUSE = 0.5
SLACK = 0.2
"""Seconds a busy machine may add."""


@pytest.fixture
async def quick(redis_server: EmbeddedRedis) -> AsyncIterator[Cache]:
    """A cache that is impatient with Redis, and holds one answer."""
    async with running_cache(redis_server.url, redis_timeout=TIMEOUT, breaker_seconds=PAUSE) as one:
        assert await one.fill(cache_key(), an_answer())
        yield one


async def timed_miss(cache: Cache) -> float:
    """Look up; seconds until it is known that Redis failed."""
    began = time.monotonic()
    assert await cache.miss(cache_key()) == FAILED
    return time.monotonic() - began


async def hits(cache: Cache) -> bool:
    """Whether the answer is found."""
    return (await cache.lookup(cache_key())).hit


async def fills(cache: Cache) -> bool:
    """Whether an answer can be stored."""
    return await cache.fill(cache_key(), an_answer())


def test_redis_gets_20_ms() -> None:
    assert CacheSettings().redis_timeout == 0.02


async def test_redis_killed_and_back(redis_server: EmbeddedRedis, quick: Cache) -> None:
    os.kill(redis_server.pid, signal.SIGKILL)
    times = [await timed_miss(quick) for _ in range(10)]
    assert max(times) < TIMEOUT + SLACK
    assert not await quick.fill(cache_key(), an_answer())
    redis_server.start()
    await eventually(lambda: fills(quick), PAUSE * 3)
    assert await hits(quick)


async def test_redis_frozen(redis_server: EmbeddedRedis, quick: Cache) -> None:
    os.kill(redis_server.pid, signal.SIGSTOP)
    first = [await timed_miss(quick) for _ in range(3)]
    assert max(first) < 2 * TIMEOUT
    assert await timed_miss(quick) < SLACK, "the breaker is open"
    await asyncio.sleep(PAUSE)
    trial, after = await timed_miss(quick), await timed_miss(quick)
    assert TIMEOUT * 0.9 < trial < 2 * TIMEOUT, "one call tries"
    assert after < SLACK, "and the breaker is open again"
    os.kill(redis_server.pid, signal.SIGCONT)
    await eventually(lambda: hits(quick), PAUSE * 3)


async def test_many_lookups_of_a_frozen_redis_at_once(redis_server: EmbeddedRedis) -> None:
    settings = {"redis_timeout": 0.6, "redis_connections": 2, "breaker_failures": 1000}
    async with running_cache(redis_server.url, **settings) as cache:
        os.kill(redis_server.pid, signal.SIGSTOP)
        times = await asyncio.gather(*(timed_miss(cache) for _ in range(30)))
        assert max(times) < 1.1, "waiting for a connection and waiting for Redis share one timeout"


async def test_redis_not_there_at_start(redis_server: EmbeddedRedis) -> None:
    redis_server.close()
    async with running_cache(redis_server.url, breaker_seconds=PAUSE) as cache:
        assert await timed_miss(cache) < TIMEOUT + SLACK
        redis_server.start()
        await eventually(lambda: fills(cache), PAUSE * 3)


async def test_redis_flushed(quick: Cache, stored: redis.Redis) -> None:
    stored.flushall()
    assert await quick.miss(cache_key()) == response_cache_pb2.MISS_REASON_ABSENT


async def test_redis_full(quick: Cache, stored: redis.Redis) -> None:
    stored.config_set("maxmemory-policy", "noeviction")
    stored.config_set("maxmemory", "1")
    for _ in range(5):
        assert not await quick.fill(cache_key((1, 2)), an_answer())
    assert await hits(quick), "what is there is still served"


async def test_redis_read_only(quick: Cache, stored: redis.Redis) -> None:
    stored.config_set("min-replicas-to-write", "1")
    for _ in range(5):
        assert not await quick.fill(cache_key((1, 2)), an_answer())
    assert await hits(quick), "what is there is still served"


async def test_redis_wants_a_password(redis_server: EmbeddedRedis, stored: redis.Redis) -> None:
    stored.config_set("requirepass", "open sesame")
    async with running_cache(redis_server.url) as cache:
        assert not await cache.fill(cache_key(), an_answer())
        assert await cache.miss(cache_key()) == FAILED
    async with running_cache(redis_server.url.replace("unix://", "unix://:open%20sesame@")) as cache:
        assert await cache.fill(cache_key(), an_answer())


async def test_redis_cuts_connections(quick: Cache, stored: redis.Redis) -> None:
    for _ in range(20):
        stored.client_kill_filter(_type="normal", skipme=True)
        await quick.lookup(cache_key())
    await eventually(lambda: hits(quick), PAUSE * 3)


async def test_cancelled_lookups_get_nobody_elses_answer(redis_server: EmbeddedRedis) -> None:
    """A connection that is given up in the middle must not hand its answer to the next call."""
    chance = random.Random(7)
    async with running_cache(redis_server.url, redis_connections=2, breaker_failures=1000) as cache:
        for i in range(20):
            assert await cache.fill(cache_key((i,)), an_answer(f"answer {i} "))
        found_some = 0

        async def look(i: int) -> None:
            nonlocal found_some
            request = response_cache_pb2.LookupRequest(key=cache_key((i,)))
            with contextlib.suppress(grpc.aio.AioRpcError):
                found = await cache.stub.Lookup(request, timeout=chance.uniform(0.0005, 0.02))
                assert found.miss_reason != response_cache_pb2.MISS_REASON_CORRUPT
                if found.hit:
                    found_some += 1
                    assert found.answer == an_answer(f"answer {i} ")

        for _ in range(20):
            await asyncio.gather(*(look(i) for i in range(20)))
        assert 0 < found_some < 400
        for i in range(20):
            assert (await cache.lookup(cache_key((i,)))).answer == an_answer(f"answer {i} ")


def test_breaker() -> None:
    now = 0.0
    breaker = Breaker(failures=2, pause_seconds=1.0, now=lambda: now)
    breaker.failed()
    breaker.worked()
    breaker.failed()
    assert breaker.allows()
    breaker.failed()
    assert breaker.open
    assert not breaker.allows()
    now = 1.0
    assert breaker.allows()
    assert not breaker.allows(), "one trial a pause"
    breaker.failed()
    now = 1.9
    assert not breaker.allows()
    now = 2.0
    assert breaker.allows()
    breaker.worked()
    assert not breaker.open
    assert breaker.allows()


async def test_redis_slow(redis_server: EmbeddedRedis) -> None:
    path = unquote(redis_server.url.removeprefix("unix://"))
    async with (
        Proxy.to(lambda: asyncio.open_unix_connection(path)) as proxy,
        running_cache(f"redis://{proxy.address}", redis_timeout=TIMEOUT, breaker_seconds=PAUSE) as cache,
    ):
        proxy.backward.delay_seconds = TIMEOUT / 5
        assert await cache.fill(cache_key(), an_answer())
        assert await hits(cache), "slow is not down"
        proxy.backward.delay_seconds = TIMEOUT * 3
        first = [await timed_miss(cache) for _ in range(3)]
        assert max(first) < TIMEOUT + SLACK
        assert await timed_miss(cache) < SLACK, "the breaker is open"
        proxy.backward.clear()
        await eventually(lambda: hits(cache), PAUSE * 6)


NOISE = (
    b"\x00" * 100,
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"$nonsense\r\n",
    b"*1000000000\r\n",
    b":5\r\n:5\r\n",
    b"+OK\r\n" * 9,
    b"+OK\r\n>0\r\n",
    b"%1\r\n$5\r\nproto\r\n:3\r\n+OK\r\n>2\r\n$10\r\ninvalidate\r\n:7\r\n",
    b"*1\r\n*3\r\n:-5\r\n:99999\r\n*2\r\n:1\r\n:2\r\n",
)


@pytest.mark.parametrize("url", ["redis://:pw@{}", "redis+sentinel://{}/mesh", "redis+cluster://{}", "redis://{}"])
@pytest.mark.parametrize("noise", NOISE)
async def test_something_else_listens(noise: bytes, url: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            writer.write(noise)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    local = {"local_bytes": 10**6, "local_ping_seconds": 0.1}
    async with server, running_cache(url.format(f"127.0.0.1:{port}"), redis_timeout=TIMEOUT, **local) as cache:
        for _ in range(5):
            assert not (await cache.lookup(cache_key())).hit
            await cache.fill(cache_key(), an_answer())
        await asyncio.sleep(0.3)


async def test_a_huge_value_is_not_read(quick: Cache, stored: redis.Redis) -> None:
    stored.set(name_of(cache_key()), bytes(8_000_000))
    before = stored.info("stats")["total_net_output_bytes"]
    assert await quick.miss(cache_key()) == response_cache_pb2.MISS_REASON_ABSENT
    assert stored.info("stats")["total_net_output_bytes"] - before < 2_000_000
    assert await quick.fill(cache_key(), an_answer())
    assert await hits(quick)
