"""The ledger of a request that never finishes says what it was doing, wherever that was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from baton.internal.v1 import observe_pb2, observe_pb2_grpc
from baton.v1 import inference_pb2, inference_pb2_grpc, ledger_pb2, sampling_pb2
from baton.verify.lab import Lab, running_lab
from tests.fixtures.mesh import running_mesh
from tests.fixtures.models import random_llama

UNKNOWN = 0.2  # seconds: what was told last is 100 ms old, on a busy machine more
Spent = dict[tuple[int, int], float]


def ask(length: int, new_tokens: int) -> inference_pb2.StreamGenerateRequest:
    return inference_pb2.StreamGenerateRequest(
        token_ids=sampling_pb2.TokenIds(ids=[5 + i % 200 for i in range(length)]),
        sampling=sampling_pb2.SamplingParams(max_tokens=new_tokens, ignore_eos=True),
        cache_control=inference_pb2.CacheControl(mode=inference_pb2.CACHE_MODE_BYPASS),
    )


async def drain(call: AsyncIterator[inference_pb2.StreamGenerateResponse]) -> None:
    async for _ in call:
        pass


async def read_on(call: grpc.aio.UnaryStreamCall) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def latest(admin: str, outcome: str) -> Spent:
    """Seconds by entry of the latest request, which must have ended so, as the router tells operators."""
    async with asyncio.timeout(10), grpc.aio.insecure_channel(admin) as channel:
        observe = observe_pb2_grpc.ObserveStub(channel)
        while True:
            records = (await observe.ListRecords(observe_pb2.ListRecordsRequest(limit=1))).records
            if records and records[0].outcome == outcome:
                break
            await asyncio.sleep(0.05)
    total = records[0].summary.ledger.total
    spent = {(entry.hop, entry.kind): entry.duration.ToNanoseconds() / 1e9 for entry in total.entries}
    assert sum(spent.values()) == pytest.approx(total.total.ToNanoseconds() / 1e9)
    return spent


@asynccontextmanager
async def slow_lab(tmp_path: Path, **seconds: float) -> AsyncIterator[tuple[Lab, grpc.aio.Channel]]:
    """A thousand tokens are four steps."""
    model = random_llama(tmp_path / "model", hidden=128, layers=4, context=2048)
    async with running_lab(model) as lab, grpc.aio.insecure_channel(lab.router) as channel:
        for tier, more in seconds.items():
            lab.slow_steps(tier, more)
        yield lab, channel


@pytest.mark.parametrize("end", ["deadline", "cancel"])
async def test_in_the_queue_of_decode(tmp_path: Path, end: str) -> None:
    model = random_llama(tmp_path / "model", hidden=128, layers=4, context=2048)
    async with (
        running_mesh(model, decode_flags=("--num-slots", "1", "--local-prefill-tokens", "64")) as mesh,
        grpc.aio.insecure_channel(mesh.router.address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        holder = stub.StreamGenerate(ask(10, 2000))
        async for message in holder:
            if message.WhichOneof("event") == "chunk":
                break
        waiting = stub.StreamGenerate(ask(10, 4), timeout=0.8 if end == "deadline" else 30)
        reading = asyncio.create_task(drain(waiting))
        await asyncio.sleep(0.8)
        if end == "cancel":
            waiting.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        spent = await latest(mesh.router.admin, "deadline_exceeded" if end == "deadline" else "cancelled")
        holder.cancel()
    assert spent[ledger_pb2.HOP_DECODE, ledger_pb2.KIND_QUEUE] >= 0.8 - UNKNOWN
    assert spent[ledger_pb2.HOP_DECODE, ledger_pb2.KIND_NETWORK] <= UNKNOWN


async def test_in_the_engine_of_prefill(tmp_path: Path) -> None:
    async with slow_lab(tmp_path, prefill=0.25) as (lab, channel):
        call = inference_pb2_grpc.InferenceStub(channel).StreamGenerate(ask(1000, 4))
        reading = asyncio.create_task(drain(call))
        await asyncio.sleep(0.8)
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        spent = await latest(lab.admin, "cancelled")
    assert spent[ledger_pb2.HOP_PREFILL, ledger_pb2.KIND_COMPUTE] >= 0.45
    network = (
        spent[ledger_pb2.HOP_PREFILL, ledger_pb2.KIND_NETWORK] + spent[ledger_pb2.HOP_DECODE, ledger_pb2.KIND_NETWORK]
    )
    assert network <= UNKNOWN


async def test_in_the_engine_of_decode_after_prefill_was_lost(tmp_path: Path) -> None:
    async with slow_lab(tmp_path, prefill=0.25, decode=0.25) as (lab, channel):
        call = inference_pb2_grpc.InferenceStub(channel).StreamGenerate(ask(1000, 4))
        reading = asyncio.create_task(drain(call))
        await asyncio.sleep(0.7)
        lab.links["prefill-0"].cut()
        await asyncio.sleep(0.8)
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        spent = await latest(lab.admin, "cancelled")
    # Each tier had two steps at least. From its last word on nothing is known but that it did not answer.
    assert spent[ledger_pb2.HOP_PREFILL, ledger_pb2.KIND_COMPUTE] >= 0.45
    assert spent[ledger_pb2.HOP_DECODE, ledger_pb2.KIND_COMPUTE] >= 0.45
    network = (
        spent[ledger_pb2.HOP_PREFILL, ledger_pb2.KIND_NETWORK] + spent[ledger_pb2.HOP_DECODE, ledger_pb2.KIND_NETWORK]
    )
    assert network <= 2 * UNKNOWN


async def test_waiting_for_a_client_that_reads_too_late(tmp_path: Path) -> None:
    """The router's buffer overflows, the worker is freed, and all that follows is the client's doing."""
    model = random_llama(tmp_path / "model", hidden=64, layers=2, context=4096)
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with (
        running_mesh(model, router_flags=("--max-unsent-tokens", "50"), worker_flags=("--slot-tokens", "4096")) as mesh,
        grpc.aio.insecure_channel(mesh.router.address, options=options) as channel,
    ):
        call = inference_pb2_grpc.InferenceStub(channel).StreamGenerate(ask(10, 3000))
        for _ in range(3):
            await call.read()
        await asyncio.sleep(5)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await read_on(call)
        assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        spent = await latest(mesh.router.admin, "slow_reader")
    stalled = spent[ledger_pb2.HOP_ROUTER, ledger_pb2.KIND_STALL]
    assert stalled >= 1
    assert spent.get((ledger_pb2.HOP_ROUTER, ledger_pb2.KIND_OVERHEAD), 0) <= 0.2 * stalled
