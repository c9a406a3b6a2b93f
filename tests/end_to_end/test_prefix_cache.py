"""Through the whole mesh: what was computed before is neither computed nor moved again, and no token is another one."""

from __future__ import annotations

import asyncio
import signal
import urllib.request
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2
from tests.fixtures.mesh import Mesh, Service, running_mesh

NEW_TOKENS = 20
BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4  # layers, K and V, KV heads, dimension, float32


def a_prompt(length: int, seed: int = 0) -> list[int]:
    return [5 + (seed * 7 + i * i + seed * i) % 370 for i in range(length)]


async def ask(
    stub: inference_pb2_grpc.InferenceAsyncStub, prompt: list[int], *, temperature: float = 0.8, **control: object
) -> inference_pb2.GenerateResponse:
    return await stub.Generate(
        inference_pb2.GenerateRequest(
            token_ids=sampling_pb2.TokenIds(ids=prompt),
            sampling=sampling_pb2.SamplingParams(
                max_tokens=NEW_TOKENS, temperature=temperature, seed=11, ignore_eos=True
            ),
            cache_control=inference_pb2.CacheControl(**control),  # type: ignore[arg-type]
        ),
        timeout=60,
    )


def cached(response: inference_pb2.GenerateResponse) -> int:
    return response.summary.usage.cached_prompt_tokens


async def metric(service: Service, name: str, **labels: str) -> float:
    def read() -> str:
        with urllib.request.urlopen(f"http://{service.metrics}/metrics", timeout=10) as page:
            return str(page.read().decode())

    for family in text_string_to_metric_families(await asyncio.to_thread(read)):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return float(sample.value)
    raise AssertionError(f"no {name}")


async def moved(mesh: Mesh) -> float:
    """KV bytes that came to the decode worker so far."""
    return await metric(mesh.services["decode-0"], "baton_handoff_bytes_total", transport="shm")


async def conversation(mesh: Mesh, turns: int) -> tuple[list[list[int]], list[int], list[float]]:
    """Answers, cached prompt tokens and bytes moved, turn by turn; each turn adds a hundred tokens to what was said."""
    history = a_prompt(150)
    answers, hits, bytes_moved = [], [], []
    async with mesh.stub() as stub:
        for turn in range(turns):
            before = await moved(mesh)
            response = await ask(stub, history)
            answers.append(list(response.token_ids))
            hits.append(cached(response))
            bytes_moved.append(await moved(mesh) - before)
            history = [*history, *response.token_ids, *a_prompt(100, 1 + turn)]
    await mesh.wait_quiet()
    return answers, hits, bytes_moved


async def test_a_conversation_moves_only_what_is_new(small_model: Path) -> None:
    async with running_mesh(small_model, worker_flags=("--no-prefix-cache",)) as mesh:
        expected, hits, bytes_moved = await conversation(mesh, 3)
        assert hits == [0, 0, 0]
        assert bytes_moved == [length * BYTES_PER_TOKEN for length in (150, 270, 390)]
    async with running_mesh(small_model) as mesh:
        answers, hits, bytes_moved = await conversation(mesh, 3)
        assert answers == expected
        # The last token of an answer was never computed, and whole blocks count.
        assert hits == [0, 160, 288]
        assert bytes_moved == [length * BYTES_PER_TOKEN for length in (150, 270 - 160, 390 - 288)]
        decode, prefill = mesh.services["decode-0"], mesh.services["prefill-0"]
        for service, found in ((decode, 160 + 288), (prefill, 144 + 256)):
            assert await metric(service, "baton_prefix_cache_hit_tokens_total") == found
            assert await metric(service, "baton_prefix_cache_query_tokens_total") == 150 + 270 + 390
            state = await service.debug_state()
            assert (state.used_tokens, state.free_slots) == (0, state.total_slots)
            assert state.cached_slots == 1
            assert state.cached_tokens >= 384
            assert await metric(service, "baton_prefix_cache_tokens") == state.cached_tokens
            assert await metric(service, "baton_prefix_cache_slots") == 1


async def test_the_same_prompt_again_is_computed_by_nobody(small_model: Path) -> None:
    async with running_mesh(small_model) as mesh, mesh.stub() as stub:
        first = await ask(stub, a_prompt(300))
        before = await moved(mesh)
        second = await ask(stub, a_prompt(300))
        assert list(second.token_ids) == list(first.token_ids)
        assert (cached(first), cached(second)) == (0, 288)
        assert first.summary.prefill_placement == inference_pb2.PLACEMENT_REMOTE
        assert second.summary.prefill_placement == inference_pb2.PLACEMENT_LOCAL
        assert await moved(mesh) == before
        await mesh.wait_quiet()


async def test_what_prefill_has_is_moved_but_not_computed(small_model: Path) -> None:
    async with running_mesh(small_model, decode_flags=("--no-prefix-cache",)) as mesh, mesh.stub() as stub:
        first = await ask(stub, a_prompt(300))
        before = await moved(mesh)
        second = await ask(stub, a_prompt(300))
        assert list(second.token_ids) == list(first.token_ids)
        assert cached(second) == 288
        assert second.summary.prefill_placement == inference_pb2.PLACEMENT_REMOTE
        assert await moved(mesh) - before == 300 * BYTES_PER_TOKEN
        await mesh.wait_quiet()


async def test_salts_share_nothing_and_a_request_may_opt_out(small_model: Path) -> None:
    async with running_mesh(small_model) as mesh, mesh.stub() as stub:
        expected = list((await ask(stub, a_prompt(300), cache_salt="one")).token_ids)
        for control in ({"cache_salt": "two"}, {}, {"cache_salt": "one", "prefix_cache": False}):
            response = await ask(stub, a_prompt(300), **control)
            assert (cached(response), list(response.token_ids)) == (0, expected)
        for control in ({"cache_salt": "one"}, {"cache_salt": "two"}, {"prefix_cache": True}):
            response = await ask(stub, a_prompt(300), **control)
            assert (cached(response), list(response.token_ids)) == (288, expected)


async def test_a_salt_may_have_256_bytes(small_model: Path) -> None:
    async with running_mesh(small_model, prefill=0) as mesh, mesh.stub() as stub:
        assert (await ask(stub, a_prompt(10), cache_salt="x" * 256)).token_ids
        with pytest.raises(grpc.aio.AioRpcError, match=r"cache_control\.cache_salt") as refused:
            await ask(stub, a_prompt(10), cache_salt="ä" * 129)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_prefix_outlives_cancels_and_the_loss_of_the_prefill_worker(long_model: Path) -> None:
    """Decode holds the beginning; the worker that was to compute the rest is killed: it is computed here."""
    prompt = a_prompt(1200)
    async with running_mesh(long_model, worker_flags=("--no-prefix-cache",)) as mesh, mesh.stub() as stub:
        expected = list((await ask(stub, prompt)).token_ids)
    async with running_mesh(long_model) as mesh, mesh.stub() as stub:
        await ask(stub, prompt[:600])
        for _ in range(5):
            cancelled = asyncio.create_task(ask(stub, prompt))
            await asyncio.sleep(0.05)
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
        await mesh.wait_quiet()
        asking = asyncio.create_task(ask(stub, prompt))
        await asyncio.sleep(0.05)
        mesh.services["prefill-0"].kill(signal.SIGKILL)
        response = await asking
        assert list(response.token_ids) == expected
        assert cached(response) >= 592
        state = await mesh.services["decode-0"].debug_state()
        assert state.cached_tokens >= 1200
