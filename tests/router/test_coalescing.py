"""Equal requests in flight share one generation: on one router, over several, over several cache replicas."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from baton.cli.redis_server import EmbeddedRedis
from baton.v1 import inference_pb2, ledger_pb2, sampling_pb2
from tests.cache.conftest import Cache, running_cache
from tests.router.conftest import Router, eventually, running_router
from tests.router.scripted import ScriptedWorker, token_at
from tests.router.test_stream import collect, entries

TOKENS = 20
EXPECTED = [token_at(i) for i in range(TOKENS)]
MISS = inference_pb2.CACHE_STATUS_MISS
HIT = inference_pb2.CACHE_STATUS_HIT
COALESCED = inference_pb2.CACHE_STATUS_COALESCED


@pytest.fixture
def redis_server() -> EmbeddedRedis:  # type: ignore[misc]
    server = EmbeddedRedis()
    server.start()
    yield server
    server.close()


@pytest.fixture
async def cache(redis_server: EmbeddedRedis) -> AsyncIterator[Cache]:
    async with running_cache(redis_server.url) as one:
        yield one


@contextlib.asynccontextmanager
async def routers(model: Path, worker: ScriptedWorker, *cache_targets: str) -> AsyncIterator[list[Router]]:
    """A router for each list of cache targets."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                running_router(model, decode_targets=worker.address, cache_target=target, cache_timeout_seconds=2.0)
            )
            for target in cache_targets
        ]


def request(**control: object) -> inference_pb2.StreamGenerateRequest:
    return inference_pb2.StreamGenerateRequest(
        text="fox",
        sampling=sampling_pb2.SamplingParams(max_tokens=TOKENS, temperature=0),
        cache_control=inference_pb2.CacheControl(**control),  # type: ignore[arg-type]
    )


async def ask(router: Router) -> tuple[list[int], str, inference_pb2.Summary]:
    """Tokens, text and summary; checks that the stream has no gap."""
    messages = await collect(router.stub.StreamGenerate(request()))
    tokens: list[int] = []
    for message in messages[1:-1]:
        assert message.chunk.index == len(tokens)
        tokens += message.chunk.token_ids
    return tokens, "".join(m.chunk.text for m in messages), messages[-1].summary


async def begun(router: Router, tokens: int = 2) -> grpc.aio.UnaryStreamCall:  # type: ignore[type-arg]
    """A stream of which the first tokens were read."""
    call = router.stub.StreamGenerate(request())
    for _ in range(1 + tokens):
        await call.read()
    return call


@pytest.mark.parametrize("replicas", [1, 3])
async def test_a_hundred_from_three_routers_are_generated_once(
    router_model: Path, worker: ScriptedWorker, redis_server: EmbeddedRedis, replicas: int
) -> None:
    worker.pause = 0.05
    async with contextlib.AsyncExitStack() as stack:
        caches = [await stack.enter_async_context(running_cache(redis_server.url)) for _ in range(replicas)]
        # With three, each router knows one only: no two of them meet but in Redis.
        targets = [caches[i % replicas].address for i in range(3)]
        async with routers(router_model, worker, *targets) as three:
            answers = await asyncio.gather(*(ask(three[i % 3]) for i in range(100)))
    assert len(worker.requests) == 1
    assert all(answer[:2] == answers[0][:2] for answer in answers)
    assert answers[0][0] == EXPECTED
    statuses = Counter(summary.cache_status for _, _, summary in answers)
    assert statuses[MISS] == 1
    assert statuses[COALESCED] + statuses[HIT] == 99
    assert statuses[COALESCED] > 50
    for _, _, summary in answers:
        assert summary.usage.completion_tokens == TOKENS
        assert summary.finish_reason == sampling_pb2.FINISH_REASON_LENGTH
        assert abs(summary.ledger.total.residual.ToNanoseconds()) <= 1000
        assert summary.ledger.HasField("first_token")


async def test_a_follower_waits_in_its_ledger(router_model: Path, worker: ScriptedWorker, cache: Cache) -> None:
    worker.pause = 0.02
    async with routers(router_model, worker, cache.address, cache.address) as (one, two):
        leader = asyncio.create_task(ask(one))
        await eventually(lambda: worker.live == 1)
        near, far = await asyncio.gather(ask(one), ask(two))
        await leader
    for _, _, summary in (near, far):
        assert summary.cache_status == COALESCED
        ledger = entries(summary.ledger.total)
        assert ledger[ledger_pb2.HOP_ROUTER, ledger_pb2.KIND_QUEUE] > 0.5 * summary.ledger.total.total.ToSeconds()
        assert (ledger_pb2.HOP_DECODE, ledger_pb2.KIND_COMPUTE) not in ledger


async def test_each_may_leave_alone(router_model: Path, worker: ScriptedWorker, cache: Cache) -> None:
    worker.pause = 0.03
    async with routers(router_model, worker, cache.address, cache.address) as (one, two):
        first = await begun(one)
        near, far = asyncio.create_task(ask(one)), asyncio.create_task(ask(two))
        await asyncio.sleep(0.05)
        first.cancel()
        assert (await near)[0] == EXPECTED
        assert (await far)[0] == EXPECTED
        assert len(worker.requests) == 1, "who asked first left, and the generation went on"


async def test_it_goes_on_for_another_router_alone(router_model: Path, worker: ScriptedWorker, cache: Cache) -> None:
    worker.pause = 0.03
    async with routers(router_model, worker, cache.address, cache.address) as (one, two):
        first = await begun(one)
        far = asyncio.create_task(ask(two))
        await asyncio.sleep(0.1)
        first.cancel()
        assert (await far)[0] == EXPECTED
        assert len(worker.requests) == 1


async def test_the_last_to_leave_ends_it(router_model: Path, worker: ScriptedWorker, cache: Cache) -> None:
    worker.pause = 0.03
    async with routers(router_model, worker, cache.address, cache.address) as (one, two):
        calls = [await begun(router) for router in (one, one, two)]
        for call in calls:
            assert worker.live == 1
            call.cancel()
            await asyncio.sleep(0.1)
        await eventually(lambda: worker.live == 0, 1.0)
        assert len(worker.requests) == 1
        worker.pause = 0
        assert (await ask(two))[2].cache_status == MISS, "nothing incomplete was stored"


async def test_a_lost_leader_is_followed_without_a_seam(
    router_model: Path, worker: ScriptedWorker, cache: Cache
) -> None:
    worker.pause = 0.03
    async with routers(router_model, worker, cache.address) as (heir,):
        async with routers(router_model, worker, cache.address) as (leader,):
            first = await begun(leader)
            far = asyncio.create_task(ask(heir))
            await asyncio.sleep(0.1)
        first.cancel()
        tokens, text, summary = await far
        assert tokens == EXPECTED
        assert text == "".join(f"{i} " for i in range(TOKENS))
        assert summary.usage.completion_tokens == TOKENS
        assert len(worker.requests) == 2
        delivered = list(worker.requests[1].delivered_token_ids)
        assert delivered == EXPECTED[: len(delivered)]
        assert len(delivered) >= 2, "it went on from where the leader was"
        # The summary does not wait until the answer is stored: the next one may still find the flight that brings it.
        assert (await ask(heir))[0] == EXPECTED
        assert len(worker.requests) == 2, "the answer was passed on or stored whole"


async def test_a_lost_cache_is_not_noticed(
    router_model: Path, worker: ScriptedWorker, redis_server: EmbeddedRedis
) -> None:
    worker.pause = 0.03
    async with contextlib.AsyncExitStack() as stack:
        cache = await stack.enter_async_context(running_cache(redis_server.url))
        async with routers(router_model, worker, cache.address, cache.address) as (one, two):
            leader = asyncio.create_task(ask(one))
            await eventually(lambda: worker.live == 1)
            far = asyncio.create_task(ask(two))
            await asyncio.sleep(0.1)
            await stack.aclose()
            assert (await leader)[0] == EXPECTED
            assert (await far)[0] == EXPECTED
            assert len(worker.requests) == 2


async def test_a_more_patient_request_goes_on(router_model: Path, worker: ScriptedWorker, cache: Cache) -> None:
    worker.pause = 0.03
    async with routers(router_model, worker, cache.address) as (one,):
        hasty = asyncio.create_task(collect(one.stub.StreamGenerate(request(), timeout=0.25)))
        await eventually(lambda: worker.live == 1)
        patient = asyncio.create_task(ask(one))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await hasty
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await patient)[0] == EXPECTED


async def test_a_poisonous_request_is_tried_by_one_router(
    router_model: Path, worker: ScriptedWorker, cache: Cache
) -> None:
    async with ScriptedWorker.running(router_model) as second:
        for one in (worker, second):
            one.pause, one.fail, one.fail_after = 0.05, grpc.StatusCode.INTERNAL, 5
        target = f"{worker.address},{second.address}"
        async with contextlib.AsyncExitStack() as stack:
            settings = {"decode_targets": target, "cache_target": cache.address, "cache_timeout_seconds": 2.0}
            pair = [await stack.enter_async_context(running_router(router_model, **settings)) for _ in range(2)]
            failed = await asyncio.gather(*(ask(router) for router in pair * 3), return_exceptions=True)
        codes = {error.code() for error in failed if isinstance(error, grpc.aio.AioRpcError)}
        assert codes == {grpc.StatusCode.FAILED_PRECONDITION}
        assert len(failed) == 6
        assert len(worker.requests) + len(second.requests) == 2, "it broke two workers, and that is enough"


async def test_original_pace(router_model: Path, worker: ScriptedWorker, cache: Cache) -> None:
    worker.pause = 0.03
    async with routers(router_model, worker, cache.address) as (one,):
        while (await ask(one))[2].cache_status != HIT:
            pass  # an answer is stored after it was streamed
        arrivals = []
        began = time.monotonic()
        async for message in one.stub.StreamGenerate(request(original_pace=True)):
            arrivals.append((time.monotonic() - began, message))
        assert arrivals[-1][1].summary.cache_status == HIT
        at = [seconds for seconds, message in arrivals if message.HasField("chunk")]
        assert len(at) == TOKENS
        assert at[-1] >= 0.03 * (TOKENS - 1)
        assert at[TOKENS // 2] >= 0.03 * (TOKENS // 2 - 1), "not all at the end"
        began = time.monotonic()
        assert (await ask(one))[2].cache_status == HIT
        assert time.monotonic() - began < 0.03 * (TOKENS - 1), "unasked it comes at once"


async def test_what_may_not_share_does_not(router_model: Path, worker: ScriptedWorker, cache: Cache) -> None:
    worker.pause = 0.01
    async with routers(router_model, worker, cache.address) as (one,):
        modes = [inference_pb2.CACHE_MODE_BYPASS, inference_pb2.CACHE_MODE_REFRESH]
        calls = [one.stub.StreamGenerate(request(mode=mode)) for mode in modes * 2]
        await asyncio.gather(*(collect(call) for call in calls), ask(one))
        assert len(worker.requests) == 5
