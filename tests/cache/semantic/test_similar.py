"""A similar question gets a stored answer when it may, and only then."""

from __future__ import annotations

import asyncio
import os
import signal
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import pytest
import redis
from prometheus_client import REGISTRY

from baton.cli.redis_server import EmbeddedRedis
from baton.internal.v1 import response_cache_pb2, response_cache_pb2_grpc
from baton.rpc.service import CannotStart, Runtime
from baton_cache.semantic.semantic import LONGEST_BYTES, agreement
from tests.cache.conftest import Cache, an_answer, cache_key, running_cache
from tests.cache.semantic.conftest import CONTEXT, ENCODER, needs_encoder, question
from tests.cache.test_process import Process
from tests.cli.conftest import wait_for

pytestmark = needs_encoder

ASKED = "How do I reset my password?"
AGAIN = "What are the steps to reset a password?"
OTHER = "How do I forget my password?"
PATIENT = {"semantic_tenants": ["*"], "semantic_timeout": 20.0}


def key(tokens: tuple[int, ...], **fields: object) -> response_cache_pb2.CacheKey:
    return cache_key(tokens, **fields)  # type: ignore[arg-type]


async def ask(
    cache: Cache, text: str, tokens: tuple[int, ...] = (9, 9), context: bytes = CONTEXT, **fields: object
) -> response_cache_pb2.LookupResponse:
    request = response_cache_pb2.LookupRequest(key=key(tokens, **fields), question=question(text, context))
    return await cache.stub.Lookup(request)


async def store(
    cache: Cache, text: str, tokens: tuple[int, ...] = (1, 2), answer: str = "fox", **fields: object
) -> None:
    request = response_cache_pb2.FillRequest(
        key=key(tokens, **fields), answer=an_answer(answer), question=question(text)
    )
    assert (await cache.stub.Fill(request)).stored


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"baton_cache_semantic_{name}", labels) or 0.0


@pytest.fixture
async def similar(redis_server: EmbeddedRedis) -> AsyncIterator[Cache]:
    async with running_cache(redis_server.url, **PATIENT) as one:
        yield one


async def test_a_similar_question_gets_the_answer(similar: Cache) -> None:
    await store(similar, ASKED)
    exact = await ask(similar, ASKED, (1, 2))
    assert exact.hit
    assert not exact.HasField("similarity")
    found = await ask(similar, AGAIN)
    assert found.hit
    assert found.answer == an_answer()
    assert 0.82 <= found.similarity < 1
    assert found.entry == exact.entry
    assert found.timing.entries


async def test_another_question_does_not(similar: Cache) -> None:
    await store(similar, ASKED)
    before = counted("refusals_total", rule="word")
    assert not (await ask(similar, OTHER)).hit
    assert counted("refusals_total", rule="word") == before + 1
    before = counted("lookups_total", outcome="nothing_near")
    assert not (await ask(similar, "How old is the universe?")).hit
    assert counted("lookups_total", outcome="nothing_near") == before + 1


async def test_everything_but_the_wording_must_be_equal(similar: Cache) -> None:
    await store(similar, ASKED)
    assert not (await ask(similar, AGAIN, tenant="another")).hit
    assert not (await ask(similar, AGAIN, context=b"\x02" * 32)).hit
    assert not (await ask(similar, AGAIN, max_tokens=99)).hit
    assert not (await ask(similar, AGAIN, stop=["x"])).hit
    other_model = key((9, 9))
    other_model.model_fingerprint = "other"
    request = response_cache_pb2.LookupRequest(key=other_model, question=question(AGAIN))
    assert not (await similar.stub.Lookup(request)).hit
    assert (await ask(similar, AGAIN)).hit


async def test_it_is_for_those_who_ask_for_it(similar: Cache, redis_server: EmbeddedRedis) -> None:
    await store(similar, ASKED)
    assert not (await similar.lookup(key((9, 9)))).hit
    await similar.fill(key((5, 5)), an_answer("unseen"))
    assert (await ask(similar, AGAIN)).answer == an_answer()
    async with running_cache(redis_server.url, **PATIENT | {"semantic_tenants": ["one"]}) as for_one:
        await store(for_one, ASKED, tenant="one")
        await store(for_one, ASKED, tenant="two")
        assert (await ask(for_one, AGAIN, tenant="one")).hit
        assert not (await ask(for_one, AGAIN, tenant="two")).hit
    async with running_cache(redis_server.url) as for_nobody:
        await store(for_nobody, ASKED)
        assert not (await ask(for_nobody, AGAIN)).hit


async def test_what_is_not_deterministic_takes_no_part(similar: Cache) -> None:
    await store(similar, ASKED, temperature=0.5, seed=3)
    assert (await ask(similar, AGAIN, temperature=0.5, seed=3)).hit
    assert not (await ask(similar, AGAIN, temperature=0.5, seed=4)).hit
    unseeded = key((9, 9), temperature=0.5)
    unseeded.sampling.ClearField("seed")
    request = response_cache_pb2.LookupRequest(key=unseeded, question=question(AGAIN))
    assert not (await similar.stub.Lookup(request)).hit


async def test_an_answer_that_is_gone_takes_its_question_along(similar: Cache, stored: redis.Redis) -> None:
    await store(similar, ASKED)
    entry = (await ask(similar, AGAIN)).entry
    name = next(name for name in stored.scan_iter("*answer:*") if entry.encode() in name)
    value = stored.get(name)
    stored.delete(name)
    before = counted("lookups_total", outcome="gone")
    assert not (await ask(similar, AGAIN)).hit
    assert counted("lookups_total", outcome="gone") == before + 1
    stored.set(name, value)
    assert not (await ask(similar, AGAIN)).hit, "its question was not removed"


async def test_the_answer_of_another_key_is_not_served(similar: Cache, stored: redis.Redis) -> None:
    await store(similar, ASKED)
    await similar.fill(key((7, 7)), an_answer("not yours"))
    entry = (await ask(similar, AGAIN)).entry
    mine = next(name for name in stored.scan_iter("*answer:*") if entry.encode() in name)
    other = next(name for name in stored.scan_iter("*answer:*") if name != mine)
    stored.set(mine, stored.get(other))
    assert not (await ask(similar, AGAIN)).hit


async def test_long_questions_take_no_part(similar: Cache) -> None:
    long = ASKED + " really" * LONGEST_BYTES
    await store(similar, long)
    before = counted("lookups_total", outcome="too_long")
    assert not (await ask(similar, long + " now")).hit
    assert counted("lookups_total", outcome="too_long") == before + 1


async def test_without_redis_it_is_a_miss(similar: Cache, redis_server: EmbeddedRedis) -> None:
    await store(similar, ASKED)
    os.kill(redis_server.pid, signal.SIGKILL)
    before = counted("embed_seconds_count")
    found = await ask(similar, AGAIN)
    assert not found.hit
    assert found.miss_reason == response_cache_pb2.MISS_REASON_STORE_FAILED
    assert counted("embed_seconds_count") == before, "Redis failed once: no more time is spent"


async def test_a_slow_encoder_is_a_miss(redis_server: EmbeddedRedis) -> None:
    async with running_cache(redis_server.url, semantic_tenants=["*"], semantic_timeout=1e-6) as cache:
        await store(cache, ASKED)
        assert not (await ask(cache, AGAIN)).hit
        assert (await ask(cache, ASKED, (1, 2))).hit


async def test_shadow_mode_counts_and_does_not_serve(redis_server: EmbeddedRedis) -> None:
    async with running_cache(redis_server.url, **PATIENT | {"semantic_mode": "shadow"}) as cache:
        await store(cache, ASKED)
        for tokens, answer, judged in (((3, 3), "fox", "equal"), ((4, 4), "badger", "different")):
            before = counted("lookups_total", outcome="shadow_hit"), counted("shadow_answers_total", answers=judged)
            assert not (await ask(cache, AGAIN, tokens)).hit
            request = response_cache_pb2.FillRequest(
                key=key(tokens), answer=an_answer(answer), question=question("Is it " + AGAIN)
            )
            await cache.stub.Fill(request)
            after = counted("lookups_total", outcome="shadow_hit"), counted("shadow_answers_total", answers=judged)
            assert after == (before[0] + 1, before[1] + 1)


async def test_shadow_mode_does_not_hold_long_answers(redis_server: EmbeddedRedis) -> None:
    async with running_cache(redis_server.url, **PATIENT | {"semantic_mode": "shadow"}) as cache:
        await store(cache, ASKED, answer="fox " * 5000)
        shadows = counted("lookups_total", outcome="shadow_hit")
        judged = counted("shadow_agreement_count")
        assert not (await ask(cache, AGAIN, (3, 3))).hit
        await store(cache, AGAIN, (3, 3))
        assert counted("lookups_total", outcome="shadow_hit") == shadows + 1
        assert counted("shadow_agreement_count") == judged


async def test_a_caller_that_joins_gets_it_too(similar: Cache) -> None:
    start = response_cache_pb2.JoinStart(key=key((1, 2)), question=question(ASKED))
    call = similar.stub.Join()
    await call.write(response_cache_pb2.JoinRequest(start=start))
    seat = (await call.read()).seat
    assert seat.role == response_cache_pb2.JOIN_ROLE_LEADER
    await call.write(response_cache_pb2.JoinRequest(done=response_cache_pb2.JoinDone(answer=an_answer())))
    await call.done_writing()
    while await call.read() is not grpc.aio.EOF:
        pass
    again = similar.stub.Join()
    start = response_cache_pb2.JoinStart(key=key((9, 9)), question=question(AGAIN))
    await again.write(response_cache_pb2.JoinRequest(start=start))
    seat = (await again.read()).seat
    assert seat.role == response_cache_pb2.JOIN_ROLE_HIT
    assert seat.lookup.answer == an_answer()
    assert seat.lookup.HasField("similarity")
    again.cancel()


async def test_vector_sets_are_shared_by_replicas_and_survive_them(vector_redis: EmbeddedRedis) -> None:
    async with running_cache(vector_redis.url, **PATIENT) as first, running_cache(vector_redis.url, **PATIENT) as other:
        await store(first, ASKED)
        assert (await ask(other, AGAIN)).hit
    async with running_cache(vector_redis.url, **PATIENT) as later:
        assert (await ask(later, AGAIN)).hit
        assert not (await ask(later, OTHER)).hit
        assert not (await ask(later, AGAIN, tenant="another")).hit


async def test_an_unusable_encoder_is_refused_at_the_start(redis_server: EmbeddedRedis, tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match="--semantic-encoder"):
        async with running_cache(redis_server.url, semantic_tenants=["*"], semantic_encoder=str(tmp_path / "none")):
            pass


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def one(*flags: str) -> Process:
        started.append(Process(tmp_path, *flags))
        return started[-1]

    yield one
    for process in started:
        process.process.kill()
        process.process.wait()


def test_the_process_says_why_it_does_not_start(start: Callable[..., Process], redis_server: EmbeddedRedis) -> None:
    process = start("--redis-url", redis_server.url, "--semantic-tenants", '["*"]', "--semantic-encoder", "/no/such")
    assert process.process.wait(110) != 0
    assert "/no/such: is no directory" in process.log()
    assert "Traceback" not in process.log()


async def test_no_text_in_logs_or_metrics(
    start: Callable[..., Process], redis_server: EmbeddedRedis, tmp_path: Path
) -> None:
    process = start(
        "--redis-url", redis_server.url, "--semantic-tenants", '["*"]', "--semantic-encoder", ENCODER,
        "--semantic-timeout", "20", "--redis-timeout", "1", "--log-level", "debug",
    )  # fmt: skip
    await asyncio.to_thread(wait_for, lambda: (tmp_path / "ready.json").exists(), 110)
    ready = process.ready()
    async with grpc.aio.insecure_channel(ready["grpc"]) as channel:
        stub = response_cache_pb2_grpc.ResponseCacheStub(channel)
        cache = Cache(stub, ready["grpc"], Runtime("cache", grpc.aio.server()))
        await store(cache, ASKED)
        assert (await ask(cache, AGAIN)).hit
    with await asyncio.to_thread(urllib.request.urlopen, f"http://{ready['metrics']}/metrics") as page:
        metrics = page.read().decode()
    assert 'baton_cache_semantic_lookups_total{outcome="hit"} 1.0' in metrics
    assert "password" not in metrics
    assert "password" not in process.log().replace("--", "")


def test_agreement() -> None:
    assert agreement("a b c", "a b c") == 1
    assert agreement("a b", "c d") == 0
    assert agreement("a b c d", "a b x y") == 0.5
    assert agreement("", "") == 1
    assert agreement("", "a") == 0
