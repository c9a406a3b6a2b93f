"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Protocol, Self, Unpack

import grpc

from baton.client import answer, request
from baton.client.answer import Answer, Chunk, ModelInfo, Start
from baton.client.channel import CLIENT_CHANNEL_OPTIONS, DEFAULT_TIMEOUT
from baton.client.collector import Collector, StreamMessage
from baton.client.errors import BatonRpcError, wrap
from baton.client.request import Message, Options, Prompt
from baton.v1 import inference_pb2, inference_pb2_grpc


class _Call(Protocol):
    def __aiter__(self) -> AsyncIterator[StreamMessage]: ...
    def cancel(self) -> bool: ...
    def done(self) -> bool: ...


class AsyncAnswerStream(AsyncIterator[Chunk]):
    """A streamed answer: iterate for its chunks, then await `answer()`.

    Closing it (or leaving its `async with` block), or cancelling the task that reads it, cancels the call, and with it
    all work the mesh does for it.
    """

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._messages = call.__aiter__()
        self._collector = Collector()
        self._answer: Answer | None = None
        self._closed = False

    @property
    def start(self) -> Start | None:
        """What the server said when it accepted the request; None before the first chunk."""
        return self._collector.start

    async def answer(self) -> Answer:
        """The whole answer. Reads the stream to its end first.

        Raises:
            BatonRpcError: the call failed.
        """
        async for _ in self:
            pass
        assert self._answer is not None
        return self._answer

    async def __anext__(self) -> Chunk:
        """The next chunk.

        Raises:
            BatonRpcError: the call failed, or was closed.
        """
        if self._answer is not None:
            raise StopAsyncIteration
        if self._closed:
            raise BatonRpcError(grpc.StatusCode.CANCELLED, "the stream was closed")
        try:
            while True:
                chunk = self._collector.take(await self._messages.__anext__())
                if chunk is not None:
                    return chunk
        except StopAsyncIteration:
            self._answer = self._collector.finished()
            raise
        except grpc.RpcError as error:
            raise wrap(error) from error
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        """Cancel the call if it still runs."""
        self._closed = True
        if not self._call.done():
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """A connection to a router, for one event loop.

    Args:
        target: gRPC name of the router, for example "127.0.0.1:50051" or "dns:///baton:50051".
        timeout: deadline of a request that sets none, seconds; None: none.
        credentials: TLS; None: plain text.
        metadata: sent with every call.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.target = target
        self._timeout = timeout
        self._metadata = tuple(metadata)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options=CLIENT_CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options=CLIENT_CHANNEL_OPTIONS)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """Continue a prompt.

        Raises:
            BatonRpcError: the call failed.
        """
        message = request.generate_request(prompt, options)
        try:
            response = await self._stub.Generate(message, timeout=self._seconds(options), metadata=self._sent(options))
        except grpc.RpcError as error:
            raise wrap(error) from error
        return answer.from_generate(response)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncAnswerStream:
        """Continue a prompt; the chunks come as they are generated."""
        message = request.stream_generate_request(prompt, options)
        return AsyncAnswerStream(
            self._stub.StreamGenerate(message, timeout=self._seconds(options), metadata=self._sent(options))
        )

    async def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> Answer:
        """Answer a conversation.

        Raises:
            BatonRpcError: the call failed.
        """
        message = request.chat_request(messages, options)
        try:
            response = await self._stub.Chat(message, timeout=self._seconds(options), metadata=self._sent(options))
        except grpc.RpcError as error:
            raise wrap(error) from error
        return answer.from_chat(response)

    def stream_chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> AsyncAnswerStream:
        """Answer a conversation; the chunks come as they are generated."""
        message = request.stream_chat_request(messages, options)
        return AsyncAnswerStream(
            self._stub.StreamChat(message, timeout=self._seconds(options), metadata=self._sent(options))
        )

    async def models(self) -> list[ModelInfo]:
        """The models served.

        Raises:
            BatonRpcError: the call failed.
        """
        try:
            response = await self._stub.ListModels(
                inference_pb2.ListModelsRequest(), timeout=self._timeout, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise wrap(error) from error
        return [answer.from_model(model) for model in response.models]

    async def close(self) -> None:
        """Cancel what runs and free the connection."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _seconds(self, options: Options) -> float | None:
        return request.timeout(options, self._timeout)

    def _sent(self, options: Options) -> tuple[tuple[str, str], ...]:
        return request.metadata(options, self._metadata)
