"""One request's state in the decode tier."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

from baton.engine.client import RequestHandle
from baton.engine.messages import Failed, FailureReason, FinishReason, Output, Progress, Reserved, Role, Submit
from baton.internal.v1 import decode_pb2, timing_pb2
from baton.telemetry import tracing
from baton.telemetry.ledger import Timeline
from baton.text.tokenizer import Tokenizer
from baton.v1 import inference_pb2, ledger_pb2, sampling_pb2
from baton.worker.engine import QUEUE_SECONDS, engine_error
from baton.worker.engine_time import TELL_SECONDS, EngineTime, trace_chunks
from baton.worker.sampling import FINISH_REASONS, engine_sampling
from baton.worker.trials import Trial, Trials
from baton_decode.answer import Answer
from baton_decode.pace import Pace
from baton_decode.placer import Decision
from baton_decode.spacing import LONGEST, Spacing

Messages = AsyncGenerator[decode_pb2.GenerateResponse, None]


class StepFailed(Exception):
    """The engine failed a step of this request's, and all others in it."""


class Run:
    """One request's state in this tier: the answer so far, its ledger, and where its prompt was computed.

    Attributes:
        slot: its own, once it is reserved.
        reused: tokens [0, reused) lay in the slot when it was.
        cached: tokens [0, cached) were computed for none of this, here or in the prefill tier.
        computed_here: the decision that the prompt, or what is missing of it, is computed here.
        computing: the engine here may have begun with it.
        trial: its own, if it is suspected of breaking engines.
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
        self.computing = False
        self.trial: Trial | None = None
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

    async def stream(self, handle: RequestHandle, spacing: Spacing, trials: Trials) -> Messages:
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
                        if self.trial is not None:
                            trials.got(self.trial, len(token_ids), finished=outputs[-1].finish_reason is not None)
                        yield self.take(token_ids, _finish_reason(outputs[-1].finish_reason))
                        gather = spacing.seconds()
                    elif self._due(time.monotonic_ns()):
                        yield self.tell(engine_time.so_far())
                    if events and isinstance(failed := events[-1], Failed) and not self.answer.finished:
                        if failed.reason is FailureReason.INTERNAL:
                            raise StepFailed(failed.message)
                        raise engine_error(failed)
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
