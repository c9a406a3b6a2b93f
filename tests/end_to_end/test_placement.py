"""Where prompts are computed, through the whole mesh: whoever decides, the tokens are the same."""

from __future__ import annotations

import asyncio
import signal
import urllib.request
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from baton.internal.v1 import worker_pb2, worker_pb2_grpc
from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2
from tests.fixtures.mesh import Service, running_mesh

LENGTHS = (8, 60, 300)


async def ask(stub: inference_pb2_grpc.InferenceAsyncStub, length: int, seed: int) -> inference_pb2.GenerateResponse:
    return await stub.Generate(
        inference_pb2.GenerateRequest(
            token_ids=sampling_pb2.TokenIds(ids=[5 + (seed * 7 + i * i + seed * i) % 370 for i in range(length)]),
            sampling=sampling_pb2.SamplingParams(max_tokens=12, temperature=0.8, seed=11, ignore_eos=True),
            cache_control=inference_pb2.CacheControl(mode=inference_pb2.CACHE_MODE_BYPASS),
        ),
        timeout=60,
    )


async def decisions(service: Service) -> dict[tuple[str, str], float]:
    """How many, by placement and reason."""

    def read() -> str:
        with urllib.request.urlopen(f"http://{service.metrics}/metrics", timeout=10) as page:
            return str(page.read().decode())

    return {
        (sample.labels["placement"], sample.labels["reason"]): sample.value
        for family in text_string_to_metric_families(await asyncio.to_thread(read))
        for sample in family.samples
        if sample.name == "baton_placement_decisions_total" and sample.value
    }


async def told(service: Service) -> worker_pb2.Load:
    """What a worker says of its load."""
    async with grpc.aio.insecure_channel(service.address) as channel:
        watch = worker_pb2_grpc.WorkerStub(channel).Watch(worker_pb2.WatchRequest())
        state = await anext(aiter(watch))
        watch.cancel()
        return state.load


async def answers(model: Path, mode: str) -> tuple[list[list[int]], set[int], dict[tuple[str, str], float]]:
    """Tokens, placements, and decisions of a few prompts, one after the other and all at once."""
    async with running_mesh(model, decode_flags=("--prefill-placement", mode)) as mesh, mesh.stub() as stub:
        responses = [await ask(stub, length, 1) for length in LENGTHS]
        responses += await asyncio.gather(*(ask(stub, length, seed) for length in LENGTHS for seed in (2, 3)))
        await mesh.wait_quiet()
        for tier in ("prefill-0", "decode-0"):
            load = await told(mesh.services[tier])
            assert load.step_cost.step_tokens == 256
            assert load.step_cost.prefill_seconds + load.step_cost.seconds_per_token > 0
            assert load.waiting_prompt_tokens == 0
        placements = {response.summary.prefill_placement for response in responses}
        tokens = [list(response.token_ids) for response in responses]
        return tokens, placements, await decisions(mesh.services["decode-0"])


async def test_whoever_decides_the_tokens_are_the_same(small_model: Path) -> None:
    local, local_places, local_why = await answers(small_model, "local")
    remote, remote_places, remote_why = await answers(small_model, "remote")
    auto, _, auto_why = await answers(small_model, "auto")
    assert local == remote == auto
    assert local_places == {inference_pb2.PLACEMENT_LOCAL}
    assert local_why == {("local", "setting"): 9}
    assert remote_places == {inference_pb2.PLACEMENT_REMOTE}
    assert remote_why == {("remote", "setting"): 9}
    assert {reason for _, reason in auto_why} == {"cost"}
    assert sum(auto_why.values()) == 9


@pytest.mark.parametrize("mode", ["auto", "remote"])
async def test_without_a_prefill_service_prompts_are_computed_here(small_model: Path, mode: str) -> None:
    async with running_mesh(small_model, decode_flags=("--prefill-placement", mode)) as mesh, mesh.stub() as stub:
        mesh.services["prefill-0"].kill(signal.SIGKILL)
        responses = [await ask(stub, 300, seed) for seed in range(3)]
        assert {r.summary.prefill_placement for r in responses} == {inference_pb2.PLACEMENT_LOCAL}
        assert ("local", "no_candidate") in await decisions(mesh.services["decode-0"])
