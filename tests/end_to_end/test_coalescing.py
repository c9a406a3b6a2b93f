"""Three routers, two cache replicas, real workers: equal requests are generated once, whoever dies."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from baton.cli.redis_server import EmbeddedRedis
from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2
from tests.fixtures.mesh import Mesh, Service, running_mesh

ROUTERS = ("router", "router-1", "router-2")
CACHES = ("cache", "cache-1")
COALESCED = inference_pb2.CACHE_STATUS_COALESCED
HIT = inference_pb2.CACHE_STATUS_HIT


@pytest.fixture
def redis_server() -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis()
    server.start()
    yield server
    server.close()


@contextlib.asynccontextmanager
async def wide_mesh(model: Path, redis_url: str) -> AsyncIterator[Mesh]:
    """Three routers that know both cache replicas."""
    # Patient: this is about who generates, not about how long a busy machine may take to say so.
    cache_flags = ("--redis-url", redis_url, "--redis-timeout", "1")
    async with running_mesh(model, decode_flags=("--local-prefill-tokens", "8")) as mesh:
        for name in CACHES:
            await mesh.start(name, *cache_flags)
        await mesh.router.stop()
        flags = ["--model", str(model), "--cache-timeout-seconds", "2"]
        flags += ["--decode-targets", ",".join(s.address for s in mesh.tier("decode"))]
        flags += ["--prefill-targets", ",".join(s.address for s in mesh.tier("prefill"))]
        flags += ["--cache-target", ",".join(mesh.services[name].address for name in CACHES)]
        await asyncio.gather(*(mesh.start(name, *flags) for name in ROUTERS))
        yield mesh


@contextlib.asynccontextmanager
async def stubs(mesh: Mesh) -> AsyncIterator[list[inference_pb2_grpc.InferenceAsyncStub]]:
    async with contextlib.AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(mesh.services[name].address)) for name in ROUTERS
        ]
        yield [inference_pb2_grpc.InferenceStub(channel) for channel in channels]


def asking(seed: int, tokens: int) -> inference_pb2.StreamGenerateRequest:
    return inference_pb2.StreamGenerateRequest(
        token_ids=sampling_pb2.TokenIds(ids=[5 + (seed + j * j) % 370 for j in range(60)]),
        sampling=sampling_pb2.SamplingParams(max_tokens=tokens, temperature=0.7, seed=seed, ignore_eos=True),
    )


async def ask(
    stub: inference_pb2_grpc.InferenceAsyncStub, request: inference_pb2.StreamGenerateRequest
) -> tuple[list[int], str, inference_pb2.Summary]:
    tokens: list[int] = []
    text = ""
    summary = inference_pb2.Summary()
    async for message in stub.StreamGenerate(request, timeout=60):
        if message.WhichOneof("event") == "chunk":
            assert message.chunk.index == len(tokens)
            tokens += message.chunk.token_ids
            text += message.chunk.text
        elif message.WhichOneof("event") == "summary":
            summary = message.summary
    return tokens, text, summary


def counted(service: Service, name: str, **labels: str) -> float:
    """A counter of a service, over all series with these labels."""
    with urllib.request.urlopen(f"http://{service.metrics}/metrics", timeout=10) as response:
        exposition = response.read().decode()
    return sum(
        sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def prefills(mesh: Mesh) -> float:
    return await asyncio.to_thread(counted, mesh.services["decode-0"], "baton_handoffs_total")


async def flying(router: Service) -> None:
    """Wait until a router has a generation under way."""
    while not await asyncio.to_thread(counted, router, "baton_response_cache_flights"):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


@pytest.mark.timeout(180)
async def test_a_hundred_equal_requests_are_one_prefill(small_model: Path, redis_server: EmbeddedRedis) -> None:
    async with wide_mesh(small_model, redis_server.url) as mesh, stubs(mesh) as three:
        await asyncio.gather(*(ask(stub, asking(0, 2)) for stub in three))  # everything is connected
        for seed in (1, 2):
            before = await prefills(mesh)
            answers = await asyncio.gather(*(ask(three[i % 3], asking(seed, 150)) for i in range(100)))
            assert await prefills(mesh) - before == 1
            assert all(answer[:2] == answers[0][:2] for answer in answers)
            assert len(answers[0][0]) == 150
            statuses = Counter(summary.cache_status for _, _, summary in answers)
            assert statuses[inference_pb2.CACHE_STATUS_MISS] == 1
            assert statuses[COALESCED] + statuses[HIT] == 99
            assert statuses[COALESCED] > 0
            fresh = asking(seed, 150)
            fresh.cache_control.mode = inference_pb2.CACHE_MODE_BYPASS
            assert (await ask(three[0], fresh))[:2] == answers[0][:2]
        await mesh.wait_quiet()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("victim", ["router", "cache", "frozen cache"])
async def test_whoever_dies_the_others_answers_are_whole(
    small_model: Path, redis_server: EmbeddedRedis, victim: str
) -> None:
    async with wide_mesh(small_model, redis_server.url) as mesh, stubs(mesh) as three:
        alone = asking(9, 400)
        alone.cache_control.mode = inference_pb2.CACHE_MODE_BYPASS
        expected = (await ask(three[0], alone))[:2]
        leading = asyncio.create_task(ask(three[0], asking(9, 400)))
        async with asyncio.timeout(10):
            await flying(mesh.router)
        following = [asyncio.create_task(ask(stub, asking(9, 400))) for stub in three[1:] * 5]
        await asyncio.sleep(0.15)
        if victim == "router":
            mesh.router.kill(signal.SIGKILL)
        else:
            for name in CACHES:  # whichever it is
                mesh.services[name].kill(signal.SIGKILL if victim == "cache" else signal.SIGSTOP)
        try:
            for tokens, text, _ in await asyncio.gather(*following):
                assert (tokens, text) == expected
            if victim == "router":
                with pytest.raises(grpc.aio.AioRpcError):
                    await leading
            else:
                assert (await leading)[:2] == expected
        finally:
            for name in CACHES:
                with contextlib.suppress(ProcessLookupError):
                    mesh.services[name].kill(signal.SIGCONT)
        await mesh.wait_quiet()
