"""A real gRPC server on loopback with scripted answers, and the real error interceptor."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc

from baton.rpc.channel import SERVER_OPTIONS
from baton.rpc.errors import BatonError, InvalidArgument, ModelNotFound, Overloaded, Unavailable
from baton.rpc.interceptor import RimInterceptor, adopt_request_id
from baton.v1 import chat_pb2, inference_pb2, inference_pb2_grpc, ledger_pb2, sampling_pb2

WORDS = ["Once", " upon", " a", " time"]


def summary(prompt_tokens: int = 3) -> inference_pb2.Summary:
    """A summary with a ledger whose parts sum to its total."""
    made = inference_pb2.Summary(
        finish_reason=sampling_pb2.FINISH_REASON_LENGTH,
        usage=sampling_pb2.Usage(prompt_tokens=prompt_tokens, cached_prompt_tokens=1, completion_tokens=len(WORDS)),
        cache_status=inference_pb2.CACHE_STATUS_MISS,
        prefill_placement=inference_pb2.PLACEMENT_REMOTE,
        transport=inference_pb2.TRANSPORT_GRPC,
        migrations=1,
    )
    total = made.ledger.total
    total.total.FromMicroseconds(10_000)
    for hop, kind, micros in (
        (ledger_pb2.HOP_ROUTER, ledger_pb2.KIND_TOKENIZE, 500),
        (ledger_pb2.HOP_DECODE, ledger_pb2.KIND_NETWORK, 1_500),
        (ledger_pb2.HOP_DECODE, ledger_pb2.KIND_COMPUTE, 7_900),
    ):
        total.entries.add(hop=hop, kind=kind).duration.FromMicroseconds(micros)
    total.residual.FromMicroseconds(100)
    total.hidden_transfer.FromMicroseconds(300)
    return made


class ScriptedInference(inference_pb2_grpc.InferenceServicer):
    """Answers by the prompt's text: "hang", "invalid", "overloaded", "truncated", or anything else for WORDS."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.lose_after: int | None = None  # words, of those it sends, after which it is gone; -1: at once
        self.lose_word: BatonError = Unavailable("this router is draining")
        self.cancelled = threading.Event()
        self.hanging = threading.Event()

    def _note(self, request: Any, context: Any) -> str:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        return adopt_request_id(context)

    async def Generate(self, request: Any, context: Any) -> inference_pb2.GenerateResponse:
        request_id = self._note(request, context)
        if request.text == "invalid":
            raise InvalidArgument("sampling.top_p", "must be in (0, 1]")
        if request.text == "hang":
            self.hanging.set()
            await asyncio.sleep(60)
        if self.lose_after is not None:
            raise self.lose_word
        return inference_pb2.GenerateResponse(
            request_id=request_id, model="tiny", text="".join(WORDS), token_ids=[1, 2, 3, 4], summary=summary(), seed=7
        )

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        request_id = self._note(request, context)
        if request.text == "overloaded":
            raise Overloaded("no room", retry_after=2.5)
        if self.lose_after == -1:
            raise self.lose_word
        start = inference_pb2.StreamStart(request_id=request_id, model="tiny", seed=7, prompt_tokens=3)
        yield inference_pb2.StreamGenerateResponse(start=start)
        first = len(request.resume_from.ids)
        for index, word in list(enumerate(WORDS))[first:]:
            if index - first == self.lose_after:
                raise self.lose_word
            chunk = inference_pb2.TokenChunk(index=index, token_ids=[index + 1], text=word)
            yield inference_pb2.StreamGenerateResponse(chunk=chunk)
            if request.text == "hang":
                self.hanging.set()
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    self.cancelled.set()
                    raise
        if self.lose_after == len(WORDS) - first:
            raise self.lose_word
        if request.text == "repeats":
            yield inference_pb2.StreamGenerateResponse(chunk=chunk)
        if request.text != "truncated":
            yield inference_pb2.StreamGenerateResponse(summary=summary())

    async def Chat(self, request: Any, context: Any) -> inference_pb2.ChatResponse:
        request_id = self._note(request, context)
        if request.model == "other":
            raise ModelNotFound("model", "no model named other")
        said = "".join(part.text for message in request.messages for part in message.content)
        answer = chat_pb2.ChatMessage(role=chat_pb2.ROLE_ASSISTANT, content=[chat_pb2.ContentPart(text=said.upper())])
        return inference_pb2.ChatResponse(
            request_id=request_id, model="tiny", message=answer, token_ids=[5], summary=summary(), seed=7
        )

    async def StreamChat(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.StreamChatResponse]:
        request_id = self._note(request, context)
        yield inference_pb2.StreamChatResponse(
            start=inference_pb2.StreamStart(request_id=request_id, model="tiny", seed=7, prompt_tokens=3)
        )
        for index, message in enumerate(request.messages):
            text = "".join(part.text for part in message.content)
            yield inference_pb2.StreamChatResponse(
                chunk=inference_pb2.TokenChunk(index=index, token_ids=[index], text=text)
            )
        yield inference_pb2.StreamChatResponse(summary=summary())

    async def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:
        self._note(request, context)
        model = inference_pb2.Model(name="tiny", max_context=1024, vocab_size=4096, chat=True, dtype="float32")
        return inference_pb2.ListModelsResponse(models=[model])


class ScriptedServer:
    """The server in a thread of its own, so blocking clients can be tested against it."""

    def __init__(self) -> None:
        self.inference = ScriptedInference()
        self.target = ""
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    async def _serve(self) -> None:
        server = grpc.aio.server(interceptors=[RimInterceptor()], options=SERVER_OPTIONS)
        inference_pb2_grpc.add_InferenceServicer_to_server(self.inference, server)
        self.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self._started.set()
        await self._stop.wait()
        await server.stop(0)

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()
