"""The response cache: a hit replays, a failure is a miss, and only complete answers are stored."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from baton.rpc.breaker import Breaker
from baton.v1 import inference_pb2, ledger_pb2, sampling_pb2
from tests.router.conftest import Router, eventually, running_router
from tests.router.scripted import ScriptedCache, ScriptedWorker, token_at
from tests.router.test_stream import check_indices, collect, entries

USE = inference_pb2.CACHE_MODE_USE


@pytest.fixture
async def cache() -> AsyncIterator[ScriptedCache]:
    async with ScriptedCache.running() as one:
        yield one


@pytest.fixture
async def cached_router(router_model: Path, worker: ScriptedWorker, cache: ScriptedCache) -> AsyncIterator[Router]:
    settings = {"decode_targets": worker.address, "cache_target": cache.address, "cache_timeout_seconds": 0.2}
    async with running_router(router_model, **settings) as one:
        yield one


def ask(
    mode: inference_pb2.CacheMode.ValueType = USE, seed: int | None = 5, temperature: float = 0.7, text: str = "fox"
) -> inference_pb2.StreamGenerateRequest:
    sampling = sampling_pb2.SamplingParams(max_tokens=6, temperature=temperature)
    if seed is not None:
        sampling.seed = seed
    control = inference_pb2.CacheControl(mode=mode)
    return inference_pb2.StreamGenerateRequest(text=text, sampling=sampling, cache_control=control)


async def get(router: Router, request: inference_pb2.StreamGenerateRequest) -> tuple[list[int], inference_pb2.Summary]:
    messages = await collect(router.stub.StreamGenerate(request))
    return [i for m in messages for i in m.chunk.token_ids], messages[-1].summary


async def test_hit_replays_the_stream(cached_router: Router, worker: ScriptedWorker, cache: ScriptedCache) -> None:
    tokens, first = await get(cached_router, ask())
    assert first.cache_status == inference_pb2.CACHE_STATUS_MISS
    await eventually(lambda: len(cache.stored) == 1)
    again = await collect(cached_router.stub.StreamGenerate(ask()))
    summary = again[-1].summary
    assert summary.cache_status == inference_pb2.CACHE_STATUS_HIT
    check_indices([m.chunk for m in again[1:-1]])
    assert [i for m in again for i in m.chunk.token_ids] == tokens == [token_at(i) for i in range(6)]
    assert (summary.finish_reason, summary.usage) == (first.finish_reason, first.usage)
    assert len(worker.requests) == 1
    ledger = entries(summary.ledger.total)
    assert ledger[ledger_pb2.HOP_CACHE, ledger_pb2.KIND_CACHE] == pytest.approx(0.0009)
    assert ledger[ledger_pb2.HOP_CACHE, ledger_pb2.KIND_NETWORK] > 0
    assert abs(summary.ledger.total.residual.ToNanoseconds()) <= 1000
    assert summary.ledger.HasField("first_token")


async def test_greedy_shares_across_seeds(cached_router: Router, worker: ScriptedWorker, cache: ScriptedCache) -> None:
    await get(cached_router, ask(seed=None, temperature=0))
    await eventually(lambda: len(cache.stored) == 1)
    assert (await get(cached_router, ask(seed=9, temperature=0)))[1].cache_status == inference_pb2.CACHE_STATUS_HIT


async def test_quantized_workers_have_answers_of_their_own(
    cached_router: Router, worker: ScriptedWorker, cache: ScriptedCache
) -> None:
    async def wait_for(status: inference_pb2.CacheStatus.ValueType) -> None:
        async with asyncio.timeout(5):  # until the router has heard of the change
            while (await get(cached_router, ask()))[1].cache_status != status:  # noqa: ASYNC110 only asking shows it
                await asyncio.sleep(0.02)

    await get(cached_router, ask())
    await eventually(lambda: len(cache.stored) == 1)
    worker.state.model.quantization = "int8"
    await wait_for(inference_pb2.CACHE_STATUS_MISS)
    await eventually(lambda: len(cache.stored) == 2)
    assert {fill.key.model_fingerprint for fill in cache.stored.values()} == {"model-1", "model-1+int8"}
    assert {sent.model_fingerprint for sent in worker.requests} == {"model-1"}
    del cache.stored[next(key for key, fill in cache.stored.items() if "int8" in fill.key.model_fingerprint)]
    worker.state.model.quantization = "none"
    await wait_for(inference_pb2.CACHE_STATUS_HIT)


async def test_what_is_not_deterministic_is_not_cached(cached_router: Router, cache: ScriptedCache) -> None:
    for request in (ask(seed=None), ask(inference_pb2.CACHE_MODE_BYPASS)):
        assert (await get(cached_router, request))[1].cache_status == inference_pb2.CACHE_STATUS_BYPASS
    resumed = ask()
    resumed.resume_from.ids.extend([token_at(0)])
    assert (await get(cached_router, resumed))[1].cache_status == inference_pb2.CACHE_STATUS_BYPASS
    await asyncio.sleep(0.05)
    assert (cache.lookups, cache.stored) == (0, {})


async def test_modes(cached_router: Router, worker: ScriptedWorker, cache: ScriptedCache) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await get(cached_router, ask(inference_pb2.CACHE_MODE_ONLY))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert worker.requests == []
    refresh = ask(inference_pb2.CACHE_MODE_REFRESH)
    refresh.cache_control.ttl.FromSeconds(60)
    assert (await get(cached_router, refresh))[1].cache_status == inference_pb2.CACHE_STATUS_BYPASS
    await eventually(lambda: len(cache.stored) == 1)
    assert next(iter(cache.stored.values())).ttl.seconds == 60
    summary = (await get(cached_router, ask(inference_pb2.CACHE_MODE_ONLY)))[1]
    assert summary.cache_status == inference_pb2.CACHE_STATUS_HIT


async def test_broken_cache_is_a_miss(cached_router: Router, worker: ScriptedWorker, cache: ScriptedCache) -> None:
    cache.broken = True
    for _ in range(6):
        assert (await get(cached_router, ask()))[1].cache_status == inference_pb2.CACHE_STATUS_MISS
    assert len(worker.requests) == 6
    assert cache.lookups < 6, "the breaker opened"


async def test_what_a_cache_refuses_does_not_break_it(
    cached_router: Router, worker: ScriptedWorker, cache: ScriptedCache
) -> None:
    cache.broken, cache.status = True, grpc.StatusCode.INVALID_ARGUMENT
    for number in range(6):
        assert (await get(cached_router, ask(text=f"fox {number}")))[1].cache_status == inference_pb2.CACHE_STATUS_MISS
    assert cache.lookups == 6, "it was asked each time"


async def test_slow_cache_costs_its_timeout(router_model: Path, worker: ScriptedWorker, cache: ScriptedCache) -> None:
    cache.delay = 5
    settings = {"decode_targets": worker.address, "cache_target": cache.address}
    async with running_router(router_model, **settings) as router:
        before = time.monotonic()
        assert (await get(router, ask()))[1].cache_status == inference_pb2.CACHE_STATUS_MISS
        assert time.monotonic() - before < 0.3


async def test_dead_cache_is_a_miss(router_model: Path, worker: ScriptedWorker) -> None:
    settings = {"decode_targets": worker.address, "cache_target": "127.0.0.1:1"}
    async with running_router(router_model, **settings) as router:
        assert (await get(router, ask()))[1].cache_status == inference_pb2.CACHE_STATUS_MISS


async def test_incomplete_answers_are_not_stored(
    cached_router: Router, worker: ScriptedWorker, cache: ScriptedCache
) -> None:
    worker.pause = 0.02
    call = cached_router.stub.StreamGenerate(ask())
    await call.read()
    await call.read()
    call.cancel()
    await eventually(lambda: worker.live == 0)
    worker.pause = 0
    worker.fail, worker.fail_after = grpc.StatusCode.INTERNAL, 3
    with pytest.raises(grpc.aio.AioRpcError):
        await get(cached_router, ask(text="other"))
    await asyncio.sleep(0.05)
    assert cache.stored == {}


def test_breaker() -> None:
    now = 0.0
    breaker = Breaker(failures=2, pause_seconds=1.0, now=lambda: now)
    breaker.failed()
    assert breaker.allows()
    breaker.failed()
    assert not breaker.allows()
    now = 1.0
    assert breaker.allows()
    assert not breaker.allows(), "one trial a pause"
    breaker.worked()
    assert breaker.allows()
