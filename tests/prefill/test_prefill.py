"""A prompt holds its place in the engine as long as its caller takes its KV. An engine found dead blames nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import pytest

from baton.engine.client import EngineDied
from baton.engine.layout import KvDtype, LayerSpec, ModelSpec, PoolLayout
from baton.engine.messages import KvReady, Output, Submit
from baton.handoff import sender as sender_module
from baton.handoff.wire import WIRE_VERSION, largest_chunk, layer_table
from baton.internal.v1 import kv_pb2, prefill_pb2, prefill_pb2_grpc
from baton.rpc.channel import server_options
from baton.rpc.errors import reason_of
from baton.rpc.interceptor import RimInterceptor
from baton.rpc.service import Runtime
from baton.v1 import inference_pb2, sampling_pb2
from baton.worker.calls import Calls
from baton_prefill import prefill as prefill_module
from baton_prefill.prefill import PrefillServicer

TOKENS = 512
SPEC = ModelSpec(
    name="m",
    architecture="a",
    fingerprint="f",
    tokenizer_digest="",
    vocab_size=9,
    max_context=TOKENS,
    eos_token_ids=(),
    dtype=KvDtype.FLOAT32,
    layers=(LayerSpec(key="0", heads=64, key_dim=32, value_dim=32),),  # 8 MiB of KV: more than a connection takes in
)


class Engine:
    """Computes a prompt at once. `begun` and `freed` tell of its one request."""

    def __init__(self) -> None:
        self.spec = SPEC
        self.layout = PoolLayout.build(SPEC.layers, SPEC.dtype, 1, TOKENS)
        self.memory = memoryview(bytearray(self.layout.total_bytes))
        self.dead = False
        self.begun = asyncio.Event()
        self.freed = asyncio.Event()

    @asynccontextmanager
    async def request(self, submit: Submit) -> AsyncIterator[Engine]:
        if self.dead:
            raise EngineDied("status -9")
        self.begun.set()
        try:
            self._events = iter(
                (
                    KvReady(request_id="r", slot=0, layer=0, start=0, stop=TOKENS),
                    Output(request_id="r", index=0, token_ids=[1]),
                )
            )
            yield self
        finally:
            self.freed.set()

    async def next(self, seconds: float) -> Any:
        return next(self._events)


class Offers:
    @contextmanager
    def to(self, wanted: Any, mapped_memory: str) -> Iterator[prefill_pb2.PrefillAccepted]:
        yield prefill_pb2.PrefillAccepted(transports=wanted)


@asynccontextmanager
async def serving(engine: Engine) -> AsyncIterator[prefill_pb2_grpc.PrefillStub]:
    server = grpc.aio.server(interceptors=[RimInterceptor()], options=server_options(30.0))
    PrefillServicer(engine, Offers(), Calls(), Runtime("prefill", server)).register(server)  # type: ignore[arg-type]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield prefill_pb2_grpc.PrefillStub(channel)
    finally:
        await server.stop(0)


def start(engine: Engine, credit_bytes: int) -> prefill_pb2.PrefillRequest:
    sampling = sampling_pb2.SamplingParams(
        max_tokens=9, min_tokens=0, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0,
        presence_penalty=0.0, frequency_penalty=0.0, seed=1, ignore_eos=True,
    )  # fmt: skip
    return prefill_pb2.PrefillRequest(
        start=prefill_pb2.Start(
            request_id="r",
            wire_version=WIRE_VERSION,
            model_fingerprint=SPEC.fingerprint,
            layer_table=layer_table(SPEC),
            token_ids=[1] * TOKENS,
            prompt_tokens=TOKENS,
            sampling=sampling,
            credit_bytes=credit_bytes,
            codecs=[kv_pb2.KV_CODEC_RAW],
            transports=[inference_pb2.TRANSPORT_GRPC],
        )
    )


async def read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize("reads", [True, False])
async def test_a_caller_that_hangs_loses_its_place(monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    monkeypatch.setattr(sender_module if reads else prefill_module, "STALL_SECONDS", 0.5)
    engine = Engine()
    async with serving(engine) as stub:
        call = stub.Prefill()
        await call.write(start(engine, largest_chunk(engine.layout) if reads else 1 << 30))
        await asyncio.wait_for(engine.begun.wait(), 30)
        if reads:  # and grants nothing for it
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(read_all(call), 30)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "said nothing" in (caught.value.details() or "")
        await asyncio.wait_for(engine.freed.wait(), 30)
        call.cancel()


async def test_an_engine_that_died_before_it_had_the_request_blames_nobody() -> None:
    engine = Engine()
    engine.dead = True
    async with serving(engine) as stub:
        call = stub.Prefill()
        await call.write(start(engine, 1 << 30))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
