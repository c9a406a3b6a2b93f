"""Router, cache and Redis together."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import redis

from baton.cli.redis_server import EmbeddedRedis
from baton.v1 import inference_pb2, sampling_pb2
from tests.cache.conftest import running_cache
from tests.router.conftest import Router, eventually, running_router
from tests.router.scripted import ScriptedWorker
from tests.router.test_stream import collect
from tests.text.conftest import write_text_model


async def ask(router: Router) -> tuple[list[int], inference_pb2.CacheStatus.ValueType]:
    """Tokens and cache status of one request."""
    sampling = sampling_pb2.SamplingParams(max_tokens=6, temperature=0)
    messages = await collect(
        router.stub.StreamGenerate(inference_pb2.StreamGenerateRequest(text="fox", sampling=sampling))
    )
    return [i for m in messages for i in m.chunk.token_ids], messages[-1].summary.cache_status


async def test_asked_again_it_is_a_hit_and_without_redis_a_miss(
    tmp_path: Path, redis_server: EmbeddedRedis, stored: redis.Redis
) -> None:
    model = write_text_model(tmp_path / "little", context=128)
    async with ScriptedWorker.running(model) as worker, running_cache(redis_server.url) as cache:
        settings = {"decode_targets": worker.address, "cache_target": cache.address, "cache_timeout_seconds": 1.0}
        async with running_router(model, **settings) as router:
            tokens, status = await ask(router)
            assert status == inference_pb2.CACHE_STATUS_MISS
            await eventually(lambda: stored.dbsize() == 1)
            assert await ask(router) == (tokens, inference_pb2.CACHE_STATUS_HIT)
            assert len(worker.requests) == 1
            os.kill(redis_server.pid, signal.SIGKILL)
            assert await ask(router) == (tokens, inference_pb2.CACHE_STATUS_MISS)
            assert len(worker.requests) == 2
