"""The asyncio client: the same promises, and that cancelling the reading task cancels the call."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from baton.client import AsyncClient, BatonRpcError, Message, Role


async def test_generate_stream_chat_and_models(server: Any) -> None:
    async with AsyncClient(server.target) as client:
        assert (await client.generate("Once")).text == "Once upon a time"
        async with client.stream("Once") as stream:
            texts = [chunk.text async for chunk in stream]
            answer = await stream.answer()
        assert texts == ["Once", " upon", " a", " time"]
        assert answer.text == "Once upon a time"
        assert (await client.chat([Message(Role.USER, "hello")])).text == "HELLO"
        assert [chunk.text async for chunk in client.stream_chat([Message(Role.USER, "hello")])] == ["hello"]
        assert [model.name for model in await client.models()] == ["tiny"]


async def test_leaving_the_stream_cancels_the_call(server: Any) -> None:
    async with AsyncClient(server.target) as client:
        async with client.stream("hang") as stream:
            async for chunk in stream:
                assert chunk.text == "Once"
                break
        assert await asyncio.to_thread(server.inference.cancelled.wait, 5)
        with pytest.raises(BatonRpcError, match="CANCELLED"):
            await anext(stream)


async def test_cancelling_the_reader_cancels_the_call(server: Any) -> None:
    async def read(client: AsyncClient) -> None:
        async for _ in client.stream("hang"):
            pass

    async with AsyncClient(server.target) as client:
        reader = asyncio.create_task(read(client))
        assert await asyncio.to_thread(server.inference.hanging.wait, 5)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert await asyncio.to_thread(server.inference.cancelled.wait, 5)


@pytest.mark.parametrize("way", ["stream", "client", "whole"])
async def test_closing_it_from_elsewhere_does_not_look_like_a_cancelled_task(server: Any, way: str) -> None:
    async with AsyncClient(server.target) as client:
        stream = client.stream("hang")
        reader = asyncio.ensure_future(client.generate("hang") if way == "whole" else stream.answer())
        assert await asyncio.to_thread(server.inference.hanging.wait, 5)
        await asyncio.sleep(0)
        if way == "stream":
            stream.close()
        else:
            await client.close()
        with pytest.raises(BatonRpcError, match="CANCELLED"):
            await asyncio.wait_for(reader, 5)


async def test_errors_are_unpacked(server: Any) -> None:
    async with AsyncClient(server.target) as client:
        with pytest.raises(BatonRpcError) as caught:
            await client.generate("invalid", request_id="req-1")
        assert [violation.field for violation in caught.value.violations] == ["sampling.top_p"]
        assert caught.value.request_id == "req-1"
        with pytest.raises(BatonRpcError) as caught:
            await client.stream("overloaded").answer()
        assert (caught.value.reason, caught.value.retry_after) == ("OVERLOADED", 2.5)
        with pytest.raises(BatonRpcError) as caught:
            await client.generate("hang", timeout=0.2)
        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
