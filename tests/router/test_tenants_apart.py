"""Tenants, as authentication tells them: what one asked is in no cache of another, and nobody can say who he is."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from baton.rpc.access import Who
from baton.rpc.caller import Caller
from baton.rpc.gate import Gate
from baton.v1 import inference_pb2, sampling_pb2
from baton_router.salts import Salts
from tests.router.conftest import Router, eventually, running_router
from tests.router.scripted import ScriptedCache, ScriptedWorker

GATE = Gate(
    anonymous=Who.NOBODY, clients=[lambda key: Caller(key.removeprefix("key-of-")) if "key-of-" in key else None]
)
HIT, MISS = inference_pb2.CACHE_STATUS_HIT, inference_pb2.CACHE_STATUS_MISS


@pytest.fixture
async def cache() -> AsyncIterator[ScriptedCache]:
    async with ScriptedCache.running() as one:
        yield one


def shown(tenant: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer key-of-{tenant}"),)


async def ask(
    router: Router, tenant: str, salt: str = "", *more: tuple[str, str]
) -> inference_pb2.CacheStatus.ValueType:
    control = inference_pb2.CacheControl(cache_salt=salt) if salt else None
    sampling = sampling_pb2.SamplingParams(max_tokens=3, temperature=0)
    request = inference_pb2.GenerateRequest(text="the fox", sampling=sampling, cache_control=control)
    answer = await router.stub.Generate(request, metadata=(*shown(tenant), *more), timeout=10)
    return answer.summary.cache_status


async def test_what_one_tenant_asked_no_other_finds(
    router_model: Path, worker: ScriptedWorker, cache: ScriptedCache
) -> None:
    settings = {"decode_targets": worker.address, "cache_target": cache.address, "cache_timeout_seconds": 5.0}
    async with running_router(router_model, GATE, **settings) as router:
        for number, (tenant, salt) in enumerate((("a", ""), ("b", ""), ("a", "s"), ("b", "s")), 1):
            assert await ask(router, tenant, salt) == MISS
            await eventually(lambda number=number: len(cache.stored) == number)  # type: ignore[misc]
            assert await ask(router, tenant, salt) == HIT
            # Nothing that a caller sends beside its credentials makes it somebody else.
            assert await ask(router, tenant, salt, ("tenant", "b"), ("x-tenant", "a")) == HIT
    assert {fill.key.tenant for fill in cache.stored.values()} == {"a", "b"}
    salts = [request.cache_salt for request in worker.requests]
    assert len(set(salts)) == 4, "prefix caches are apart as well"
    assert all(len(salt) == 32 for salt in salts)


async def test_routers_with_one_secret_share_prefix_caches_and_others_do_not(
    router_model: Path, worker: ScriptedWorker
) -> None:
    for secret in ("one", "one", "two", "", ""):
        async with running_router(router_model, GATE, decode_targets=worker.address, salt_secret=secret) as router:
            await ask(router, "a")
    one, again, two, drawn, drawn_again = [request.cache_salt for request in worker.requests]
    assert one == again
    assert len({one, two, drawn, drawn_again}) == 4


async def test_without_tenants_everybody_shares(router: Router, worker: ScriptedWorker) -> None:
    sampling = sampling_pb2.SamplingParams(max_tokens=1, temperature=0)
    await router.stub.Generate(inference_pb2.GenerateRequest(text="the fox", sampling=sampling), timeout=10)
    assert worker.requests[0].cache_salt == b""


def test_salts_differ_wherever_tenant_or_salt_do() -> None:
    salts = Salts(b"secret")
    pairs = [("a", ""), ("", "a"), ("a", "b"), ("ab", ""), ("", "ab"), ("a", "a"), ("b", "a")]
    assert len({salts.derive(*pair) for pair in pairs}) == len(pairs)
    assert salts.derive("a", "b") != Salts(b"secre").derive("a", "b")
    assert salts.derive("", "") == b""


async def test_refused_calls_reach_nothing_and_leave_no_key_in_the_log(
    router_model: Path, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with running_router(router_model, GATE, decode_targets=worker.address) as router:
        request = inference_pb2.GenerateRequest(text="the fox")
        for metadata in ((), (("authorization", "Bearer hunter2-wrong"),), (("authorization", "hunter2-wrong"),)):
            for call in (
                router.stub.Generate(request, metadata=metadata, timeout=10),
                router.stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata, timeout=10),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert "hunter2" not in str(caught.value)
        await ask(router, "hunter2-good")
        # Garbage of somebody unknown is not even parsed.
        async with grpc.aio.insecure_channel(router.address) as channel:
            generate = channel.unary_unary("/baton.v1.Inference/Generate")
            codes = [await generate(b"\xff" * 100, metadata=m, timeout=10).code() for m in ((), shown("a"))]
        assert codes == [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT]
    assert len(worker.requests) == 1
    assert "hunter2" not in caplog.text
