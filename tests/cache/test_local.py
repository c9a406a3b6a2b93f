"""Entries in memory are those in Redis, or are not there."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from baton.cli.redis_server import EmbeddedRedis
from baton_cache.local import LocalTier, Reading
from tests.cache.conftest import Cache, an_answer, cache_key, eventually, name_of, running_cache
from tests.cache.redis_lab import FREEZE, THAW, Server, a_cluster, join, running

LOCAL = {"local_bytes": 1024 * 1024, "local_ping_seconds": 0.1}
KEY = cache_key()


def figure(name: str, **labels: str) -> float:
    """What a metric says."""
    return REGISTRY.get_sample_value("baton_cache_" + name, labels) or 0.0


async def is_on() -> bool:
    return figure("local_on") == 1


async def is_off() -> bool:
    return not await is_on()


async def nothing_held() -> bool:
    return figure("local_entries") == 0


@pytest.fixture
async def cache(redis_server: EmbeddedRedis) -> AsyncIterator[Cache]:
    """A cache with a local tier that is on, and one entry in it."""
    async with running_cache(redis_server.url, **LOCAL) as one:
        await eventually(is_on, 10)
        assert await one.fill(KEY, an_answer())
        await eventually(lambda: held(one), 10)
        yield one


async def held(cache: Cache) -> bool:
    """Look up, which puts the entry in if it may; whether it was there."""
    before = figure("hits_total", tier="local")
    assert (await cache.lookup(KEY)).answer == an_answer()
    return figure("hits_total", tier="local") > before


def reads(stored: redis.Redis) -> int:
    return int(stored.info("commandstats").get("cmdstat_getrange", {"calls": 0})["calls"])


async def test_what_was_read_once_is_not_asked_for_again(cache: Cache, stored: redis.Redis) -> None:
    before = reads(stored)
    for _ in range(10):
        assert (await cache.lookup(KEY)).answer == an_answer()
    assert reads(stored) == before


@pytest.mark.parametrize("change", ["set", "unlink", "flushall", "expire", "evict"])
async def test_a_change_is_followed(cache: Cache, stored: redis.Redis, change: str) -> None:
    name = name_of(KEY)
    match change:
        case "set":
            stored.set(name, b"garbage")
        case "unlink":
            stored.unlink(name)
        case "flushall":
            stored.flushall()
        case "expire":
            stored.pexpire(name, 1)
        case "evict":
            stored.config_set("maxmemory", "1")
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                stored.set("other", "x")
    await eventually(nothing_held, 10)
    assert not (await cache.lookup(KEY)).hit


async def test_what_another_replica_writes_is_seen(cache: Cache, redis_server: EmbeddedRedis) -> None:
    async with running_cache(redis_server.url) as other:
        assert await other.fill(KEY, an_answer("newer "))

        async def newer() -> bool:
            return (await cache.lookup(KEY)).answer == an_answer("newer ")

        await eventually(newer, 10)
        await asyncio.sleep(0.05)
        assert await newer()


async def test_only_answers_are_followed(cache: Cache, stored: redis.Redis) -> None:
    before = figure("local_invalidations_total", of="name")
    for i in range(100):
        stored.set(f"baton:chunks:{i}", "x")
        stored.set(f"other:{i}", "x")
    stored.set("baton:answer:last", "x")
    await eventually(lambda: _is(before + 1), 10)


async def _is(count: float) -> bool:
    now = figure("local_invalidations_total", of="name")
    assert now <= count
    return now == count


async def test_a_lost_connection_drops_all_and_is_made_again(cache: Cache, stored: redis.Redis) -> None:
    dropped = figure("local_removed_total", why="dropped")
    stored.client_kill_filter(_type="normal", skipme=True)
    await eventually(lambda: _rose(dropped), 10)
    await eventually(is_on, 10)
    await eventually(lambda: held(cache), 10)
    stored.unlink(name_of(KEY))
    await eventually(nothing_held, 10)


async def _rose(dropped: float) -> bool:
    return figure("local_removed_total", why="dropped") > dropped


async def test_a_silent_connection_is_lost(redis_server: EmbeddedRedis, cache: Cache) -> None:
    os.kill(redis_server.pid, FREEZE)
    await eventually(is_off, 10)
    assert await nothing_held()
    os.kill(redis_server.pid, THAW)
    await eventually(is_on, 10)


async def test_redis_down_at_start(redis_server: EmbeddedRedis) -> None:
    redis_server.close()
    async with running_cache(redis_server.url, breaker_seconds=0.1, **LOCAL) as cache:
        assert await is_off()
        redis_server.start()
        await eventually(is_on, 10)
        assert await cache.fill(KEY, an_answer())
        await eventually(lambda: held(cache), 10)


async def test_it_ends_off(redis_server: EmbeddedRedis) -> None:
    async with running_cache(redis_server.url, **LOCAL):
        await eventually(is_on, 10)
    assert await is_off()


async def test_an_entry_lives_no_longer_than_in_redis(cache: Cache, redis_server: EmbeddedRedis) -> None:
    """Even if Redis has no time to say that it expired."""
    assert await cache.fill(KEY, an_answer(), ttl=2)
    await eventually(lambda: held(cache), 1)
    await asyncio.sleep(2.1)
    assert not (await cache.lookup(KEY)).hit


async def test_who_may_not_track_goes_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(tmp_path / "redis", "user default on nopass ~* &* +@all -client")
    with running(server):
        async with running_cache(f"redis://127.0.0.1:{server.port}", **LOCAL) as cache:
            await eventually(lambda: _said(caplog, "the local tier is off: Redis does not tell of changes"), 10)
            assert await cache.fill(KEY, an_answer())
            assert not await held(cache)
            assert not await held(cache)
            assert await is_off()


async def _said(caplog: pytest.LogCaptureFixture, what: str) -> bool:
    return what in caplog.text


async def test_every_server_of_a_cluster_is_listened_to(tmp_path: Path) -> None:
    servers = a_cluster(tmp_path)
    with running(*servers):
        await asyncio.to_thread(join, servers)
        url = f"redis+cluster://127.0.0.1:{servers[0].port}"
        async with running_cache(url, **LOCAL) as cache:
            await eventually(is_on, 10)
            keys = [cache_key((i,)) for i in range(30)]
            for key in keys:
                assert await cache.fill(key, an_answer())

            async def all_held() -> bool:
                for key in keys:
                    assert (await cache.lookup(key)).hit
                return figure("local_entries") == 30

            await eventually(all_held, 10)
            for server in servers:
                with server.client() as client:
                    client.flushall()
            await eventually(nothing_held, 10)
            servers[2].signal(FREEZE)
            await eventually(is_off, 10)


# The tier by itself


def test_it_is_bounded() -> None:
    tier = LocalTier(max_bytes=100_000, max_entries=20)
    tier.turn_on()
    for i in range(500):
        with tier.reading(str(i)) as reading:
            tier.keep(str(i), reading, bytes(i * 20), 10)
        assert tier.size <= 100_000
        assert len(tier) <= 20
    assert len(tier) > 1
    assert tier.get("499") is not None
    with tier.reading("huge") as reading:
        tier.keep("huge", reading, bytes(100_000), 10)
    assert tier.get("huge") is None
    assert tier.get("499") is not None, "what does not fit pushes nothing out"


def test_the_least_recently_used_goes_first() -> None:
    tier = LocalTier(max_bytes=10**6, max_entries=2)
    tier.turn_on()
    for name in ("a", "b", "a", "c"):
        if tier.get(name) is None:
            with tier.reading(name) as reading:
                tier.keep(name, reading, b"x", 10)
    assert (tier.get("a"), tier.get("b"), tier.get("c")) == (b"x", None, b"x")


def test_time_passes() -> None:
    now = 0.0
    tier = LocalTier(10**6, 10, now=lambda: now)
    tier.turn_on()
    with tier.reading("a") as reading:
        tier.keep("a", reading, b"x", 5)
    now = 4.9
    assert tier.get("a") == b"x"
    now = 5.0
    assert tier.get("a") is None
    assert len(tier) == 0


STEPS = st.lists(
    st.sampled_from([*3 * ["begin", "see", "end", "write", "hear"], "lose", "turn on"]), min_size=10, max_size=60
)


@settings(max_examples=500)
@given(STEPS)
def test_no_value_is_served_that_is_older_than_a_change_that_was_heard_of(steps: list[str]) -> None:
    """Reads and news travel on connections of their own: any order between them can come about."""
    tier = LocalTier(max_bytes=10**6, max_entries=2)
    tier.turn_on()
    version = heard = unheard = 0  # in Redis; current when a change was last heard of; changes on their way
    seen: int | None = None
    with ExitStack() as readings:
        reading: Reading | None = None
        for what in steps:
            if what == "begin" and reading is None:
                reading = readings.enter_context(tier.reading("a"))
            elif what == "see" and reading is not None and seen is None:
                seen = version
            elif what == "end" and reading is not None and seen is not None:
                tier.keep("a", reading, str(seen).encode(), 100)
                readings.pop_all().close()
                reading = seen = None
            elif what == "write":
                version += 1
                unheard += 1
            elif what == "hear" and unheard:
                unheard -= 1
                heard = version - unheard
                tier.changed("a")
            elif what == "lose":
                tier.turn_off()
                unheard = 0
            elif what == "turn on" and not tier.on:
                heard, unheard = version, 0
                tier.turn_on()
            if (value := tier.get("a")) is not None:
                assert tier.on
                assert int(value) >= heard
