"""Cancels and killed processes leave nothing behind; what is lost ends in a clean error or goes on elsewhere."""

from __future__ import annotations

import asyncio
import random
import re
import time
import urllib.request
from pathlib import Path

import grpc
import pytest

from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2
from tests.fixtures.mesh import Service, running_mesh

CANCELS = 1000
SLACK = 3  # tasks that answer the question itself


def ask(length: int, new_tokens: int, seed: int = 0) -> inference_pb2.StreamGenerateRequest:
    return inference_pb2.StreamGenerateRequest(
        token_ids=sampling_pb2.TokenIds(ids=[5 + (seed + j * j) % 370 for j in range(length)]),
        sampling=sampling_pb2.SamplingParams(max_tokens=new_tokens, temperature=0.7, seed=seed, ignore_eos=True),
        cache_control=inference_pb2.CacheControl(mode=inference_pb2.CACHE_MODE_BYPASS),
    )


async def collect(
    stub: inference_pb2_grpc.InferenceAsyncStub, asked: inference_pb2.StreamGenerateRequest
) -> tuple[list[int], inference_pb2.Summary]:
    tokens: list[int] = []
    summary = inference_pb2.Summary()
    async for message in stub.StreamGenerate(asked, timeout=60):
        if message.WhichOneof("event") == "chunk":
            assert message.chunk.index == len(tokens)
            tokens += message.chunk.token_ids
        elif message.WhichOneof("event") == "summary":
            summary = message.summary
    return tokens, summary


@pytest.mark.timeout(180)
async def test_a_thousand_cancels_leave_nothing(small_model: Path) -> None:
    rng = random.Random(4)
    async with (
        running_mesh(small_model, decode_flags=("--local-prefill-tokens", "40")) as mesh,
        mesh.stub() as stub,
    ):
        await collect(stub, ask(100, 4))
        before = await mesh.wait_quiet()
        outcomes = {"cancelled": 0, "finished": 0}

        async def one(i: int) -> None:
            call = stub.StreamGenerate(ask(rng.randrange(1, 300), rng.randrange(1, 60), i))
            delay = rng.random() ** 2 * 0.5

            async def read() -> None:
                async for _ in call:
                    pass

            try:
                await asyncio.wait_for(read(), delay)
                outcomes["finished"] += 1
            except (TimeoutError, asyncio.CancelledError):
                call.cancel()
                outcomes["cancelled"] += 1

        for _ in range(CANCELS // 20):
            await asyncio.gather(*(one(rng.randrange(10**6)) for _ in range(20)))
        assert outcomes["cancelled"] > CANCELS // 2, outcomes
        # What is left behind stays; what is on its way out may take a moment on a busy machine.
        end = time.monotonic() + 15
        while True:
            after = await mesh.wait_quiet(5)
            grown = {
                name: (before[name], state)
                for name, state in after.items()
                if state.tasks > before[name].tasks + SLACK or state.open_files > before[name].open_files + 3
            }
            if not grown:
                break
            assert time.monotonic() < end, grown
            await asyncio.sleep(0.2)
        tokens, _ = await collect(stub, ask(100, 8, 1))
        assert len(tokens) == 8


async def trials(service: Service) -> dict[str, float]:
    """The trials of suspects at a worker, by outcome."""
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{service.metrics}/metrics").read().decode())
    found = re.findall(r'baton_trials_total{outcome="(\w+)"} ([\d.]+)', text)
    return {outcome: float(count) for outcome, count in found}


async def until_busy(service: object, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not (await service.debug_state()).calls:  # type: ignore[attr-defined]
        assert time.monotonic() < deadline, "no call came"
        await asyncio.sleep(0.005)


async def test_killed_prefill_costs_only_time(long_model: Path) -> None:
    """kill -9 of the prefill worker during a handoff: the same answer, from another worker or computed here."""
    async with (
        running_mesh(
            long_model, prefill=2, decode_flags=("--local-prefill-tokens", "0"), worker_flags=("--step-tokens", "32")
        ) as mesh,
        mesh.stub() as stub,
    ):
        asked = ask(1500, 8, 3)
        expected, summary = await collect(stub, asked)
        assert summary.prefill_placement == inference_pb2.PLACEMENT_REMOTE
        for victim in mesh.tier("prefill"):
            running = asyncio.create_task(collect(stub, asked))
            others = [s for s in mesh.tier("prefill") if s is not victim and s.process.returncode is None]
            watching = [asyncio.create_task(until_busy(victim))]
            done, _ = await asyncio.wait([*watching, running], return_when=asyncio.FIRST_COMPLETED)
            if running not in done:
                victim.kill()
                await victim.process.wait()
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            tokens, summary = await running
            assert tokens == expected
            assert others is not None
            if victim.process.returncode is not None:
                del mesh.services[victim.name]
        tokens, summary = await collect(stub, asked)
        assert tokens == expected
        await mesh.wait_quiet()


async def test_killed_decode_frees_prefill(long_model: Path) -> None:
    """kill -9 of the only decode worker during a handoff: prefill lets go, the client gets an honest status."""
    async with (
        running_mesh(
            long_model, decode_flags=("--local-prefill-tokens", "0"), worker_flags=("--step-tokens", "32")
        ) as mesh,
        mesh.stub() as stub,
    ):
        await collect(stub, ask(64, 2))
        prefill, decode = mesh.services["prefill-0"], mesh.services["decode-0"]
        running = asyncio.create_task(collect(stub, ask(1800, 8, 5)))
        await until_busy(prefill)
        decode.kill()
        await decode.process.wait()
        del mesh.services["decode-0"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(running, 10)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        await mesh.wait_quiet(5)


async def test_killed_engine_ends_its_service(small_model: Path) -> None:
    """The engine process dies: its service says so and exits; the router's clients get UNAVAILABLE, not a hang."""
    import psutil

    async with running_mesh(small_model) as mesh, mesh.stub() as stub:
        await collect(stub, ask(10, 2))
        decode = mesh.services["decode-0"]
        (engine,) = psutil.Process(decode.pid).children()
        engine.kill()
        assert await asyncio.wait_for(decode.process.wait(), 10) == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(collect(stub, ask(10, 2)), 10)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("victim", ["service", "engine"])
async def test_killed_decode_migrates(small_model: Path, victim: str) -> None:
    """kill -9 of one of two decode workers: every stream goes on elsewhere, indices continuous, tokens the same.

    Of an engine that dies it is not known for whose sake: its requests are tried again one at a time.
    """
    import psutil

    async with running_mesh(small_model, decode=2) as mesh, mesh.stub() as stub:
        asked = [ask(30 + i, 120, i) for i in range(12)]
        expected = [(await collect(stub, one))[0] for one in asked]
        running = [asyncio.create_task(collect(stub, one)) for one in asked]
        await until_busy(mesh.services["decode-0"])
        await asyncio.sleep(0.05)
        service = mesh.services["decode-0"]
        if victim == "service":
            service.kill()
        else:
            psutil.Process(service.pid).children()[0].kill()
        answers = await asyncio.gather(*running)
        assert [tokens for tokens, _ in answers] == expected
        migrations = sum(summary.migrations for _, summary in answers)
        assert migrations > 0
        tried = await trials(mesh.services["decode-1"])
        # Those that the engine had not begun with are no suspects.
        assert (tried["proven"] > 0) is (victim == "engine")
        assert tried["proven"] <= migrations
        assert tried["guilty"] == 0
        del mesh.services["decode-0"]
        await mesh.wait_quiet()


async def test_hung_engine_ends_its_service(small_model: Path) -> None:
    """SIGSTOP of the engine process: nothing is closed and nothing fails, yet its service notices and gives up."""
    import signal

    import psutil

    flags = ("--engine-silence-seconds", "1")
    async with running_mesh(small_model, decode=2, worker_flags=flags) as mesh, mesh.stub() as stub:
        expected = (await collect(stub, ask(10, 100)))[0]
        victim = mesh.services["decode-0"]
        (engine,) = psutil.Process(victim.pid).children()
        running = [asyncio.create_task(collect(stub, ask(10, 100))) for _ in range(8)]
        engine.send_signal(signal.SIGSTOP)
        assert await asyncio.wait_for(victim.process.wait(), 10) == 1
        assert "said nothing" in victim.log.read_text()
        assert all(tokens == expected for tokens, _ in await asyncio.gather(*running))
        del mesh.services["decode-0"]
