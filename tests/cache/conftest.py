"""A cache service in this process, over real gRPC, with a real Redis behind it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import grpc
import pytest
import redis

from baton.cli.redis_server import EmbeddedRedis
from baton.internal.v1 import response_cache_pb2, response_cache_pb2_grpc
from baton.rpc.breaker import Breaker
from baton.rpc.channel import server_options
from baton.rpc.interceptor import RimInterceptor
from baton.rpc.service import Runtime
from baton.v1 import sampling_pb2
from baton_cache.app import build
from baton_cache.key import Keys
from baton_cache.names import Names
from baton_cache.settings import CacheSettings
from baton_cache.store import Store
from tests.fixtures.models import full_sampling

PATIENT = 1.0
"""Seconds for Redis where a test is not about time: a busy machine must not turn its hits into misses."""


def cache_key(
    token_ids: tuple[int, ...] = (5, 6, 7), tenant: str = "", **sampling: object
) -> response_cache_pb2.CacheKey:
    """A complete key."""
    return response_cache_pb2.CacheKey(
        tenant=tenant,
        model_fingerprint="model",
        text_digest="text",
        token_ids=token_ids,
        sampling=full_sampling(**sampling),
    )


def an_answer(text: str = "fox", chunks: int = 3) -> response_cache_pb2.CachedAnswer:
    """A complete answer."""
    return response_cache_pb2.CachedAnswer(
        chunks=[response_cache_pb2.CachedChunk(token_ids=[i, i + 1], text=f"{text}{i}") for i in range(chunks)],
        finish_reason=sampling_pb2.FINISH_REASON_LENGTH,
        usage=sampling_pb2.Usage(prompt_tokens=3, completion_tokens=2 * chunks),
    )


class Cache:
    """A running cache service and a stub to it."""

    def __init__(self, stub: response_cache_pb2_grpc.ResponseCacheAsyncStub, address: str, runtime: Runtime) -> None:
        self.stub = stub
        self.runtime = runtime
        self.address = address

    async def lookup(self, key: response_cache_pb2.CacheKey) -> response_cache_pb2.LookupResponse:
        """Look up."""
        return await self.stub.Lookup(response_cache_pb2.LookupRequest(key=key))

    async def fill(
        self, key: response_cache_pb2.CacheKey, answer: response_cache_pb2.CachedAnswer, ttl: float | None = None
    ) -> bool:
        """Fill; whether it was stored."""
        request = response_cache_pb2.FillRequest(key=key, answer=answer)
        if ttl is not None:
            request.ttl.FromNanoseconds(round(ttl * 1e9))
        return (await self.stub.Fill(request)).stored

    async def miss(self, key: response_cache_pb2.CacheKey) -> response_cache_pb2.MissReason.ValueType:
        """Look up what must not be there; the reason why it is not."""
        found = await self.lookup(key)
        assert not found.hit
        assert not found.HasField("answer")
        return found.miss_reason


@contextlib.asynccontextmanager
async def running_cache(redis_url: str, **settings: object) -> AsyncIterator[Cache]:
    """Start a cache service; without a local tier: what a test does to Redis is seen at once."""
    server = grpc.aio.server(
        interceptors=[RimInterceptor()], options=server_options(CacheSettings().caller_silence_seconds)
    )
    given: dict[str, object] = {"redis_url": redis_url, "redis_timeout": PATIENT, "local_bytes": 0} | settings
    runtime = Runtime("cache", server)
    async with build(CacheSettings(**given), runtime):  # type: ignore[arg-type]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        address = f"127.0.0.1:{port}"
        try:
            async with grpc.aio.insecure_channel(address) as channel:
                yield Cache(response_cache_pb2_grpc.ResponseCacheStub(channel), address, runtime)
        finally:
            await server.stop(0)


@contextlib.asynccontextmanager
async def connected_store(redis_url: str) -> AsyncIterator[Store]:
    """Redis as the service's parts see it."""
    url, options = CacheSettings(redis_url=redis_url, redis_timeout=PATIENT).redis()  # type: ignore[arg-type]
    async with Store.connected(url, options, lambda: Breaker(3, 1.0)) as store:
        yield store


@pytest.fixture
def redis_server() -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis()
    server.start()
    yield server
    server.close()


@pytest.fixture
def stored(redis_server: EmbeddedRedis) -> Iterator[redis.Redis]:
    """What lies in Redis, looked at directly."""
    with redis.Redis.from_url(redis_server.url) as client:
        yield client


@pytest.fixture
async def cache(redis_server: EmbeddedRedis) -> AsyncIterator[Cache]:
    async with running_cache(redis_server.url) as one:
        yield one


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 only asking tells
            await asyncio.sleep(0.02)


def name_of(key: response_cache_pb2.CacheKey) -> str:
    """Name of a key's entry in Redis."""
    return Names("baton:").answer(Keys(b"").digests(key).name)
