"""Puts the messages of one streamed answer together, over as many calls as it takes. No I/O: both clients use it."""

from __future__ import annotations

import grpc

from baton.client import request
from baton.client.answer import Answer, Chunk, Start, answer
from baton.client.errors import BatonRpcError
from baton.client.request import StreamRequest
from baton.v1 import inference_pb2

StreamMessage = inference_pb2.StreamGenerateResponse | inference_pb2.StreamChatResponse


class Collector:
    """One answer in the making.

    Attributes:
        start: what the server said first; of several calls, the first one's.
    """

    __slots__ = ("_first_index", "_resumes", "_summary", "_texts", "_token_ids", "start")

    def __init__(self, request: StreamRequest) -> None:
        self.start: Start | None = None
        self._first_index = len(request.resume_from.ids)
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._summary: inference_pb2.Summary | None = None
        self._resumes = 0

    def take(self, message: StreamMessage) -> Chunk | None:
        """Account for one message; its chunk, if it carries one.

        Raises:
            BatonRpcError: tokens are missing, or came twice.
        """
        event = message.WhichOneof("event")
        if event == "chunk":
            expected = self._first_index + len(self._token_ids)
            if message.chunk.index != expected:
                raise BatonRpcError(
                    grpc.StatusCode.INTERNAL, f"token {message.chunk.index} came where {expected} was due"
                )
            token_ids = tuple(message.chunk.token_ids)
            self._texts.append(message.chunk.text)
            self._token_ids.extend(token_ids)
            return Chunk(message.chunk.index, token_ids, message.chunk.text)
        if event == "start":
            start = message.start
            if self.start is None:
                self.start = Start(start.request_id, start.model, start.seed, start.prompt_tokens)
        elif event == "summary":
            self._summary = message.summary
        return None

    def resumed(
        self, first: StreamRequest, metadata: tuple[tuple[str, str], ...]
    ) -> tuple[StreamRequest, tuple[tuple[str, str], ...]]:
        """The request, and its metadata, that get the rest of the answer.

        Args:
            first: the request as it was made first.
            metadata: of that.
        """
        self._resumes += 1
        if self.start is None:
            return first, metadata
        tokens = [*first.resume_from.ids, *self._token_ids]
        return request.resumed(first, self.start, tokens), request.same_id(metadata, self.start.request_id)

    def finished(self) -> Answer:
        """The whole answer, once the stream ended.

        Raises:
            BatonRpcError: the stream ended well for gRPC but without its Start or its Summary.
        """
        if self.start is None or self._summary is None:
            raise BatonRpcError(grpc.StatusCode.INTERNAL, "the server ended the stream before it was complete")
        return answer(self.start, "".join(self._texts), tuple(self._token_ids), self._summary, self._resumes)
