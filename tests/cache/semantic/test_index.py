"""Finding the nearest questions: in this process, and in Redis' vector sets."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.cli.redis_server import EmbeddedRedis
from baton.rpc.breaker import Breaker
from baton_cache.key import KeyDigests
from baton_cache.names import Names
from baton_cache.semantic.index import Index, OwnIndex, Question
from baton_cache.semantic.redis_index import DetectedIndex, RedisIndex
from baton_cache.store import StoreFailed
from tests.cache.redis_lab import documented_rights
from tests.cache.semantic.conftest import a_store, direction

NAMES = Names("test:")
PARTITION = "0" * 16 + "-" + "a" * 64
OTHER = "0" * 16 + "-" + "b" * 64
LONG = 60_000


def a_question(text: str) -> Question:
    return Question(text, KeyDigests(f"entry-{text}", b"proof of " + text.encode()))


async def put(index: Index, text: str, partition: str = PARTITION, ttl_ms: int = LONG) -> None:
    await index.add(partition, a_question(text), direction(text), ttl_ms)


async def names(index: Index, text: str, partition: str = PARTITION, count: int = 8) -> list[str]:
    return [near.question.text for near in await index.nearest(partition, direction(text), count)]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=40), st.integers(1, 5))
def test_own_index_is_exact(steps: list[tuple[bool, int]], count: int) -> None:
    async def run() -> None:
        index, there = OwnIndex(100), set()
        for adds, number in steps:
            if adds:
                await put(index, str(number))
                there.add(str(number))
            else:
                await index.remove(PARTITION, f"entry-{number}")
                there.discard(str(number))
            near = await index.nearest(PARTITION, direction("x"), count)
            exact = sorted(((float(direction(text) @ direction("x")), text) for text in there), reverse=True)[:count]
            assert [one.question.text for one in near] == [text for _, text in exact]
            assert np.allclose([one.similarity for one in near], [similarity for similarity, _ in exact])

    asyncio.run(run())


async def test_own_index_holds_so_many_and_forgets_what_was_not_found_for_longest() -> None:
    index = OwnIndex(3)
    for text in "abc":
        await put(index, text)
    assert (await names(index, "a", count=1)) == ["a"]
    await put(index, "d", OTHER)
    assert set(await names(index, "a")) == {"a", "c"}
    assert await names(index, "d", OTHER) == ["d"]


async def test_own_index_forgets_with_time() -> None:
    now = 0.0
    index = OwnIndex(10, now=lambda: now)
    await put(index, "a", ttl_ms=1000)
    await put(index, "b", ttl_ms=5000)
    now = 1.0
    assert await names(index, "a") == ["b"]
    now = 5.0
    assert await names(index, "a") == []
    assert index._partitions == {}


async def test_partitions_are_apart() -> None:
    index = OwnIndex(10)
    await put(index, "a")
    assert await names(index, "a", OTHER) == []


async def test_vector_sets(vector_redis: EmbeddedRedis) -> None:
    async with a_store(vector_redis.url) as store:
        one, another = (RedisIndex(store, NAMES, 100) for _ in range(2))
        for text in "abcdef":
            await put(one, text)
        near = await another.nearest(PARTITION, direction("c"), 3)
        exact = sorted(((float(direction(text) @ direction("c")), text) for text in "abcdef"), reverse=True)[:3]
        assert [found.question.text for found in near] == [text for _, text in exact]
        assert np.allclose([found.similarity for found in near], [similarity for similarity, _ in exact], atol=1e-5)
        assert near[0].question == a_question("c")
        assert await names(another, "c", OTHER) == []
        await another.remove(PARTITION, "entry-c")
        assert "c" not in await names(one, "c")


async def test_vector_sets_forget_with_time_and_keep_their_size(vector_redis: EmbeddedRedis) -> None:
    with redis.Redis.from_url(vector_redis.url) as stored:
        async with a_store(vector_redis.url) as store:
            index = RedisIndex(store, NAMES, 4)
            await put(index, "a")
            await put(index, "b", ttl_ms=1)
            await asyncio.sleep(0.05)
            assert await names(index, "b") == ["a"]
            assert stored.execute_command("VCARD", NAMES.similar(PARTITION)) == 1
            assert 0 < stored.pttl(NAMES.similar(PARTITION)) <= LONG
            await put(index, "c", ttl_ms=2 * LONG)
            assert stored.pttl(NAMES.similar(PARTITION)) > LONG
            for text in "defghij":
                await put(index, text)
                assert text in await names(index, text)
            assert stored.execute_command("VCARD", NAMES.similar(PARTITION)) == 4
            assert len(stored.keys("test:question:*")) == 4
            # All of a tenant lies under names that begin with its tag.
            assert all(name.decode().split("{")[1].startswith("0" * 16 + "-") for name in stored.keys("*"))


async def test_another_s_value_is_nothing(vector_redis: EmbeddedRedis) -> None:
    with redis.Redis.from_url(vector_redis.url) as stored:
        async with a_store(vector_redis.url) as store:
            index = RedisIndex(store, NAMES, 4)
            await put(index, "a")
            stored.set(NAMES.question(PARTITION, "entry-a"), b"\xff nonsense")
            assert await names(index, "a") == []
            stored.set(NAMES.similar(OTHER), b"a string")
            assert await names(index, "a", OTHER) == []


@pytest.mark.parametrize("kind", ["shared", "own"])
async def test_the_index_is_chosen_by_what_redis_can_do(kind: str, request: pytest.FixtureRequest) -> None:
    server: EmbeddedRedis = request.getfixturevalue("vector_redis" if kind == "shared" else "redis_server")
    async with a_store(server.url) as store:
        shared, own = RedisIndex(store, NAMES, 4), OwnIndex(4)
        index = DetectedIndex(store, NAMES, shared, own)
        await put(index, "a")
        assert await names(index, "a") == ["a"]
        if index.chosen is shared and kind == "own":
            pytest.skip("the redis-server on the PATH has vector sets")
        assert index.chosen is (shared if kind == "shared" else own)


async def test_the_rights_that_are_documented_do_for_vector_sets(vector_redis: EmbeddedRedis) -> None:
    rights = documented_rights(semantic=True)
    with redis.Redis.from_url(vector_redis.url) as admin:
        for user, granted in (("mesh", rights), ("plain", documented_rights())):
            admin.execute_command("ACL", "SETUSER", user, "on", ">sesame", *granted)
    for user, kind in (("mesh", RedisIndex), ("plain", OwnIndex)):
        url = vector_redis.url.replace("unix://", f"unix://{user}:sesame@")
        async with a_store(url) as store:
            names_of_baton = Names("baton:")
            index = DetectedIndex(store, names_of_baton, RedisIndex(store, names_of_baton, 2), OwnIndex(2))
            for text in "abc":
                await put(index, text)
            assert await names(index, "c", count=1) == ["c"]
            await index.remove(PARTITION, "entry-c")
            assert "c" not in await names(index, "c")
            assert isinstance(index.chosen, kind), user


async def test_without_redis_there_is_no_choice_yet(redis_server: EmbeddedRedis) -> None:
    url = redis_server.url
    redis_server.close()
    async with a_store(url, Breaker(1, 0.05), timeout=0.2) as store:
        index = DetectedIndex(store, NAMES, RedisIndex(store, NAMES, 4), OwnIndex(4))
        with pytest.raises(StoreFailed):
            await put(index, "a")
        redis_server.start()
        await asyncio.sleep(0.1)
        await put(index, "a")
        assert await names(index, "a") == ["a"]
