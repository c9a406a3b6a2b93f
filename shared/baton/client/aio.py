"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack

import grpc

from baton.client import answer, request
from baton.client.answer import Answer, Chunk, ModelInfo, Start
from baton.client.channel import DEFAULT_TIMEOUT, channel_options
from baton.client.collector import Collector, StreamMessage
from baton.client.errors import BatonRpcError, wrap
from baton.client.failover import Failover, Routers, split_targets
from baton.client.request import Message, Options, Prompt, StreamRequest
from baton.client.security import Tls, bearer
from baton.v1 import inference_pb2, inference_pb2_grpc

ResponseT = TypeVar("ResponseT")
Metadata = tuple[tuple[str, str], ...]


class _Call(Protocol):
    def __aiter__(self) -> AsyncIterator[StreamMessage]: ...
    def cancel(self) -> bool: ...
    def done(self) -> bool: ...


class _Open(Protocol):
    """Starts a call."""

    def __call__(self, router: int, request: StreamRequest, timeout: float | None, metadata: Metadata) -> _Call: ...


def _task_cancelled() -> bool:
    """Whether the current task is, and not just the call it waits for: gRPC raises the same for both."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


class AsyncAnswerStream(AsyncIterator[Chunk]):
    """A streamed answer: iterate for its chunks, then await `answer()`.

    Closing it (or leaving its `async with` block), or cancelling the task that reads it, cancels the call, and with it
    all work the mesh does for it. Of a client with several routers it goes on at the next one when one is lost: the
    reader sees a pause.
    """

    def __init__(self, open_call: _Open, request: StreamRequest, failover: Failover, metadata: Metadata) -> None:
        self._open = open_call
        self._request = request
        self._failover = failover
        self._metadata = metadata
        self._collector = Collector(request)
        self._answer: Answer | None = None
        self._closed = False
        self._call = open_call(failover.router, request, failover.timeout(), metadata)
        self._messages = self._call.__aiter__()

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
        try:
            while True:
                if self._closed:
                    raise BatonRpcError(grpc.StatusCode.CANCELLED, "the stream was closed")
                try:
                    chunk = self._collector.take(await self._messages.__anext__())
                except grpc.RpcError as error:
                    await self._go_on(wrap(error))
                    continue
                if chunk is not None:
                    self._failover.progressed()
                    return chunk
        except StopAsyncIteration:
            self._answer = self._collector.finished()
            raise
        except asyncio.CancelledError:
            self.close()
            if _task_cancelled():
                raise
            raise BatonRpcError(grpc.StatusCode.CANCELLED, "the stream was closed") from None
        except BatonRpcError:
            self.close()
            raise

    def close(self) -> None:
        """Cancel the call if it still runs."""
        self._closed = True
        if not self._call.done():
            self._call.cancel()

    async def _go_on(self, error: BatonRpcError) -> None:
        """Get the rest from another router; raises the error if there is none to be had."""
        if self._closed:
            raise error
        await asyncio.sleep(self._failover.lost(error))
        if not self._closed:
            request, metadata = self._collector.resumed(self._request, self._metadata)
            self._call = self._open(self._failover.router, request, self._failover.timeout(), metadata)
            self._messages = self._call.__aiter__()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """A connection to a router, or to several that serve the same mesh, for one event loop.

    Args:
        target: gRPC name of the router, for example "127.0.0.1:50051" or "dns:///baton:50051". Of several, in a list or
            with commas between them, the first one that can be reached is used; when it is lost, the next.
        timeout: deadline of a request that sets none, seconds; None: none.
        tls: None: plain text, unless `credentials` are given.
        api_key: shows who calls: an API key, or a JSON Web Token; empty: none.
        credentials: TLS of another making.
        metadata: sent with every call.

    Raises:
        OSError: a file of `tls` cannot be read.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        tls: Tls | None = None,
        api_key: str = "",
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        targets = split_targets(target)
        self.target = ",".join(targets)
        self._timeout = timeout
        self._metadata = (*metadata, *bearer(api_key))
        options = [*channel_options(len(targets)), *(tls.options() if tls is not None else ())]
        if tls is not None and credentials is None:
            credentials = tls.credentials()
        if credentials is None:
            self._channels = [grpc.aio.insecure_channel(one, options=options) for one in targets]
        else:
            self._channels = [grpc.aio.secure_channel(one, credentials, options=options) for one in targets]
        self._stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in self._channels]
        self._routers = Routers(len(targets))

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """Continue a prompt.

        Raises:
            BatonRpcError: the call failed.
        """
        message = request.generate_request(prompt, options)
        return answer.from_generate(await self._whole(lambda stub: stub.Generate, message, options))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncAnswerStream:
        """Continue a prompt; the chunks come as they are generated."""
        message = request.stream_generate_request(prompt, options)
        return self._streamed(lambda stub: stub.StreamGenerate, message, options)

    async def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> Answer:
        """Answer a conversation.

        Raises:
            BatonRpcError: the call failed.
        """
        message = request.chat_request(messages, options)
        return answer.from_chat(await self._whole(lambda stub: stub.Chat, message, options))

    def stream_chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> AsyncAnswerStream:
        """Answer a conversation; the chunks come as they are generated."""
        message = request.stream_chat_request(messages, options)
        return self._streamed(lambda stub: stub.StreamChat, message, options)

    async def models(self) -> list[ModelInfo]:
        """The models served.

        Raises:
            BatonRpcError: the call failed.
        """
        response = await self._whole(lambda stub: stub.ListModels, inference_pb2.ListModelsRequest(), Options())
        return [answer.from_model(model) for model in response.models]

    async def close(self) -> None:
        """Cancel what runs and free the connections."""
        for channel in self._channels:
            await channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _whole(
        self,
        method: Callable[[inference_pb2_grpc.InferenceAsyncStub], Callable[..., Awaitable[ResponseT]]],
        message: object,
        options: Options,
    ) -> ResponseT:
        """An answer in one piece; of a router that is lost nothing came, so the next one begins anew."""
        failover = Failover(self._routers, request.timeout(options, self._timeout))
        metadata = request.metadata(options, self._metadata)
        while True:
            try:
                call = method(self._stubs[failover.router])(message, timeout=failover.timeout(), metadata=metadata)
                return await call
            except grpc.RpcError as error:
                await asyncio.sleep(failover.lost(wrap(error)))
            except asyncio.CancelledError:
                if _task_cancelled():
                    raise
                raise BatonRpcError(grpc.StatusCode.CANCELLED, "the client was closed") from None

    def _streamed(
        self,
        method: Callable[[inference_pb2_grpc.InferenceAsyncStub], Callable[..., _Call]],
        message: StreamRequest,
        options: Options,
    ) -> AsyncAnswerStream:
        def open_call(router: int, request: StreamRequest, timeout: float | None, metadata: Metadata) -> _Call:
            return method(self._stubs[router])(request, timeout=timeout, metadata=metadata)

        failover = Failover(self._routers, request.timeout(options, self._timeout))
        return AsyncAnswerStream(open_call, message, failover, request.metadata(options, self._metadata))
