"""The life of a request in the router, top to bottom.

1. It gets an id, is counted against its tenant's limits, checked, and tokenized.
2. It boards a flight (`flight.py`): that of an equal request which is under way, or a new one of its own.
3. The flight's source (`answering.py`) asks the cache, and on a miss waits for a place at the workers (`admission.py`).
4. It is accepted: initial metadata with the id goes out. From here on it ends with a summary or a status. The decode
   tier generates (`generation.py`), over as many workers as it takes. What the client has not read yet waits, up to a
   bound.
5. The summary tells how it went; a complete answer goes to the cache in the background.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc

from baton.internal.v1 import response_cache_pb2
from baton.rpc.caller import current_caller
from baton.rpc.errors import Overloaded, QuotaExceeded, Unavailable
from baton.rpc.interceptor import adopt_request_id
from baton.rpc.service import Runtime
from baton.telemetry import tracing
from baton.v1 import inference_pb2, inference_pb2_grpc, ledger_pb2
from baton_router import admission_metrics, metrics
from baton_router.account import Account, server_timing
from baton_router.answer import Event, WholeAnswer
from baton_router.answering import Answering, Means
from baton_router.catalogue import Catalogue, Serving
from baton_router.flight import Ending, Flight, Flights, Reader
from baton_router.prompt import tokenize
from baton_router.pulse import Pulse
from baton_router.question import question_of
from baton_router.quotas import Meter, Quotas
from baton_router.record import Record
from baton_router.records import Records
from baton_router.response_cache import cache_key, digest, may_share
from baton_router.salts import Salts
from baton_router.settings import RouterSettings
from baton_router.validate import AnyRequest, ResolvedRequest, check, prompt_field, resolve

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """The public API."""

    def __init__(
        self,
        settings: RouterSettings,
        catalogue: Catalogue,
        means: Means,
        flights: Flights,
        quotas: Quotas,
        runtime: Runtime,
    ) -> None:
        self._settings = settings
        self._catalogue = catalogue
        self._means = means
        self._flights = flights
        self._quotas = quotas
        self._runtime = runtime
        self._salts = Salts(settings.salt_key())
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
        with metrics.counting("Tokenize"):
            return await self._catalogue.tokenize(request)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        """Text of token ids."""
        adopt_request_id(context)
        with metrics.counting("Detokenize"):
            return await self._catalogue.detokenize(request)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        """The models served, the default first."""
        adopt_request_id(context)
        with metrics.counting("ListModels"):
            return self._catalogue.list()

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: Context
    ) -> inference_pb2.GetModelResponse:
        """One model."""
        adopt_request_id(context)
        with metrics.counting("GetModel"):
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
        tenant = current_caller().tenant
        with self._trailers(record, context), record.closing(), self._admitted(tenant) as meter:
            deadline = self._deadline(context)
            serving = await self._catalogue.serving(request.model, deadline)
            resolved = await self._understand(request, serving, account)
            record.resolved(resolved, serving.model.name)
            meter.prompt(len(resolved.prompt_ids))
            flight, mine = self._board(record, resolved, serving, tenant)
            limit = self._settings.max_unsent_tokens if buffer else None
            reader = Reader(account, deadline, limit, joins=not resolved.original_pace)
            index = len(resolved.delivered)
            async with flight.reading(reader) as chunks:
                await flight.wait_accepted(reader)
                # Only now: writing these takes half a millisecond, in which the flight is on its way already.
                await context.send_initial_metadata((("x-request-id", request_id),))
                yield inference_pb2.StreamStart(
                    request_id=request_id,
                    model=serving.model.name,
                    seed=resolved.sampling.seed,
                    prompt_tokens=len(resolved.prompt_ids),
                )
                async for cached in chunks:
                    if resolved.original_pace and flight.ending is not None and flight.ending.stored:
                        await flight.reached(cached.since_start_us)
                    account.first_token()
                    record.chunk(len(cached.token_ids))
                    meter.answer(len(cached.token_ids))
                    account.handed_over()
                    yield inference_pb2.TokenChunk(index=index, token_ids=cached.token_ids, text=cached.text)
                    index += len(cached.token_ids)
            account.enter(ledger_pb2.KIND_OVERHEAD)
            assert flight.ending is not None, "a flight without an end raises"
            _conclude(flight.ending, summary, mine=mine)
            yield record.complete()

    async def _understand(self, request: AnyRequest, serving: Serving, account: Account) -> ResolvedRequest:
        """Check, tokenize, and fill in what is unset."""
        limits = serving.limits
        prompt = check(request, limits)
        account.enter(ledger_pb2.KIND_TOKENIZE)
        question = question_of(prompt) if request.cache_control.semantic else None
        rendered = await tokenize(prompt, serving.model, prompt_field(request), limits)
        account.enter(ledger_pb2.KIND_OVERHEAD)
        resolved = resolve(
            request,
            rendered.token_ids,
            limits,
            serving.model.defaults,
            self._salts,
            question,
            current_caller().tenant,
        )
        serving.require_worker()
        return resolved

    def _board(self, record: Record, resolved: ResolvedRequest, serving: Serving, tenant: str) -> tuple[Flight, bool]:
        """The flight that brings the answer, and whether it was started for this request."""
        key = cache_key(resolved, serving.answers, serving.model.text_digest)
        start = response_cache_pb2.JoinStart(key=key, question=resolved.question)
        shared = digest(start) if self._means.cache.enabled and may_share(resolved) else None
        flight = self._flights.boardable(shared) if shared is not None else None
        if flight is not None:
            record.coalesced(flight.request_id)
            return flight, False
        source = Answering(self._means, record, resolved, tenant, start, serving)
        return self._flights.launch(source.fly, record.request_id, shared), True

    @contextmanager
    def _trailers(self, record: Record, context: Context) -> Iterator[None]:
        """Put the ledger into the trailing metadata, and the record into the ring, however the request ends."""
        try:
            yield
        finally:
            self.records.add(record)
            context.set_trailing_metadata((("server-timing", server_timing(record.summary.ledger)),))

    @contextmanager
    def _admitted(self, tenant: str) -> Iterator[Meter]:
        """Count the request as in flight, and as its tenant's. What its workers have room for is asked later, when it
        is known that the answer is not in the cache (`answering.py`).

        Raises:
            Overloaded: there are too many.
            QuotaExceeded: its tenant has or had too many.
            Unavailable: the router is on its way out.
        """
        if self._runtime.draining.is_set():
            raise Unavailable("this router is draining")
        tenant_class = self._quotas.policy(tenant).tenant_class
        if self.in_flight >= self._settings.max_in_flight:
            admission_metrics.refused("max_in_flight", tenant_class)
            raise Overloaded(f"{self.in_flight} requests are in flight")
        try:
            with self._quotas.entered(tenant) as meter:
                self.in_flight += 1
                metrics.IN_FLIGHT.inc()
                try:
                    yield meter
                finally:
                    self.in_flight -= 1
                    metrics.IN_FLIGHT.dec()
        except QuotaExceeded as error:
            admission_metrics.refused(error.limit, tenant_class)
            tracing.set_call_attributes({"baton.shed": error.limit})
            raise

    def _deadline(self, context: Context) -> float:
        """When this router ends the request, on the event loop's clock: a little before the client's deadline, or
        after the longest a request may take. Behind the deadline gRPC has ended the call, and a status that says
        more, the ledger, and tokens on their way would not get through; decode, which is told less still, may be in
        no state to say.
        """
        left = context.time_remaining()
        if left is not None:
            left -= min(self._settings.deadline_margin_seconds / 2, left / 4)
        longest = self._settings.max_request_seconds
        return asyncio.get_running_loop().time() + (longest if left is None else min(left, longest))


def _conclude(ending: Ending, summary: inference_pb2.Summary, *, mine: bool) -> None:
    """Say how the answer ended; how it was generated is said to the one request it was generated for."""
    summary.finish_reason = ending.finish_reason
    summary.usage.CopyFrom(ending.usage)
    if ending.stored or not mine:
        summary.usage.ClearField("cached_prompt_tokens")  # of whoever it was generated for
    if ending.stored:
        summary.cache_entry = ending.cache_entry
        if ending.cache_similarity is not None:
            summary.cache_similarity = ending.cache_similarity
    if mine or ending.stored:
        summary.cache_status = ending.cache_status
    if mine:
        summary.prefill_placement = ending.prefill_placement
        summary.transport = ending.transport
        summary.migrations = ending.migrations
        summary.preemptions = ending.preemptions
