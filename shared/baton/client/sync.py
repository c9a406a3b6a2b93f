"""The client for ordinary code and threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    def __iter__(self) -> Iterator[StreamMessage]: ...
    def cancel(self) -> None: ...


class AnswerStream(Iterator[Chunk]):
    """A streamed answer: iterate for its chunks, then read `answer`.

    Closing it (or leaving its `with` block, or dropping it) before its end cancels the call, and with it all work the
    mesh does for it.
    """

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._messages = iter(call)
        self._collector = Collector()
        self._answer: Answer | None = None

    @property
    def start(self) -> Start | None:
        """What the server said when it accepted the request; None before the first chunk."""
        return self._collector.start

    @property
    def answer(self) -> Answer:
        """The whole answer. Reads the stream to its end first.

        Raises:
            BatonRpcError: the call failed.
        """
        for _ in self:
            pass
        assert self._answer is not None
        return self._answer

    def __next__(self) -> Chunk:
        """The next chunk.

        Raises:
            BatonRpcError: the call failed, or was cancelled.
        """
        if self._answer is not None:
            raise StopIteration
        try:
            while True:
                chunk = self._collector.take(next(self._messages))
                if chunk is not None:
                    return chunk
        except StopIteration:
            self._answer = self._collector.finished()
            raise
        except grpc.RpcError as error:
            raise wrap(error) from error

    def close(self) -> None:
        """Cancel the call if it still runs."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """A connection to a router. Safe to share between threads.

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
            self._channel = grpc.insecure_channel(target, options=CLIENT_CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, credentials, options=CLIENT_CHANNEL_OPTIONS)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """Continue a prompt.

        Raises:
            BatonRpcError: the call failed.
        """
        message = request.generate_request(prompt, options)
        try:
            response = self._stub.Generate(message, timeout=self._seconds(options), metadata=self._sent(options))
        except grpc.RpcError as error:
            raise wrap(error) from error
        return answer.from_generate(response)

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AnswerStream:
        """Continue a prompt; the chunks come as they are generated."""
        message = request.stream_generate_request(prompt, options)
        return AnswerStream(
            self._stub.StreamGenerate(message, timeout=self._seconds(options), metadata=self._sent(options))
        )

    def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> Answer:
        """Answer a conversation.

        Raises:
            BatonRpcError: the call failed.
        """
        message = request.chat_request(messages, options)
        try:
            response = self._stub.Chat(message, timeout=self._seconds(options), metadata=self._sent(options))
        except grpc.RpcError as error:
            raise wrap(error) from error
        return answer.from_chat(response)

    def stream_chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> AnswerStream:
        """Answer a conversation; the chunks come as they are generated."""
        message = request.stream_chat_request(messages, options)
        return AnswerStream(
            self._stub.StreamChat(message, timeout=self._seconds(options), metadata=self._sent(options))
        )

    def models(self) -> list[ModelInfo]:
        """The models served.

        Raises:
            BatonRpcError: the call failed.
        """
        try:
            response = self._stub.ListModels(
                inference_pb2.ListModelsRequest(), timeout=self._timeout, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise wrap(error) from error
        return [answer.from_model(model) for model in response.models]

    def wait_ready(self, timeout: float) -> None:
        """Wait until the router can be reached.

        Raises:
            BatonRpcError: UNAVAILABLE, it could not within `timeout` seconds.
        """
        try:
            grpc.channel_ready_future(self._channel).result(timeout=timeout)
        except grpc.FutureTimeoutError as error:
            raise BatonRpcError(grpc.StatusCode.UNAVAILABLE, f"nothing answers at {self.target}") from error

    def close(self) -> None:
        """Cancel what runs and free the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _seconds(self, options: Options) -> float | None:
        return request.timeout(options, self._timeout)

    def _sent(self, options: Options) -> tuple[tuple[str, str], ...]:
        return request.metadata(options, self._metadata)
