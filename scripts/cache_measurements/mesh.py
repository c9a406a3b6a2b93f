"""The meshes that are measured: real processes on this machine, with a Redis that can be broken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final
from urllib.request import urlopen

import grpc
import psutil
import redis.asyncio
from prometheus_client.parser import text_string_to_metric_families

from baton.cli.mesh import Process
from baton.cli.plan import Plan
from baton.cli.redis_server import EmbeddedRedis
from baton.cli.service_process import ServiceProcess
from baton.cli.stack import Relay, Stack
from baton.models import bundled_model
from baton.v1 import inference_pb2_grpc
from cache_measurements.asking import HIT, Answer, Prompt, Stub, ask

_START_SECONDS: Final = 180.0
PATIENT: Final = {"cache": ("--redis-timeout", "1"), "router": ("--cache-timeout-seconds", "2")}
"""Flags of who waits for cache and Redis as long as a busy machine may take, and not 23 and 20 ms."""
_SECRET: Final = {"BATON_KEY_SECRET": "of all cache replicas that are measured"}
_HIT_SECONDS: Final = 60.0


@dataclass(slots=True)
class Bench:
    """A running mesh.

    Attributes:
        stub: of its router.
        server: its Redis.
        redis: a client of that.
        processes: by name: "router", "cache", "prefill-0", "decode-0".
        exits: what is entered here ends with the mesh.
    """

    stub: Stub
    server: EmbeddedRedis
    redis: redis.asyncio.Redis
    processes: dict[str, Process]
    exits: AsyncExitStack

    async def restart_cache(self) -> None:
        """Start a cache service where the one that was killed listened."""
        killed = self.processes["cache"]
        flags = ["--listen", killed.grpc, "--metrics-listen", killed.metrics]
        again = more("cache", killed.pid, flags, cache_environment(self.server))
        self.processes["cache"] = await self.exits.enter_async_context(again)

    async def store(self, prompt: Prompt, max_tokens: int) -> Answer:
        """Ask until the answer is stored; the first answer."""
        first = await ask(self.stub, prompt, max_tokens)
        assert first.ok, first.code
        await self.until_hit(prompt, max_tokens)
        return first

    async def until_hit(self, prompt: Prompt, max_tokens: int) -> None:
        """Ask until the answer is stored and found: everything is there, and no breaker is open."""
        async with asyncio.timeout(_HIT_SECONDS):
            while (await ask(self.stub, prompt, max_tokens)).status != HIT:  # noqa: ASYNC110 only asking tells
                await asyncio.sleep(0.02)


def cache_environment(server: EmbeddedRedis) -> dict[str, str]:
    """What a cache service needs to find what others of the mesh stored."""
    return {"BATON_REDIS_URL": server.url, **_SECRET}


@asynccontextmanager
async def running(
    *, relay: Relay | None = None, extra: Mapping[str, tuple[str, ...]] | None = None
) -> AsyncIterator[Bench]:
    """One router, one cache, one prefill and one decode worker with the bundled model, and a Redis.

    Args:
        relay: as `Stack` takes it.
        extra: flags by service.
    """
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(own_redis())
        plan = Plan(
            model=bundled_model(),
            prefill=1,
            decode=1,
            listen="127.0.0.1:0",
            redis_url=server.url,
            drain_seconds=2.0,
            extra=extra or {},
            environment={"cache": _SECRET},
        )
        services = Stack(plan, None, _START_SECONDS, lambda process, line: None, relay)
        stack.push_async_callback(services.stop)
        mesh = await services.start()
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(mesh.router))
        client = await stack.enter_async_context(redis.asyncio.Redis.from_url(server.url))
        stub = inference_pb2_grpc.InferenceStub(channel)
        yield Bench(stub, server, client, {process.name: process for process in mesh.services}, stack)


@asynccontextmanager
async def own_redis() -> AsyncIterator[EmbeddedRedis]:
    """A Redis for the length of the block."""
    server = EmbeddedRedis()
    await asyncio.to_thread(server.start)
    try:
        yield server
    finally:
        await asyncio.to_thread(server.close)


@asynccontextmanager
async def more(service: str, index: int, arguments: list[str], environment: dict[str, str]) -> AsyncIterator[Process]:
    """One service more."""
    with TemporaryDirectory(prefix="baton-measure-") as directory:
        process = ServiceProcess(
            f"{service}-{index}",
            service,
            arguments,
            environment=environment,
            directory=Path(directory),
            log_directory=None,
            on_log=lambda process, line: None,
        )
        await process.start()
        try:
            yield await process.ready()
        finally:
            await process.stop(5.0)


async def metrics(process: Process) -> dict[str, float]:
    """A service's figures: "name", or "name{label=value,...}" with labels by name, to value."""

    def read() -> str:
        with urlopen(f"http://{process.metrics}/metrics", timeout=10) as response:
            return str(response.read().decode())

    figures = {}
    for family in text_string_to_metric_families(await asyncio.to_thread(read)):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            figures[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return figures


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and those it started."""
    process = psutil.Process(pid)
    return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True)))
