"""The life of a request in the router, top to bottom.

1. It gets an id, is admitted, checked, and tokenized.
2. It is accepted: initial metadata with the id goes out. From here on it ends with a summary or a status.
3. If it is deterministic the response cache is asked; a hit is replayed.
4. On a miss the decode tier runs it (`generation.py`), over as many workers as it takes. What the client has not read
   yet waits in a bounded buffer.
5. The summary tells how it went, and a complete answer goes to the cache in the background.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc

from baton.internal.v1 import response_cache_pb2
from baton.rpc.errors import NotFound, Overloaded, Unavailable
from baton.rpc.interceptor import adopt_request_id
from baton.rpc.service import Runtime
from baton.text.model import TextModel
from baton.v1 import inference_pb2, inference_pb2_grpc, ledger_pb2
from baton_router import metrics
from baton_router.account import Account, server_timing
from baton_router.answer import Event, WholeAnswer, replayed
from baton_router.catalogue import Catalogue, Serving
from baton_router.generation import Generation, Tier
from baton_router.prompt import tokenize
from baton_router.pulse import Pulse
from baton_router.record import Record
from baton_router.records import Records
from baton_router.response_cache import ResponseCache, cache_key, may_read, may_write
from baton_router.settings import RouterSettings
from baton_router.unsent import buffered
from baton_router.validate import AnyRequest, ResolvedRequest, check, prompt_field, resolve

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """The public API."""

    def __init__(
        self,
        settings: RouterSettings,
        model: TextModel,
        catalogue: Catalogue,
        tier: Tier,
        cache: ResponseCache,
        runtime: Runtime,
    ) -> None:
        self._settings = settings
        self._model = model
        self._catalogue = catalogue
        self._tier = tier
        self._cache = cache
        self._runtime = runtime
        self.in_flight = 0
        self.records = Records(settings.kept_records)
        self.pulse = Pulse()

    async def StreamGenerate(
        self, request: inference_pb2.StreamGenerateRequest, context: Context
    ) -> AsyncGenerator[inference_pb2.StreamGenerateResponse, None]:
        """Continue a prompt, token by token."""
        async with aclosing(self._serve("StreamGenerate", request, context, buffer=True)) as events:
            async for event in events:
                if isinstance(event, inference_pb2.TokenChunk):
                    yield inference_pb2.StreamGenerateResponse(chunk=event)
                elif isinstance(event, inference_pb2.StreamStart):
                    yield inference_pb2.StreamGenerateResponse(start=event)
                else:
                    yield inference_pb2.StreamGenerateResponse(summary=event)

    async def StreamChat(
        self, request: inference_pb2.StreamChatRequest, context: Context
    ) -> AsyncGenerator[inference_pb2.StreamChatResponse, None]:
        """Answer a conversation, token by token."""
        async with aclosing(self._serve("StreamChat", request, context, buffer=True)) as events:
            async for event in events:
                if isinstance(event, inference_pb2.TokenChunk):
                    yield inference_pb2.StreamChatResponse(chunk=event)
                elif isinstance(event, inference_pb2.StreamStart):
                    yield inference_pb2.StreamChatResponse(start=event)
                else:
                    yield inference_pb2.StreamChatResponse(summary=event)

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        """Continue a prompt; the whole answer at once."""
        return (await self._whole("Generate", request, context)).generated()

    async def Chat(self, request: inference_pb2.ChatRequest, context: Context) -> inference_pb2.ChatResponse:
        """Answer a conversation; the whole answer at once."""
        return (await self._whole("Chat", request, context)).said()

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        """Token ids of a text or a conversation."""
        adopt_request_id(context)
        return await self._catalogue.tokenize(request)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        """Text of token ids."""
        adopt_request_id(context)
        return await self._catalogue.detokenize(request)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        """The models served: one."""
        adopt_request_id(context)
        return inference_pb2.ListModelsResponse(models=[self._catalogue.model()])

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: Context
    ) -> inference_pb2.GetModelResponse:
        """One model."""
        adopt_request_id(context)
        return self._catalogue.get_model(request)

    async def _whole(self, method: str, request: AnyRequest, context: Context) -> WholeAnswer:
        """The same life, collected. The answer is bounded by the context, so it needs no other bound."""
        answer = WholeAnswer()
        async with aclosing(self._serve(method, request, context, buffer=False)) as events:
            async for event in events:
                answer.take(event)
        return answer

    async def _serve(
        self, method: str, request: AnyRequest, context: Context, *, buffer: bool
    ) -> AsyncGenerator[Event, None]:
        """One request, from its receipt to its summary."""
        request_id = adopt_request_id(context)
        record = Record(request_id, method, self.pulse)
        account, summary = record.account, record.summary
        with self._trailers(record, context), record.closing(), self._admitted():
            deadline = self._deadline(context)
            serving = await self._catalogue.serving(deadline)
            resolved = await self._understand(request, serving, account)
            record.resolved(resolved, self._model.name)
            await context.send_initial_metadata((("x-request-id", request_id),))
            yield inference_pb2.StreamStart(
                request_id=request_id,
                model=self._model.name,
                seed=resolved.sampling.seed,
                prompt_tokens=len(resolved.prompt_ids),
            )
            key = cache_key(resolved, serving.fingerprint, self._model.text_digest)
            cached = await self._lookup(resolved, key, summary, account)
            if cached is not None:
                for chunk in replayed(cached):
                    account.first_token()
                    account.enter(ledger_pb2.KIND_STALL)
                    record.chunk(len(chunk.token_ids))
                    account.handed_over()
                    yield chunk
                account.enter(ledger_pb2.KIND_OVERHEAD)
                summary.finish_reason = cached.finish_reason
                summary.usage.CopyFrom(cached.usage)
            else:
                answer = WholeAnswer()
                generation = Generation(
                    self._tier, request_id, resolved, serving.fingerprint, serving.eos_token_ids, deadline, account
                )
                async with aclosing(self._generate(generation, record, buffer=buffer)) as chunks:
                    async for chunk in chunks:
                        answer.take(chunk)
                        record.chunk(len(chunk.token_ids))
                        account.handed_over()
                        yield chunk
                self._conclude(generation, summary)
                if self._cache.enabled and may_write(resolved):
                    stored = answer.cached(summary.finish_reason, summary.usage)
                    self._cache.fill(key, stored, resolved.cache_ttl_seconds)
            yield record.complete()

    async def _understand(self, request: AnyRequest, serving: Serving, account: Account) -> ResolvedRequest:
        """Check, tokenize, and fill in what is unset."""
        limits = serving.limits
        prompt = check(request, limits)
        account.enter(ledger_pb2.KIND_TOKENIZE)
        rendered = await tokenize(prompt, self._model, prompt_field(request), limits)
        account.enter(ledger_pb2.KIND_OVERHEAD)
        resolved = resolve(request, rendered.token_ids, limits, self._model.defaults)
        serving.require_worker()
        return resolved

    async def _lookup(
        self,
        resolved: ResolvedRequest,
        key: response_cache_pb2.CacheKey,
        summary: inference_pb2.Summary,
        account: Account,
    ) -> response_cache_pb2.CachedAnswer | None:
        """Ask the cache, if it may be asked; says in the summary what came of it."""
        summary.cache_status = inference_pb2.CACHE_STATUS_BYPASS
        answer = None
        if self._cache.enabled and may_read(resolved):
            summary.cache_status = inference_pb2.CACHE_STATUS_MISS
            account.enter(ledger_pb2.KIND_NETWORK, ledger_pb2.HOP_CACHE)
            found = await self._cache.lookup(key)
            if found is not None:
                account.book(ledger_pb2.HOP_CACHE, found.timing)
            account.enter(ledger_pb2.KIND_OVERHEAD)
            if found is not None and found.hit:
                summary.cache_status = inference_pb2.CACHE_STATUS_HIT
                answer = found.answer
        if answer is None and resolved.cache_mode == inference_pb2.CACHE_MODE_ONLY:
            raise NotFound("the answer is not in the response cache")
        return answer

    async def _generate(
        self, generation: Generation, record: Record, *, buffer: bool
    ) -> AsyncGenerator[inference_pb2.TokenChunk, None]:
        """The generation's chunks, at the client's pace but never more than the buffer behind."""
        source = _then_stall(generation, record)
        if buffer:
            async with buffered(source, self._settings.max_unsent_tokens) as unsent:
                async for chunk in unsent:
                    yield chunk
        else:
            async with aclosing(source):
                async for chunk in source:
                    yield chunk
        record.account.enter(ledger_pb2.KIND_OVERHEAD)

    def _conclude(self, generation: Generation, summary: inference_pb2.Summary) -> None:
        finished = generation.finished
        assert finished is not None, "a generation without an end raises"
        summary.finish_reason = finished.finish_reason
        summary.usage.CopyFrom(finished.usage)
        summary.prefill_placement = finished.prefill_placement
        summary.transport = finished.transport
        summary.migrations = generation.migrations
        summary.preemptions = finished.preemptions

    @contextmanager
    def _trailers(self, record: Record, context: Context) -> Iterator[None]:
        """Put the ledger into the trailing metadata, and the record into the ring, however the request ends."""
        try:
            yield
        finally:
            self.records.add(record)
            context.set_trailing_metadata((("server-timing", server_timing(record.summary.ledger)),))

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """Count the request as in flight.

        Raises:
            Overloaded: there are too many.
            Unavailable: the router is on its way out.
        """
        if self._runtime.draining.is_set():
            raise Unavailable("this router is draining")
        if self.in_flight >= self._settings.max_in_flight:
            raise Overloaded(f"{self.in_flight} requests are in flight")
        self.in_flight += 1
        metrics.IN_FLIGHT.inc()
        try:
            yield
        finally:
            self.in_flight -= 1
            metrics.IN_FLIGHT.dec()

    def _deadline(self, context: Context) -> float:
        """On the event loop's clock: the client's, or the longest a request may take."""
        left = context.time_remaining()
        longest = self._settings.max_request_seconds
        return asyncio.get_running_loop().time() + (longest if left is None else min(left, longest))


async def _then_stall(generation: Generation, record: Record) -> AsyncGenerator[inference_pb2.TokenChunk, None]:
    """The chunks; once the worker is done, what is left of the request's time is the client's reading.

    Before that a slow client costs nothing: the worker computes meanwhile.
    """
    try:
        async with aclosing(generation.chunks()) as chunks:
            async for chunk in chunks:
                record.arrived(len(chunk.token_ids))
                yield chunk
    finally:
        record.account.enter(ledger_pb2.KIND_STALL)  # a full buffer ends this too, and its error waits for the reader
