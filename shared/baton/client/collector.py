"""Puts the messages of one streamed answer together. No I/O: both clients use it."""

from __future__ import annotations

import grpc

from baton.client.answer import Answer, Chunk, Start, answer
from baton.client.errors import BatonRpcError
from baton.v1 import inference_pb2

StreamMessage = inference_pb2.StreamGenerateResponse | inference_pb2.StreamChatResponse


class Collector:
    """One answer in the making."""

    __slots__ = ("_summary", "_texts", "_token_ids", "start")

    def __init__(self) -> None:
        self.start: Start | None = None
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._summary: inference_pb2.Summary | None = None

    def take(self, message: StreamMessage) -> Chunk | None:
        """Account for one message; its chunk, if it carries one."""
        event = message.WhichOneof("event")
        if event == "chunk":
            token_ids = tuple(message.chunk.token_ids)
            self._texts.append(message.chunk.text)
            self._token_ids.extend(token_ids)
            return Chunk(message.chunk.index, token_ids, message.chunk.text)
        if event == "start":
            start = message.start
            self.start = Start(start.request_id, start.model, start.seed, start.prompt_tokens)
        elif event == "summary":
            self._summary = message.summary
        return None

    def finished(self) -> Answer:
        """The whole answer, once the stream ended.

        Raises:
            BatonRpcError: the stream ended well for gRPC but without its Start or its Summary.
        """
        if self.start is None or self._summary is None:
            raise BatonRpcError(grpc.StatusCode.INTERNAL, "the server ended the stream before it was complete")
        return answer(self.start, "".join(self._texts), tuple(self._token_ids), self._summary)
