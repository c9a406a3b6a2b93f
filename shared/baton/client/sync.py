"""The client for ordinary code and threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
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
    def __iter__(self) -> Iterator[StreamMessage]: ...
    def cancel(self) -> None: ...


class _Open(Protocol):
    """Starts a call."""

    def __call__(self, router: int, request: StreamRequest, timeout: float | None, metadata: Metadata) -> _Call: ...


class AnswerStream(Iterator[Chunk]):
    """A streamed answer: iterate for its chunks, then read `answer`.

    Closing it (or leaving its `with` block, or dropping it) before its end cancels the call, and with it all work the
    mesh does for it. Of a client with several routers it goes on at the next one when one is lost: the reader sees a
    pause.
    """

    def __init__(
        self,
        open_call: _Open,
        request: StreamRequest,
        failover: Failover,
        metadata: Metadata,
        client_closed: threading.Event,
    ) -> None:
        self._client_closed = client_closed
        self._open = open_call
        self._request = request
        self._failover = failover
        self._metadata = metadata
        self._collector = Collector(request)
        self._answer: Answer | None = None
        self._closed = threading.Event()
        self._call = open_call(failover.router, request, failover.timeout(), metadata)
        self._messages = iter(self._call)

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
        while True:
            try:
                chunk = self._collector.take(next(self._messages))
            except StopIteration:
                self._answer = self._collector.finished()
                raise
            except grpc.RpcError as error:
                self._go_on(wrap(error))
                continue
            except BatonRpcError:
                self.close()  # what comes is no answer
                raise
            if chunk is not None:
                self._failover.progressed()
                return chunk

    def close(self) -> None:
        """Cancel the call if it still runs."""
        self._closed.set()
        self._call.cancel()

    def _go_on(self, error: BatonRpcError) -> None:
        """Get the rest from another router; raises the error if there is none to be had."""
        if self._closed.is_set() or self._client_closed.is_set() or self._closed.wait(self._failover.lost(error)):
            raise error
        request, metadata = self._collector.resumed(self._request, self._metadata)
        try:
            self._call = self._open(self._failover.router, request, self._failover.timeout(), metadata)
        except ValueError:
            if self._client_closed.is_set():
                raise error from None  # the channel is closed
            raise
        self._messages = iter(self._call)
        if self._closed.is_set():
            self._call.cancel()  # closed by another thread meanwhile

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """A connection to a router, or to several that serve the same mesh. Safe to share between threads.

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
            self._channels = [grpc.insecure_channel(one, options=options) for one in targets]
        else:
            self._channels = [grpc.secure_channel(one, credentials, options=options) for one in targets]
        self._stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in self._channels]
        self._routers = Routers(len(targets))
        self._closed = threading.Event()

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """Continue a prompt.

        Raises:
            BatonRpcError: the call failed.
        """
        message = request.generate_request(prompt, options)
        return answer.from_generate(self._whole(lambda stub: stub.Generate, message, options))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AnswerStream:
        """Continue a prompt; the chunks come as they are generated."""
        message = request.stream_generate_request(prompt, options)
        return self._streamed(lambda stub: stub.StreamGenerate, message, options)

    def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> Answer:
        """Answer a conversation.

        Raises:
            BatonRpcError: the call failed.
        """
        message = request.chat_request(messages, options)
        return answer.from_chat(self._whole(lambda stub: stub.Chat, message, options))

    def stream_chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> AnswerStream:
        """Answer a conversation; the chunks come as they are generated."""
        message = request.stream_chat_request(messages, options)
        return self._streamed(lambda stub: stub.StreamChat, message, options)

    def models(self) -> list[ModelInfo]:
        """The models served.

        Raises:
            BatonRpcError: the call failed.
        """
        response = self._whole(lambda stub: stub.ListModels, inference_pb2.ListModelsRequest(), Options())
        return [answer.from_model(model) for model in response.models]

    def wait_ready(self, timeout: float) -> None:
        """Wait until a router can be reached.

        Raises:
            BatonRpcError: UNAVAILABLE, none could within `timeout` seconds.
        """
        ready = threading.Event()

        def changed(connectivity: grpc.ChannelConnectivity) -> None:
            if connectivity is grpc.ChannelConnectivity.READY:
                ready.set()

        for channel in self._channels:
            channel.subscribe(changed, try_to_connect=True)
        try:
            if not ready.wait(timeout):
                raise BatonRpcError(grpc.StatusCode.UNAVAILABLE, f"nothing answers at {self.target}")
        finally:
            for channel in self._channels:
                channel.unsubscribe(changed)

    def close(self) -> None:
        """Cancel what runs and free the connections."""
        self._closed.set()  # first: what is cancelled does not go on at another router
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _whole(
        self,
        method: Callable[[inference_pb2_grpc.InferenceStub], Callable[..., ResponseT]],
        message: object,
        options: Options,
    ) -> ResponseT:
        """An answer in one piece; of a router that is lost nothing came, so the next one begins anew."""
        failover = Failover(self._routers, request.timeout(options, self._timeout))
        metadata = request.metadata(options, self._metadata)
        lost: BatonRpcError | None = None
        while True:
            try:
                return method(self._stubs[failover.router])(message, timeout=failover.timeout(), metadata=metadata)
            except grpc.RpcError as error:
                lost = wrap(error)
                if self._closed.is_set() or self._closed.wait(failover.lost(lost)):
                    raise lost from error
            except ValueError:
                if lost is not None and self._closed.is_set():
                    raise lost from None  # the channel is closed
                raise

    def _streamed(
        self,
        method: Callable[[inference_pb2_grpc.InferenceStub], Callable[..., _Call]],
        message: StreamRequest,
        options: Options,
    ) -> AnswerStream:
        def open_call(router: int, request: StreamRequest, timeout: float | None, metadata: Metadata) -> _Call:
            return method(self._stubs[router])(request, timeout=timeout, metadata=metadata)

        failover = Failover(self._routers, request.timeout(options, self._timeout))
        return AnswerStream(open_call, message, failover, request.metadata(options, self._metadata), self._closed)
