"""Lookups and fills, with a Redis that works."""

from __future__ import annotations

import asyncio

import grpc
import pytest
import redis
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prometheus_client import REGISTRY

from baton.cli.redis_server import EmbeddedRedis
from baton.internal.v1 import response_cache_pb2
from baton.v1 import ledger_pb2, sampling_pb2
from baton_cache.key import Keys
from baton_cache.value import VERSION, encode
from tests.cache.conftest import Cache, an_answer, cache_key, name_of, running_cache
from tests.fixtures.exposition import at_start, series

MOST = 1024 * 1024
ABSENT = response_cache_pb2.MISS_REASON_ABSENT
CORRUPT = response_cache_pb2.MISS_REASON_CORRUPT


async def refused_field(call: grpc.aio.UnaryUnaryCall) -> str:  # type: ignore[type-arg]
    """The field that a call is refused for."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(caught.value)
    assert status is not None
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            return bad.field_violations[0].field
    raise AssertionError("no field named")


def counted(metric: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(metric, labels) or 0.0


def test_the_first_failure_is_a_rise() -> None:
    found = at_start("baton_cache")
    for outcome in ("stored", "too_large", "store_failed"):
        assert found[series("baton_cache_fills_total", outcome=outcome)] == 0
    for operation in ("get", "set", "remove", "ping"):
        for how in ("no_answer", "refused", "breaker_open"):
            assert found[series("baton_cache_redis_failures_total", operation=operation, how=how)] == 0


async def test_a_fill_is_a_hit(cache: Cache) -> None:
    assert await cache.miss(cache_key()) == ABSENT
    assert await cache.fill(cache_key(), an_answer())
    found = await cache.lookup(cache_key())
    assert found.hit
    assert found.answer == an_answer()
    assert found.miss_reason == response_cache_pb2.MISS_REASON_UNSPECIFIED
    assert await cache.miss(cache_key((5, 6))) == ABSENT
    assert await cache.miss(cache_key(tenant="other")) == ABSENT


async def test_a_second_fill_replaces_the_first(cache: Cache) -> None:
    assert await cache.fill(cache_key(), an_answer("old"))
    assert await cache.fill(cache_key(), an_answer("new"))
    assert (await cache.lookup(cache_key())).answer == an_answer("new")


async def test_a_long_prompt(cache: Cache) -> None:
    key = cache_key(tuple(range(100_000)))
    assert await cache.fill(key, an_answer())
    assert (await cache.lookup(key)).hit


async def test_the_account_closes(cache: Cache) -> None:
    await cache.fill(cache_key(), an_answer())
    timing = (await cache.lookup(cache_key())).timing
    assert timing.total_ns > 0
    assert sum(entry.duration_ns for entry in timing.entries) == timing.total_ns
    assert {entry.hop for entry in timing.entries} == {ledger_pb2.HOP_CACHE}
    assert {entry.kind for entry in timing.entries} == {ledger_pb2.KIND_CACHE, ledger_pb2.KIND_SERIALIZE}


async def test_it_counts(cache: Cache) -> None:
    hits, misses = (counted("baton_cache_lookups_total", outcome=outcome) for outcome in ("hit", "absent"))
    fills, written = counted("baton_cache_fills_total", outcome="stored"), counted("baton_cache_written_bytes_total")
    await cache.miss(cache_key())
    await cache.fill(cache_key(), an_answer())
    await cache.lookup(cache_key())
    assert counted("baton_cache_lookups_total", outcome="hit") == hits + 1
    assert counted("baton_cache_lookups_total", outcome="absent") == misses + 1
    assert counted("baton_cache_fills_total", outcome="stored") == fills + 1
    size = len(encode(an_answer(), Keys(b"").digests(cache_key()).proof, MOST))
    assert counted("baton_cache_written_bytes_total") == written + size


async def test_ttl(cache: Cache, stored: redis.Redis) -> None:
    await cache.fill(cache_key(), an_answer(), ttl=0.1)
    assert (await cache.lookup(cache_key())).hit
    await asyncio.sleep(0.15)
    assert await cache.miss(cache_key()) == ABSENT
    for ttl, least, most in ((90.0, 80, 90), (None, 77_700, 95_040), (1e9, 2_332_700, 2_592_000)):
        await cache.fill(cache_key(), an_answer(), ttl)
        assert least <= stored.ttl(name_of(cache_key())) <= most


async def test_oversize_is_not_stored(redis_server: EmbeddedRedis, stored: redis.Redis) -> None:
    async with running_cache(redis_server.url, max_answer_bytes=1000) as cache:
        assert not await cache.fill(cache_key(), an_answer(chunks=200))
        assert await cache.miss(cache_key()) == ABSENT
        assert await cache.fill(cache_key(), an_answer(chunks=2))
    assert stored.dbsize() == 1


async def test_a_corrupt_value_is_a_miss_and_removed(cache: Cache, stored: redis.Redis) -> None:
    name = name_of(cache_key())
    whole = encode(an_answer(), Keys(b"").digests(cache_key()).proof, MOST)
    for broken in (b"", b"garbage", whole[:-1], whole[:30] + bytes([whole[30] ^ 1]) + whole[31:]):
        stored.set(name, broken)
        assert await cache.miss(cache_key()) == CORRUPT
        assert not stored.exists(name)
        assert await cache.miss(cache_key()) == ABSENT


async def test_a_value_of_another_request_is_a_miss_and_removed(cache: Cache, stored: redis.Redis) -> None:
    await cache.fill(cache_key((1,)), an_answer("somebody else's"))
    stored.copy(name_of(cache_key((1,))), name_of(cache_key((2,))))
    assert await cache.miss(cache_key((2,))) == CORRUPT
    assert not stored.exists(name_of(cache_key((2,))))
    assert (await cache.lookup(cache_key((1,)))).hit


async def test_a_value_of_another_type_is_a_miss_and_removed(cache: Cache, stored: redis.Redis) -> None:
    stored.rpush(name_of(cache_key()), "a")
    assert await cache.miss(cache_key()) == CORRUPT
    assert not stored.exists(name_of(cache_key()))


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1])
async def test_a_value_of_another_version_is_left_alone(cache: Cache, stored: redis.Redis, version: int) -> None:
    other = response_cache_pb2.StoredValue(version=version, answer=b"who knows").SerializeToString()
    stored.set(name_of(cache_key()), other)
    assert await cache.miss(cache_key()) == ABSENT
    assert stored.get(name_of(cache_key())) == other


@pytest.mark.parametrize("field", ["model_fingerprint", "token_ids", "sampling.temperature"])
async def test_an_incomplete_key_is_refused(cache: Cache, field: str) -> None:
    key = cache_key()
    if field.startswith("sampling."):
        key.sampling.ClearField("temperature")
    else:
        key.ClearField(field)  # type: ignore[arg-type]
    fill = response_cache_pb2.FillRequest(key=key, answer=an_answer())
    assert await refused_field(cache.stub.Lookup(response_cache_pb2.LookupRequest(key=key))) == f"key.{field}"
    assert await refused_field(cache.stub.Fill(fill)) == f"key.{field}"


async def test_no_key_no_end_no_time_is_refused(cache: Cache) -> None:
    assert await refused_field(cache.stub.Lookup(response_cache_pb2.LookupRequest())) == "key"
    unfinished = an_answer()
    unfinished.finish_reason = sampling_pb2.FINISH_REASON_UNSPECIFIED
    for request, field in (
        (response_cache_pb2.FillRequest(answer=an_answer()), "key"),
        (response_cache_pb2.FillRequest(key=cache_key()), "answer.finish_reason"),
        (response_cache_pb2.FillRequest(key=cache_key(), answer=unfinished), "answer.finish_reason"),
    ):
        assert await refused_field(cache.stub.Fill(request)) == field
    for seconds in (0, -1):
        request = response_cache_pb2.FillRequest(key=cache_key(), answer=an_answer())
        request.ttl.FromSeconds(seconds)
        assert await refused_field(cache.stub.Fill(request)) == "ttl"


async def test_what_is_not_deterministic_is_not_cached(cache: Cache, stored: redis.Redis) -> None:
    drawn = cache_key(temperature=0.7)
    drawn.sampling.ClearField("seed")
    assert await cache.miss(drawn) == ABSENT
    request = response_cache_pb2.FillRequest(key=drawn, answer=an_answer())
    assert await refused_field(cache.stub.Fill(request)) == "key.sampling.seed"
    greedy = cache_key(temperature=0.0)
    greedy.sampling.ClearField("seed")
    assert await cache.fill(greedy, an_answer())
    assert await cache.fill(cache_key(temperature=0.7, seed=3), an_answer())
    assert await cache.miss(cache_key(temperature=0.7, seed=4)) == ABSENT
    assert stored.dbsize() == 2


async def test_a_key_of_a_later_version_is_not_cached(cache: Cache) -> None:
    await cache.fill(cache_key(), an_answer())
    later = cache_key()
    later.sampling.MergeFromString(b"\xa0\x06\x01")
    assert await cache.miss(later) == ABSENT
    assert await refused_field(cache.stub.Fill(response_cache_pb2.FillRequest(key=later, answer=an_answer()))) == "key"
