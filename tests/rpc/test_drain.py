"""A server that ends: what runs finishes or is sent elsewhere, and nobody is told that it cancelled."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.internal.v1 import worker_pb2, worker_pb2_grpc
from baton.rpc.channel import server_options
from baton.rpc.drain import Drain
from baton.rpc.interceptor import RimInterceptor
from baton.rpc.reflection import add_reflection
from baton.rpc.service import Runtime, drained
from baton.v1 import inference_pb2, inference_pb2_grpc

End = Callable[[float], Coroutine[None, None, None]]


class Slow(inference_pb2_grpc.InferenceServicer, worker_pb2_grpc.WorkerServicer):
    """Answers when told to."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.freed = 0

    async def StreamGenerate(
        self, request: inference_pb2.StreamGenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[inference_pb2.StreamGenerateResponse, None]:
        try:
            yield inference_pb2.StreamGenerateResponse()
            await self.go_on.wait()
            yield inference_pb2.StreamGenerateResponse()
        finally:
            self.freed += 1

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inference_pb2.GetModelResponse:
        return inference_pb2.GetModelResponse()

    async def DebugState(
        self, request: worker_pb2.DebugStateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DebugStateResponse:
        return worker_pb2.DebugStateResponse(tasks=1)


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[tuple[Slow, Runtime, End, grpc.aio.Channel]]:
    drain = Drain()
    server = grpc.aio.server(interceptors=[RimInterceptor(drain)], options=server_options(2.0))
    slow = Slow()
    inference_pb2_grpc.add_InferenceServicer_to_server(slow, server)
    worker_pb2_grpc.add_WorkerServicer_to_server(slow, server)
    add_reflection(["baton.v1.Inference"], server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        runtime = Runtime("slow", server, drain)

        async def end(seconds: float) -> None:
            runtime.draining.set()
            await drained(runtime, port, seconds)

        yield slow, runtime, end, channel
    await server.stop(0)


async def test_what_runs_finishes_and_what_is_new_goes_elsewhere() -> None:
    async with serving() as (slow, runtime, end, channel):
        stub = inference_pb2_grpc.InferenceStub(channel)
        running = stub.StreamGenerate(inference_pb2.StreamGenerateRequest())
        await running.read()
        ending = asyncio.create_task(end(30.0))
        while not runtime.draining.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0)
        for call in (stub.GetModel(inference_pb2.GetModelRequest()), stub.Generate(inference_pb2.GenerateRequest())):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "draining" in (caught.value.details() or "")
        state = await worker_pb2_grpc.WorkerStub(channel).DebugState(worker_pb2.DebugStateRequest())
        assert state.tasks == 1, "who asks what is left is answered to the end"
        assert not ending.done()
        slow.go_on.set()
        assert await running.read() is not grpc.aio.EOF
        assert await running.code() is grpc.StatusCode.OK
        await asyncio.wait_for(ending, 10)


async def test_what_does_not_finish_is_unavailable_not_cancelled() -> None:
    async with serving() as (slow, _, end, channel):
        calls = [
            inference_pb2_grpc.InferenceStub(channel).StreamGenerate(inference_pb2.StreamGenerateRequest())
            for _ in range(20)
        ]
        for call in calls:
            await call.read()
        await asyncio.wait_for(end(0.1), 10)
        assert {await call.code() for call in calls} == {grpc.StatusCode.UNAVAILABLE}
        assert slow.freed == 20, "and frees what it holds"


async def test_an_idle_stream_of_a_tool_holds_nothing_up() -> None:
    async with serving() as (_, runtime, end, channel):
        stream = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        assert (await stream.read()).list_services_response.service
        assert runtime.drain.calls == 0
        await asyncio.wait_for(end(60.0), 20)
        assert await stream.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_stream_that_tells_of_the_drain_ends_by_itself_behind_the_last_call() -> None:
    drain, over = Drain(), asyncio.Event()

    async def call(method: str, after: float) -> None:
        async with drain.serving(method):
            await over.wait()
            await asyncio.sleep(after)

    calls = [
        asyncio.create_task(call("/baton.internal.v1.Decode/Generate", 0.0)),
        asyncio.create_task(call("/baton.internal.v1.Worker/Watch", 0.05)),
    ]
    await asyncio.sleep(0)
    ending = asyncio.create_task(drain.finish(60.0, 0.0))
    await asyncio.sleep(0.5)
    over.set()
    await asyncio.wait_for(ending, 20)
    assert await asyncio.gather(*calls) == [None, None], "neither was cut off"


async def test_a_caller_who_cancels_is_no_affair_of_the_drain() -> None:
    async with serving() as (slow, runtime, _, channel):
        call = inference_pb2_grpc.InferenceStub(channel).StreamGenerate(inference_pb2.StreamGenerateRequest())
        await call.read()
        assert runtime.drain.calls == 1
        call.cancel()
        async with asyncio.timeout(10):
            while runtime.drain.calls:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert slow.freed == 1
        assert await call.code() is grpc.StatusCode.CANCELLED


async def test_calls_that_come_while_it_stops_are_never_cancelled() -> None:
    """The instant in which gRPC's own shutdown drops what comes in lies behind everybody's being sent elsewhere."""
    async with serving() as (_, _, end, channel):
        stub = inference_pb2_grpc.InferenceStub(channel)
        codes: Counter[grpc.StatusCode] = Counter()

        async def ask() -> None:
            while not ending.done():
                try:
                    await stub.GetModel(inference_pb2.GetModelRequest())
                    codes[grpc.StatusCode.OK] += 1
                except grpc.aio.AioRpcError as error:
                    codes[error.code()] += 1
                    await asyncio.sleep(0.001)

        async def end_soon() -> None:
            await asyncio.sleep(0.1)
            await end(1.0)

        ending = asyncio.create_task(end_soon())
        await asyncio.gather(*(ask() for _ in range(8)))
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}, codes
