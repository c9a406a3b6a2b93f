"""The life of a request in the decode tier, top to bottom.

1. The router's request arrives; fingerprint and sampling are checked.
2. The engine reserves a KV slot for it (admission), with what its prefix cache has of it. Until then it queues; when it
   holds one, `Accepted` goes out. Here and everywhere below, silence is broken by `Progress`: what a request that never
   ends was doing is known.
3. What is missing is computed here or fetched from a prefill candidate, as costs less: the first token is streamed the
   moment it comes, the KV that is missing is written straight into the slot, verified, and committed.
4. If the prefill service is lost on the way, it is decided anew among the others and this worker, which fill the same
   slot; a token already streamed counts as part of the prompt, so nothing repeats.
5. The engine decodes it in the running batch; tokens become text, stop strings end it, messages go to the router. A
   message carries all tokens that are there when the one before it is out; the first one never waits.
6. `Finished` says how it went. Whatever way the call ends, leaving the `async with` frees the slot: here and nowhere
   else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import grpc

from baton.engine.client import EngineClient, EngineDied, RequestHandle
from baton.engine.messages import Failed, FinishReason, Output, Progress, Reserved, Role, Submit
from baton.handoff.cost import Handoff
from baton.internal.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, timing_pb2
from baton.rpc.errors import FingerprintMismatch, InvalidArgument, Unavailable, WorkerLost
from baton.rpc.interceptor import current_request_id
from baton.rpc.service import Runtime
from baton.telemetry import tracing
from baton.telemetry.ledger import Timeline
from baton.text.tokenizer import Tokenizer
from baton.v1 import inference_pb2, ledger_pb2, sampling_pb2
from baton.worker.calls import Calls
from baton.worker.engine import QUEUE_SECONDS, engine_error
from baton.worker.engine_time import TELL_SECONDS, EngineTime, trace_chunks
from baton.worker.sampling import FINISH_REASONS, engine_sampling
from baton_decode.answer import Answer
from baton_decode.pace import Pace
from baton_decode.placement import HERE, Prompt
from baton_decode.placer import Decision, Placer
from baton_decode.prefill_client import PrefillClient, PrefillLost
from baton_decode.spacing import LONGEST, Spacing

log = logging.getLogger(__name__)

Messages = AsyncGenerator[decode_pb2.GenerateResponse, None]


class DecodeServicer(decode_pb2_grpc.DecodeServicer):
    """Runs requests."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        prefill: PrefillClient,
        placer: Placer,
        spacing: Spacing,
        calls: Calls,
        runtime: Runtime,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._prefill = prefill
        self._placer = placer
        self._spacing = spacing
        self._calls = calls
        self._runtime = runtime

    async def Generate(
        self, request: decode_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Messages:
        """Serve one request."""
        run = Run(self._tokenizer, request)
        current_request_id.set(request.request_id)
        self._check(request, run)
        with self._calls.track(request.request_id):
            try:
                async with self._engine.request(run.submit()) as handle:
                    for stage in (
                        run.reserve(handle),
                        self._fill(run, handle, context.time_remaining),
                        run.stream(handle, self._spacing),
                    ):
                        async with aclosing(stage) as messages:
                            async for message in messages:
                                yield message
            except EngineDied as error:
                raise WorkerLost(str(error)) from error
            finally:
                if run.computed_here is not None:
                    self._placer.ended_here(run.computed_here, run.first_token_ns / 1e9)
        yield decode_pb2.GenerateResponse(finished=run.finished())

    async def _fill(self, run: Run, handle: RequestHandle, remaining: Callable[[], float | None]) -> Messages:
        """Get the KV into the slot: from a prefill worker that lives to give all of it, or computed here."""
        candidates = list(run.request.prefill_candidates)
        while not run.answer.finished:
            decision = self._placer.decide(Prompt(run.missing, run.reused), candidates)
            if decision.target == HERE:
                run.placement = inference_pb2.PLACEMENT_LOCAL
                run.computed_here = decision
                self._placer.computing_here(decision)
                handle.compute_here(run.generated)
                return
            candidates = [candidate for candidate in candidates if candidate.target != decision.target]
            try:
                async with aclosing(self._fetch(run, handle, decision, remaining())) as messages:
                    async for message in messages:
                        yield message
                return
            except PrefillLost as error:
                # The slot stays ours, and what was in it; what was written into it so far counts for nothing.
                log.warning("prefill lost: %s", error, extra={"request_id": run.request.request_id})

    async def _fetch(self, run: Run, handle: RequestHandle, decision: Decision, timeout: float | None) -> Messages:
        """Get the prompt's KV from a prefill service; streams the first token, then commits the KV."""
        run.timeline.enter(ledger_pb2.KIND_NETWORK, ledger_pb2.HOP_PREFILL)
        first: prefill_pb2.FirstToken | None = None
        target, handoff = decision.target, Handoff()
        with self._placer.asking(decision) as asking, tracing.phase("kv receive") as span:
            fetching = self._prefill.fetch(target, run.request, run.token_ids, run.slot, run.reused, timeout, handoff)
            try:
                async with aclosing(fetching) as messages:
                    async for message in messages:
                        if isinstance(message, prefill_pb2.PrefillProgress):
                            so_far = run.timeline.copy()
                            so_far.book(ledger_pb2.HOP_PREFILL, message.timing)
                            yield run.tell(so_far.timing())
                        elif isinstance(message, prefill_pb2.FirstToken):
                            first = message
                            asking.first_token(first.timing)
                            run.cached = max(run.cached, first.cached_tokens)
                            run.timeline.hidden_transfer_ns += handoff.hidden_ns
                            run.timeline.book(ledger_pb2.HOP_PREFILL, first.timing)
                            run.timeline.carve(
                                (ledger_pb2.HOP_PREFILL, ledger_pb2.KIND_NETWORK),
                                {(ledger_pb2.HOP_DECODE, ledger_pb2.KIND_TRANSFER): handoff.behind_ns},
                            )
                            run.placement = inference_pb2.PLACEMENT_REMOTE
                            tokens = run.take([first.token_id], first.finish_reason)
                            run.timeline.enter(ledger_pb2.KIND_TRANSFER)
                            yield tokens
                        elif first is None:
                            raise PrefillLost(f"{target} sent no first token")
                        else:
                            run.transport = handoff.transport
                            handle.commit(run.generated)
            except PrefillLost:
                if first is None:
                    run.timeline.book(ledger_pb2.HOP_PREFILL, handoff.progress)  # what is known of its time
                raise
            finally:
                span.set(handoff.attributes())
                if handoff.done_ns:
                    asking.moved(handoff.bytes, handoff.hidden_ns + handoff.exposed_ns)

    def _check(self, request: decode_pb2.GenerateRequest, run: Run) -> None:
        if self._runtime.draining.is_set():
            raise Unavailable("this decode worker is draining")
        if request.model_fingerprint != self._engine.spec.fingerprint:
            raise FingerprintMismatch(
                f"the request is for model {request.model_fingerprint}, not {self._engine.spec.fingerprint}"
            )
        if not request.token_ids:
            raise InvalidArgument("token_ids", "must not be empty")
        if len(run.answer.token_ids) >= request.sampling.max_tokens:
            raise InvalidArgument("delivered_token_ids", "the answer is already max_tokens long")


class Run:
    """One request's state in this tier: the answer so far, its ledger, and where its prompt was computed.

    Attributes:
        slot: its own, once it is reserved.
        reused: tokens [0, reused) lay in the slot when it was.
        cached: tokens [0, cached) were computed for none of this, here or in the prefill tier.
        computed_here: the decision that the prompt, or what is missing of it, is computed here.
        first_token_ns: when the first token of this worker was known, monotonic; 0 before.
    """

    def __init__(self, tokenizer: Tokenizer, request: decode_pb2.GenerateRequest) -> None:
        self.timeline = Timeline(ledger_pb2.HOP_DECODE)
        self.request = request
        self.answer = Answer(tokenizer, request)
        self._delivered = len(self.answer.token_ids)
        self.placement = inference_pb2.PLACEMENT_UNSPECIFIED
        self.transport: inference_pb2.Transport.ValueType = inference_pb2.TRANSPORT_UNSPECIFIED
        self.preemptions = 0
        self._sampling = engine_sampling(request.sampling)
        self.slot = -1
        self.reused = self.cached = 0
        self.computed_here: Decision | None = None
        self.first_token_ns = 0
        self._told_ns = time.monotonic_ns()  # when the router last got this tier's account
        self._streamed = False

    @property
    def generated(self) -> list[int]:
        """Tokens generated since the engine got the request."""
        return self.answer.token_ids[self._delivered :]

    @property
    def token_ids(self) -> list[int]:
        """Prompt and answer so far: what must be in the KV cache for the next token."""
        return [*self.request.token_ids, *self.answer.token_ids]

    @property
    def missing(self) -> int:
        """Tokens whose KV is not in the slot."""
        return len(self.request.token_ids) + len(self.answer.token_ids) - self.reused

    def submit(self) -> Submit:
        """The engine request that goes on from here."""
        return Submit(
            request_id=self.request.request_id,
            role=Role.RECEIVE,
            token_ids=self.token_ids,
            num_prompt_tokens=len(self.request.token_ids),
            sampling=self._sampling,
            priority=self.request.priority,
            prefix_cache=not self.request.bypass_prefix_cache,
            cache_salt=self.request.cache_salt,
        )

    async def reserve(self, handle: RequestHandle) -> Messages:
        """Wait for KV memory: from then on `slot` is ours."""
        self.timeline.enter(ledger_pb2.KIND_QUEUE)
        with tracing.phase("queue"):
            while (event := await handle.next(TELL_SECONDS)) is None:
                yield self.tell(self.timeline.timing())
        self.timeline.enter(ledger_pb2.KIND_OVERHEAD)
        if isinstance(event, Failed):
            raise engine_error(event)
        assert isinstance(event, Reserved), event
        QUEUE_SECONDS.observe(event.queue_ns / 1e9)
        self.slot = event.slot
        self.reused = self.cached = event.cached_tokens
        tracing.set_call_attributes({"baton.prefix_cache.hit_tokens": event.cached_tokens})
        yield decode_pb2.GenerateResponse(accepted=decode_pb2.Accepted(timing=self.timeline.timing()))

    async def stream(self, handle: RequestHandle, spacing: Spacing) -> Messages:
        """The engine's tokens until the answer ends."""
        engine_time = EngineTime(self.timeline, ledger_pb2.HOP_DECODE)
        pace = Pace()
        gather = 0.0
        with tracing.phase("decode") as span, spacing.streaming():
            try:
                while not self.answer.finished:
                    with engine_time.waiting():
                        events = await handle.next_all(LONGEST if gather else TELL_SECONDS, gather)
                    gather = 0.0
                    came = [event for event in events if isinstance(event, Progress | Output)]
                    for event in came:
                        trace_chunks(event)
                    if came:
                        engine_time.book(came[-1])  # its sums hold the others'
                    if outputs := [event for event in came if isinstance(event, Output)]:
                        token_ids = [token_id for output in outputs for token_id in output.token_ids]
                        pace.took(len(token_ids), time.monotonic_ns())
                        self.preemptions = outputs[-1].preemptions
                        yield self.take(token_ids, _finish_reason(outputs[-1].finish_reason))
                        gather = spacing.seconds()
                    elif self._due(time.monotonic_ns()):
                        yield self.tell(engine_time.so_far())
                    if events and isinstance(events[-1], Failed) and not self.answer.finished:
                        raise engine_error(events[-1])
            finally:
                span.set({**pace.attributes(), **engine_time.attributes(), "baton.preemptions": self.preemptions})

    def take(
        self, token_ids: list[int], finish_reason: sampling_pb2.FinishReason.ValueType
    ) -> decode_pb2.GenerateResponse:
        """Tokens into the answer, and the message that streams them."""
        self.timeline.enter(ledger_pb2.KIND_TOKENIZE)
        tokens = self.answer.take(token_ids, finish_reason)
        self.timeline.enter(ledger_pb2.KIND_OVERHEAD)
        now = time.monotonic_ns()
        if token_ids:
            self.first_token_ns = self.first_token_ns or now
        if tokens.token_ids and (not self._streamed or self._due(now)):
            self._streamed, self._told_ns = True, now
            tokens.timing.CopyFrom(self.timeline.timing())
        return decode_pb2.GenerateResponse(tokens=tokens)

    def tell(self, timing: timing_pb2.HopTiming) -> decode_pb2.GenerateResponse:
        """The message that tells the router how the time passed while there was nothing else to tell."""
        self._told_ns = time.monotonic_ns()
        return decode_pb2.GenerateResponse(progress=decode_pb2.Progress(timing=timing))

    def _due(self, now_ns: int) -> bool:
        return now_ns - self._told_ns >= TELL_SECONDS * 1e9

    def finished(self) -> decode_pb2.Finished:
        """How the request went."""
        return decode_pb2.Finished(
            finish_reason=self.answer.finish_reason,
            usage=sampling_pb2.Usage(
                prompt_tokens=len(self.request.token_ids),
                cached_prompt_tokens=min(self.cached, len(self.request.token_ids)),
                completion_tokens=len(self.answer.token_ids),
            ),
            prefill_placement=self.placement,
            transport=self.transport,
            timing=self.timeline.timing(),
            preemptions=self.preemptions,
        )


def _finish_reason(reason: FinishReason | None) -> sampling_pb2.FinishReason.ValueType:
    return sampling_pb2.FINISH_REASON_UNSPECIFIED if reason is None else FINISH_REASONS[reason]
