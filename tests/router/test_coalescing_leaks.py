"""After many shared requests that ended in every way, nothing of them is left."""

from __future__ import annotations

import asyncio
import gc
import random
from pathlib import Path

import grpc

from baton.internal.v1 import response_cache_pb2
from baton.rpc.channel import ChannelPool
from baton.v1 import inference_pb2, sampling_pb2
from baton_router.flight import Flight
from baton_router.replicas import Replicas
from baton_router.response_cache import ResponseCache
from tests.cache.conftest import Cache
from tests.router.conftest import Router, eventually
from tests.router.scripted import ScriptedWorker
from tests.router.test_coalescing import cache, redis_server, routers  # noqa: F401 fixtures

REQUESTS = 300


async def one_of_many(router: Router, rng: random.Random) -> None:
    """Ask one of five questions; leave at once, in between, or never."""
    sampling = sampling_pb2.SamplingParams(max_tokens=20, temperature=0)
    request = inference_pb2.StreamGenerateRequest(text=f"fox {rng.randrange(5)}", sampling=sampling)
    if rng.random() < 0.3:  # or soon everything is a hit
        request.cache_control.mode = inference_pb2.CACHE_MODE_REFRESH
    call = router.stub.StreamGenerate(request)
    patience = rng.choice([0, 1, 5, 1000])
    try:
        for _ in range(patience):
            if await call.read() is grpc.aio.EOF:
                return
    finally:
        call.cancel()


async def test_nothing_is_left(router_model: Path, worker: ScriptedWorker, cache: Cache) -> None:  # noqa: F811
    worker.pause = 0.005
    rng = random.Random(7)
    async with routers(router_model, worker, cache.address, cache.address) as pair:
        before = len(asyncio.all_tasks())
        for _ in range(REQUESTS // 30):
            await asyncio.gather(*(one_of_many(rng.choice(pair), rng) for _ in range(30)))
        await eventually(lambda: worker.live == 0)

        def quiet() -> bool:
            gc.collect()
            return len(asyncio.all_tasks()) <= before + 2  # gRPC's own come and go

        await eventually(quiet, 10.0)


async def test_a_dead_cache_leaves_nothing() -> None:
    """Not even a task that nobody owns, which is noticed when it is collected."""
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(str(context["message"])))
    rng = random.Random(7)

    async def joins(channels: ChannelPool) -> None:
        replicas = Replicas(["127.0.0.1:1"], resolve_every=60)
        async with replicas.watched():
            cache = ResponseCache(channels, replicas, timeout=rng.uniform(0.001, 0.02), similar_timeout=0.02)
            async with cache.join(response_cache_pb2.JoinStart(), Flight("r")) as join:
                assert join is None

    for _ in range(10):
        channels = ChannelPool()
        for _ in range(10):
            await asyncio.gather(*(joins(channels) for _ in range(10)))
            await asyncio.sleep(rng.uniform(0, 0.05))
        await channels.close()
        gc.collect()
    assert complaints == []
