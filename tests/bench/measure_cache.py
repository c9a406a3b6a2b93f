"""What a hit costs, and what a Redis that fails costs: the figures of docs/cache.md.

    python -m tests.bench.measure_cache

A cache service runs as a process of its own with its default settings, a Redis beside it; this process is the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import grpc
import redis.asyncio

from baton.cli.redis_server import EmbeddedRedis
from baton.internal.v1 import response_cache_pb2, response_cache_pb2_grpc
from baton.verify.proxy import Proxy
from tests.cache.conftest import an_answer, cache_key

KEY = cache_key()
TRIALS = 20
HITS = 3000
IN_FLIGHT = 32

if TYPE_CHECKING:
    Stub = response_cache_pb2_grpc.ResponseCacheAsyncStub


@contextlib.asynccontextmanager
async def cache(redis_url: str, *flags: str) -> AsyncIterator[Stub]:
    """A cache service with default settings."""
    with tempfile.TemporaryDirectory() as directory:
        ready = Path(directory) / "ready"
        command = [sys.executable, "-m", "baton_cache", "--ready-file", str(ready), "--log-level", "ERROR", *flags]
        process = subprocess.Popen(  # noqa: ASYNC220 nothing else runs yet
            command, env=os.environ | {"BATON_REDIS_URL": redis_url}
        )
        try:
            while not ready.exists():  # noqa: ASYNC110 a file is waited for
                await asyncio.sleep(0.02)
            async with grpc.aio.insecure_channel(json.loads(ready.read_text())["grpc"]) as channel:
                yield response_cache_pb2_grpc.ResponseCacheStub(channel)
        finally:
            process.terminate()
            process.wait()


async def lookup(stub: Stub) -> response_cache_pb2.LookupResponse:
    """Ask once."""
    return await stub.Lookup(response_cache_pb2.LookupRequest(key=KEY))


async def timed(call: Callable[[], Awaitable[object]]) -> float:
    """Milliseconds of a call."""
    began = time.perf_counter()
    await call()
    return (time.perf_counter() - began) * 1000


def row(what: str, *figures: str) -> None:
    """Print a row."""
    print(f"{what:<28}" + "".join(f"{figure:>12}" for figure in figures), flush=True)


def spread(times: list[float]) -> tuple[str, str, str]:
    """p50, p99 and the most."""
    times = sorted(times)
    return tuple(f"{times[min(len(times) - 1, int(len(times) * q))]:.2f}" for q in (0.5, 0.99, 1.0))  # type: ignore[return-value]


async def rate(call: Callable[[], Awaitable[object]]) -> float:
    """Calls a second, some at once."""

    async def some() -> None:
        for _ in range(HITS // IN_FLIGHT):
            await call()

    began = time.perf_counter()
    await asyncio.gather(*(some() for _ in range(IN_FLIGHT)))
    return HITS / (time.perf_counter() - began)


async def hits(url: str) -> None:
    """A hit from memory and one from Redis, against a bare GET of the same bytes."""
    row("hit, ms", "p50", "p99", "most", "a second")
    client = redis.asyncio.Redis.from_url(url)
    for name, flags in (("from memory", ()), ("from Redis", ("--local-bytes", "0"))):
        async with cache(url, *flags) as stub:
            await stub.Fill(response_cache_pb2.FillRequest(key=KEY, answer=an_answer("word ", chunks=200)))
            await asyncio.sleep(0.5)
            for _ in range(200):
                assert (await lookup(stub)).hit
            times = [await timed(lambda stub=stub: lookup(stub)) for _ in range(HITS)]  # type: ignore[misc]
            row(name, *spread(times), f"{await rate(lambda stub=stub: lookup(stub)):,.0f}")  # type: ignore[misc]
    (name,) = [key async for key in client.scan_iter("baton:answer:*")][-1:]
    times = [await timed(lambda: client.get(name)) for _ in range(HITS)]
    row("a bare GET by redis-py", *spread(times), f"{await rate(lambda: client.get(name)):,.0f}")
    await client.aclose()


async def fault(what: str, server: EmbeddedRedis, url: str, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """The first calls after a fault, and those once the breaker is open: at the client, and inside of the cache."""
    first: list[float] = []
    open_: list[float] = []
    inside: list[float] = []
    failed = 0
    async with cache(url, "--local-bytes", "0", "--breaker-seconds", "0.5") as stub:
        await stub.Fill(response_cache_pb2.FillRequest(key=KEY, answer=an_answer()))
        for _ in range(TRIALS):
            while not (await lookup(stub)).hit:
                await stub.Fill(response_cache_pb2.FillRequest(key=KEY, answer=an_answer()))
                await asyncio.sleep(0.05)
            begin()
            first += [await timed(lambda: lookup(stub)) for _ in range(3)]
            open_ += [await timed(lambda: lookup(stub)) for _ in range(20)]
            misses = [await lookup(stub) for _ in range(20)]
            inside += [miss.timing.total_ns / 1e6 for miss in misses]
            failed += sum(miss.hit for miss in misses)
            end()
    row(what, *spread(first), *spread(open_)[:2], *spread(inside)[:2], str(failed))


async def faults() -> None:
    """Redis down, frozen, slow."""
    row("a miss, ms", "first p50", "p99", "most", "then p50", "p99", "inside p50", "p99", "not a miss")
    server = EmbeddedRedis()
    server.start()
    url = server.url
    await fault("killed", server, url, lambda: os.kill(server.pid, signal.SIGKILL), server.start)
    await fault(
        "frozen",
        server,
        url,
        lambda: os.kill(server.pid, signal.SIGSTOP),
        lambda: os.kill(server.pid, signal.SIGCONT),
    )
    path = unquote(url.removeprefix("unix://"))
    async with Proxy.to(lambda: asyncio.open_unix_connection(path)) as proxy:

        def slow(seconds: float) -> None:
            proxy.backward.delay_seconds = seconds

        await fault("slow, 200 ms", server, f"redis://{proxy.address}", lambda: slow(0.2), lambda: slow(0))
    server.close()


async def main() -> None:
    """Measure all."""
    server = EmbeddedRedis()
    server.start()
    await hits(server.url)
    server.close()
    print()
    await faults()


if __name__ == "__main__":
    asyncio.run(main())
