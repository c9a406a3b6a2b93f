"""The life of a request in the decode tier, top to bottom.

1. The router's request arrives; fingerprint and sampling are checked.
2. The engine reserves a KV slot for it (admission), with what its prefix cache has of it. Until then it queues; when it
   holds one, `Accepted` goes out. Here and everywhere below, silence is broken by `Progress`: what a request that never
   ends was doing is known.
3. What is missing is computed here or fetched from a prefill candidate, as costs less: the first token is streamed the
   moment it comes, the KV that is missing is written straight into the slot, verified, and committed.
4. If the prefill service is lost on the way, it is decided anew among the others and this worker, which fill the same
   slot; a token already streamed counts as part of the prompt, so nothing repeats. If its engine died computing this,
   the request is a suspect, and computed here, as is one that the router suspects: one at a time (`worker/trials.py`).
5. The engine decodes it in the running batch; tokens become text, stop strings end it, messages go to the router. A
   message carries all tokens that are there when the one before it is out; the first one never waits.
6. `Finished` says how it went. Whatever way the call ends, leaving the `async with` frees the slot: here and nowhere
   else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import ExitStack, aclosing, suppress
from typing import Any

import grpc

from baton.engine.client import EngineClient, EngineDied, RequestHandle
from baton.handoff.cost import Handoff
from baton.internal.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2
from baton.rpc.errors import BatonError, FingerprintMismatch, InvalidArgument, PoisonRequest, Unavailable, WorkerLost
from baton.rpc.interceptor import current_request_id
from baton.rpc.retry_budget import RetryBudget
from baton.rpc.service import Runtime
from baton.telemetry import tracing
from baton.text.tokenizer import Tokenizer
from baton.v1 import inference_pb2, ledger_pb2
from baton.worker.calls import Calls
from baton.worker.engine_time import TELL_SECONDS
from baton.worker.trials import Blame, Trials
from baton_decode.placement import HERE, Prompt
from baton_decode.placer import Decision, Placer
from baton_decode.prefill_client import PrefillClient, PrefillLost
from baton_decode.run import Messages, Run, StepFailed
from baton_decode.spacing import Spacing

log = logging.getLogger(__name__)


class DecodeServicer(decode_pb2_grpc.DecodeServicer):
    """Runs requests."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        prefill: PrefillClient,
        placer: Placer,
        spacing: Spacing,
        trials: Trials,
        calls: Calls,
        runtime: Runtime,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._prefill = prefill
        self._placer = placer
        self._spacing = spacing
        self._trials = trials
        self._retries = RetryBudget()
        self._calls = calls
        self._runtime = runtime

    async def Generate(
        self, request: decode_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Messages:
        """Serve one request."""
        run = Run(self._tokenizer, request)
        current_request_id.set(request.request_id)
        self._check(request, run)
        self._retries.request()
        with self._calls.track(request.request_id), ExitStack() as on_trial:
            try:
                async with self._engine.request(run.submit()) as handle:
                    for stage in (
                        run.reserve(handle),
                        self._fill(run, handle, context.time_remaining, on_trial),
                        run.stream(handle, self._spacing, self._trials),
                    ):
                        async with aclosing(stage) as messages:
                            async for message in messages:
                                yield message
            except (EngineDied, StepFailed) as error:
                raise self._lost(run, error) from error
            finally:
                if run.computed_here is not None:
                    self._placer.ended_here(run.computed_here, run.first_token_ns / 1e9)
        yield decode_pb2.GenerateResponse(finished=run.finished())

    def _lost(self, run: Run, error: EngineDied | StepFailed) -> BatonError:
        """What a request is told that its engine took along."""
        match self._trials.blame(run.trial, computed=run.computing):
            case Blame.GUILTY:
                return PoisonRequest()
            case Blame.SUSPECT:
                return WorkerLost(str(error))
            case Blame.NONE:
                return Unavailable(str(error), retry_after=0.0)

    async def _await_turn(self, run: Run, on_trial: ExitStack) -> Messages:
        """A suspect waits until no other one is on trial here."""
        run.trial = on_trial.enter_context(self._trials.suspect(len(run.request.delivered_token_ids)))
        run.timeline.enter(ledger_pb2.KIND_QUEUE)
        while not run.trial.turn.is_set():
            with suppress(TimeoutError):  # not wait_for: Python 3.11's loses a cancellation that comes with the turn
                async with asyncio.timeout(TELL_SECONDS):
                    await run.trial.turn.wait()
            yield run.tell(run.timeline.timing())
        run.timeline.enter(ledger_pb2.KIND_OVERHEAD)

    async def _fill(
        self, run: Run, handle: RequestHandle, remaining: Callable[[], float | None], on_trial: ExitStack
    ) -> Messages:
        """Get the KV into the slot: from a prefill worker that lives to give all of it, or computed here."""
        candidates = list(run.request.prefill_candidates)
        suspect = run.request.suspect
        while not run.answer.finished:
            if suspect:
                candidates = []  # no second engine is risked for it
                async with aclosing(self._await_turn(run, on_trial)) as messages:
                    async for message in messages:
                        yield message
            decision = self._placer.decide(Prompt(run.missing, run.reused), candidates)
            if decision.target == HERE:
                run.placement = inference_pb2.PLACEMENT_LOCAL
                run.computed_here = decision
                self._placer.computing_here(decision)
                handle.compute_here(run.generated)
                run.computing = True
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
                suspect = error.crashed
                if not self._retries.spend():
                    candidates = []

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
                            run.computing = True
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
