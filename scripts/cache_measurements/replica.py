"""How many hits a second one cache replica answers, beside bare Redis and beside calls that do nothing."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import redis.asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.progress import Progress

from baton.cli.mesh import Process
from baton.cli.redis_server import EmbeddedRedis
from baton.internal.v1 import response_cache_pb2, response_cache_pb2_grpc
from baton.rpc.channel import mesh_channel
from baton.v1 import sampling_pb2
from cache_measurements.asking import at_once, prompts
from cache_measurements.findings import Findings, at, spread
from cache_measurements.machine import watched
from cache_measurements.mesh import cpu_seconds, more, own_redis

IN_FLIGHT: Final = (1, 8, 32)
BARE: Final = "bare Redis GET"
_STORED: Final = 64
_PROMPT_TOKENS: Final = (64, 256)

Call = Callable[[int], Awaitable[bool]]
"""Makes the so-manieth call; whether it found something."""


@dataclass(slots=True)
class Series:
    """One way of reading the values, with so many in flight."""

    per_second: list[float] = field(default_factory=list)
    cache_us: list[float] = field(default_factory=list)
    """Processor time of the cache replica for one, microseconds; one value per turn."""
    redis_us: list[float] = field(default_factory=list)
    own_us: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    misses: int = 0
    """Lookups that were none: Redis was waited for too long."""


@dataclass(frozen=True, slots=True)
class Pids:
    """Process ids whose processor time is read."""

    cache: int
    redis: int


async def measure(progress: Progress, rounds: int, seconds: float, tokens: int) -> Findings:
    """Lookups, empty calls and bare GETs of the same values, in turn, one client process for all.

    Args:
        progress: told how far it is.
        rounds: turns.
        seconds: of each turn of each way and number in flight.
        tokens: of each answer, one chunk each.
    """
    async with (
        own_redis() as server,
        _replica(server, "--local-bytes", "0") as (cache, stub, health),
        _replica(server) as (holding, stub_of_holding, _),
        _client(server) as client,
    ):
        keys = [_key(prompt) for prompt in prompts(_STORED, _PROMPT_TOKENS, random.Random(2))]
        for key in keys:
            await stub.Fill(response_cache_pb2.FillRequest(key=key, answer=_answer(tokens)))
        names = [name async for name in client.scan_iter("baton:answer:*")]
        assert len(names) == len(keys)
        value_bytes = await client.strlen(names[0])

        def lookup(asked: response_cache_pb2_grpc.ResponseCacheAsyncStub) -> Call:
            async def call(turn: int) -> bool:
                return (await asked.Lookup(response_cache_pb2.LookupRequest(key=keys[turn % len(keys)]))).hit

            return call

        async def empty(turn: int) -> bool:
            await health.Check(health_pb2.HealthCheckRequest())
            return True

        async def get(turn: int) -> bool:
            return await client.get(names[turn % len(names)]) is not None

        ways = {
            "Lookup, a hit, from Redis": (lookup(stub), Pids(cache.pid, server.pid)),
            "Lookup, a hit, from memory": (lookup(stub_of_holding), Pids(holding.pid, server.pid)),
            "empty call of the same process": (empty, Pids(cache.pid, server.pid)),
            BARE: (get, Pids(cache.pid, server.pid)),
        }
        series = {(way, in_flight): Series() for in_flight in IN_FLIGHT for way in ways}

        async with watched() as watch:
            for _ in progress.track(range(rounds), description="asking"):
                for (way, in_flight), one in series.items():
                    await _turn(one, *ways[way], in_flight, seconds)
    found = Findings(
        f"One cache replica: {rounds} rounds of {seconds:g} s each; values of {value_bytes:,} bytes"
        f" ({tokens} chunks). Median of the rounds, and their range."
    )
    grid = found.grid(
        "Closed loop, one client process",
        *(
            "way",
            "in flight",
            "misses",
            "per second",
            "p50 ms",
            "p99 ms",
            "cache us",
            "Redis us",
            "client us",
            "/s and core",
        ),
    )
    for (way, in_flight), one in series.items():
        cache_us = at(one.cache_us, 50)
        grid.rows.append(
            (
                way,
                str(in_flight),
                str(one.misses),
                spread(one.per_second, 0),
                f"{at(one.latency_ms, 50):.2f}",
                f"{at(one.latency_ms, 99):.2f}",
                f"{cache_us:.0f}",
                f"{at(one.redis_us, 50):.0f}",
                f"{at(one.own_us, 50):.0f}",
                f"{1e6 / cache_us:,.0f}" if way != BARE else "-",
            )
        )
    found.notes += [
        "Client, cache and Redis share the machine: the per-second figures are of all three together.",
        "us: processor time for one call in that process. /s and core: what the replica's processor time allows.",
        watch.note(),
    ]
    return found


async def _turn(one: Series, call: Call, pids: Pids, in_flight: int, seconds: float) -> None:
    clock = time.monotonic
    cache, in_redis, own = cpu_seconds(pids.cache), cpu_seconds(pids.redis), time.process_time()
    began = clock()
    latencies: list[float] = []

    async def worker(turn: int) -> None:
        while (sent := clock()) < began + seconds:
            if await call(turn):
                latencies.append((clock() - sent) * 1e3)
            else:
                one.misses += 1
            turn += in_flight

    await at_once(worker(first) for first in range(in_flight))
    count = max(1, len(latencies))
    one.per_second.append(count / (clock() - began))
    one.cache_us.append((cpu_seconds(pids.cache) - cache) / count * 1e6)
    one.redis_us.append((cpu_seconds(pids.redis) - in_redis) / count * 1e6)
    one.own_us.append((time.process_time() - own) / count * 1e6)
    one.latency_ms += latencies


@asynccontextmanager
async def _replica(
    server: EmbeddedRedis, *flags: str
) -> AsyncIterator[tuple[Process, response_cache_pb2_grpc.ResponseCacheAsyncStub, health_pb2_grpc.HealthStub]]:
    """A cache replica in a process of its own."""
    plain = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
    async with (
        more("cache", 0, [*plain, *flags], {"BATON_REDIS_URL": server.url}) as cache,
        mesh_channel(cache.grpc) as channel,
    ):
        yield cache, response_cache_pb2_grpc.ResponseCacheStub(channel), health_pb2_grpc.HealthStub(channel)


def _client(server: EmbeddedRedis) -> redis.asyncio.Redis:
    return redis.asyncio.Redis.from_url(server.url, max_connections=max(IN_FLIGHT), protocol=2)


def _key(prompt: tuple[int, ...]) -> response_cache_pb2.CacheKey:
    return response_cache_pb2.CacheKey(
        model_fingerprint="measured",
        text_digest="measured",
        token_ids=prompt,
        sampling=sampling_pb2.SamplingParams(max_tokens=32, temperature=0.0, top_p=1.0, ignore_eos=True),
    )


def _answer(tokens: int) -> response_cache_pb2.CachedAnswer:
    """A chunk for each token, as an answer of one is stored."""
    return response_cache_pb2.CachedAnswer(
        chunks=[
            response_cache_pb2.CachedChunk(token_ids=[100 + index], text=" word", since_start_us=5000 * index)
            for index in range(tokens)
        ],
        finish_reason=sampling_pb2.FINISH_REASON_LENGTH,
        usage=sampling_pb2.Usage(prompt_tokens=128, completion_tokens=tokens),
    )
