"""Requests that find a generation under way late, or a cache that is late itself."""

from __future__ import annotations

import asyncio
from pathlib import Path

from baton.v1 import inference_pb2
from tests.cache.conftest import Cache
from tests.router.conftest import eventually, running_router
from tests.router.scripted import ScriptedCache, ScriptedWorker
from tests.router.test_coalescing import EXPECTED, HIT, ask, cache, redis_server  # noqa: F401 fixtures

LIMIT = 5
"""Tokens that may wait for a client; less than there are when the late one comes."""


async def test_far_behind_is_not_slow(router_model: Path, worker: ScriptedWorker, cache: Cache) -> None:  # noqa: F811
    """A router that follows late gets at once what the leader already has: no fault of its client."""
    worker.pause = 0.05
    settings = {"decode_targets": worker.address, "cache_target": cache.address, "cache_timeout_seconds": 2.0}
    async with (
        running_router(router_model, **settings) as one,
        running_router(router_model, **settings, max_unsent_tokens=LIMIT) as two,
    ):
        leader = asyncio.create_task(ask(one))
        await eventually(lambda: worker.live == 1)
        await asyncio.sleep(0.05 * 3 * LIMIT)
        tokens, _, summary = await ask(two)
        assert tokens == EXPECTED
        assert summary.cache_status == inference_pb2.CACHE_STATUS_COALESCED
        await leader


async def test_what_a_late_cache_missed_is_stored(router_model: Path, worker: ScriptedWorker) -> None:
    async with ScriptedCache.running() as slow:
        slow.delay = 5
        async with running_router(router_model, decode_targets=worker.address, cache_target=slow.address) as router:
            assert (await ask(router))[2].cache_status == inference_pb2.CACHE_STATUS_MISS
            slow.delay = 0
            await eventually(lambda: len(slow.stored) == 1)
            assert (await ask(router))[2].cache_status == HIT
