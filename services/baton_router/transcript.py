"""What was asked and answered, as attributes of the request's span. Only with --record-prompts.

In the form of OpenTelemetry's conventions for generative AI, `gen_ai.input.messages` and `gen_ai.output.messages`: as
JSON, because attributes of spans hold no structures.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc

from baton.telemetry import tracing
from baton.text.tokenizer import Tokenizer
from baton.v1 import chat_pb2, inference_pb2, sampling_pb2
from baton_router.answer import Event
from baton_router.inference import InferenceServicer
from baton_router.metrics import word
from baton_router.validate import AnyRequest

Context = grpc.aio.ServicerContext[Any, Any]


class RecordingServicer(InferenceServicer):
    """The public API, with the text of every accepted request in its span."""

    async def _serve(
        self, method: str, request: AnyRequest, context: Context, *, buffer: bool
    ) -> AsyncGenerator[Event, None]:
        transcript = Transcript(self._settings.record_prompts_bytes)
        with transcript.told():
            async with aclosing(super()._serve(method, request, context, buffer=buffer)) as events:
                async for event in events:
                    if isinstance(event, inference_pb2.StreamStart):
                        tokenizer = self._catalogue.named(event.model).tokenizer
                        transcript.ask(said(request, tokenizer, self._settings.record_prompts_bytes))
                    elif isinstance(event, inference_pb2.TokenChunk):
                        transcript.answer(event.text)
                    else:
                        transcript.end(event.finish_reason)
                    yield event


class Transcript:
    """One request's text in the making, bounded.

    Args:
        limit: bytes of each attribute at most; what is longer is cut, and stays valid JSON.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._asked = ""
        self._answer: list[str] = []
        self._room = limit
        self._finish_reason = "error"  # also of a cancelled one: the conventions have no word for it

    def ask(self, messages: Iterable[tuple[str, str]]) -> None:
        """The request was understood; (role, text) of each message."""
        self._asked = fitted(messages, self._limit)

    def answer(self, text: str) -> None:
        """More of the answer."""
        if text and self._room > 0:
            self._answer.append(text)
            self._room -= len(text)

    def end(self, reason: sampling_pb2.FinishReason.ValueType) -> None:
        """The answer is whole."""
        self._finish_reason = word(sampling_pb2.FinishReason.Name(reason), 2)

    @contextmanager
    def told(self) -> Iterator[None]:
        """However the block is left, the call's span gets what is known; a request that was refused leaves nothing."""
        try:
            yield
        finally:
            if self._asked:
                answered = [("assistant", "".join(self._answer))]
                answer = fitted(answered, self._limit, finish_reason=self._finish_reason)
                tracing.set_call_attributes({"gen_ai.input.messages": self._asked, "gen_ai.output.messages": answer})


def said(request: AnyRequest, tokenizer: Tokenizer, limit: int) -> Iterator[tuple[str, str]]:
    """(role, text) of a request's messages. A prompt of token ids as text, of so many at most."""
    if isinstance(request, inference_pb2.ChatRequest | inference_pb2.StreamChatRequest):
        for message in request.messages:
            yield word(chat_pb2.Role.Name(message.role), 1), "".join(part.text for part in message.content)
    elif request.HasField("text"):
        yield "user", request.text
    else:
        yield "user", tokenizer.decode(request.token_ids.ids[:limit], False)


def fitted(messages: Iterable[tuple[str, str]], limit: int, **more: str) -> str:
    """JSON of messages, at most `limit` bytes: the first ones, the last of them cut where the room ends."""
    parts: list[str] = []
    room = limit - 2
    for role, text in messages:
        room -= len(_message(role, "", more)) + 1
        if room < 0:
            break
        kept = _cut(text, room)
        parts.append(_message(role, kept, more))
        room -= _size(kept)
        if len(kept) < len(text):
            break
    return f"[{','.join(parts)}]"


def _message(role: str, text: str, more: dict[str, str]) -> str:
    return _json({"role": role, "parts": [{"type": "text", "content": text}], **more})


def _cut(text: str, room: int) -> str:
    """The longest beginning of a text that takes at most `room` bytes in JSON."""
    text = text[:room]
    if _size(text) <= room:
        return text
    return text[: bisect_right(range(len(text) + 1), room, key=lambda length: _size(text[:length])) - 1]


def _size(text: str) -> int:
    """Bytes of a text in JSON, without its quotes."""
    return len(_json(text).encode()) - 2


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
