"""A streamed answer put together, for unary calls."""

from __future__ import annotations

from baton.v1 import chat_pb2, inference_pb2

Event = inference_pb2.StreamStart | inference_pb2.TokenChunk | inference_pb2.Summary


class WholeAnswer:
    """All events of one answer. At most max_tokens chunks with tokens, so bounded by the context."""

    def __init__(self) -> None:
        self.start = inference_pb2.StreamStart()
        self.summary = inference_pb2.Summary()
        self._chunks: list[inference_pb2.TokenChunk] = []

    def take(self, event: Event) -> None:
        """Add the next event."""
        if isinstance(event, inference_pb2.TokenChunk):
            self._chunks.append(event)
        elif isinstance(event, inference_pb2.StreamStart):
            self.start = event
        else:
            self.summary = event

    def generated(self) -> inference_pb2.GenerateResponse:
        """The answer to Generate."""
        return inference_pb2.GenerateResponse(
            request_id=self.start.request_id,
            model=self.start.model,
            text=self._text(),
            token_ids=self._token_ids(),
            summary=self.summary,
            seed=self.start.seed,
        )

    def said(self) -> inference_pb2.ChatResponse:
        """The answer to Chat."""
        message = chat_pb2.ChatMessage(role=chat_pb2.ROLE_ASSISTANT, content=[chat_pb2.ContentPart(text=self._text())])
        return inference_pb2.ChatResponse(
            request_id=self.start.request_id,
            model=self.start.model,
            message=message,
            token_ids=self._token_ids(),
            summary=self.summary,
            seed=self.start.seed,
        )

    def _text(self) -> str:
        return "".join(chunk.text for chunk in self._chunks)

    def _token_ids(self) -> list[int]:
        return [token_id for chunk in self._chunks for token_id in chunk.token_ids]
