"""The engine: commands in, steps, events out. Synchronous, single-threaded, and steppable in process.

A step is: schedule, run, sample, tell. All memory a request holds comes back in `_free`, here and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from baton.engine.admission import refusal
from baton.engine.config import EngineConfig
from baton.engine.layout import ModelSpec, PoolLayout
from baton.engine.loader import LoadedModel, OnProgress, load
from baton.engine.messages import (
    Command,
    Commit,
    ComputeHere,
    DebugState,
    Event,
    Failed,
    FailureReason,
    Inspect,
    KvReady,
    Output,
    Progress,
    Ready,
    Release,
    Reserved,
    Role,
    StepReport,
    Stop,
    Submit,
)
from baton.engine.pool import Pool
from baton.engine.request import Request, State
from baton.engine.runner import Runner
from baton.engine.sampler import InvalidRows, SampleRow, sample
from baton.engine.scheduler import Limits, Plan, Scheduler, Work

Emit = Callable[[Sequence[Event]], None]


class Engine:
    """Serves one model.

    Args:
        config: sizes and limits.
        model: loaded.
        emit: takes events, in order, some of them in the middle of a step.
        memory_fd: file the KV pool lies in; -1: an own one.
        clock: nanoseconds, monotonic.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: LoadedModel,
        emit: Emit,
        memory_fd: int = -1,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.spec: ModelSpec = model.spec
        slot_tokens = config.slot_tokens or min(self.spec.max_context, 2048)
        self.layout = PoolLayout.build(self.spec.layers, self.spec.dtype, config.num_slots, slot_tokens)
        blocks = (config.capacity_tokens or config.num_slots * slot_tokens) // config.block_tokens
        limits = Limits(config.step_tokens, config.block_tokens, blocks, int(config.aging_seconds * 1e9))
        self.capacity_tokens = blocks * config.block_tokens
        self.longest = min(slot_tokens, self.spec.max_context, self.capacity_tokens)  # tokens of one request
        self.pool = Pool(self.layout, self.capacity_tokens * self.layout.bytes_per_token, memory_fd)
        self.scheduler = Scheduler(limits, config.num_slots)
        self.runner = Runner(model, self.pool)
        self.runner.self_test()
        self.stopped = False
        self._max_waiting = config.max_waiting
        self._requests: dict[str, Request] = {}
        self._emit = emit
        self._clock = clock
        self._sequence = 0
        self._steps = 0
        self._told_idle = True

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        emit: Emit,
        memory_fd: int = -1,
        on_progress: OnProgress = lambda stage, fraction: None,
    ) -> Engine:
        """Load the model and build the engine.

        Raises:
            UnsupportedModel: the model cannot be served.
        """
        model = load(config, on_progress)
        on_progress("self-test", 0.0)
        return cls(config, model, emit, memory_fd)

    def ready(self, pid: int) -> Ready:
        """What a front must know to begin."""
        return Ready(
            spec=self.spec,
            layout=self.layout,
            capacity_tokens=self.capacity_tokens,
            max_context=self.longest,
            pid=pid,
        )

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something."""
        return self.scheduler.has_work(self._clock())

    def handle(self, command: Command) -> None:
        """Take one command."""
        match command:
            case Submit():
                self._submit(command)
            case Commit():
                self._commit(command)
            case ComputeHere():
                self._compute_here(command)
            case Release():
                if (request := self._requests.get(command.request_id)) is not None:
                    self._free(request)
            case Inspect():
                self._emit([self.debug_state(command.token)])
            case Stop():
                self.stopped = True

    def step(self) -> None:
        """One step: every decoding request gets a token, prompts advance by the rest of the token budget."""
        started = self._clock()
        plan = self.scheduler.schedule(started)
        for request, slot in plan.preempted.items():
            self._release(request, slot, clean=False)
        self._tell_reserved(plan, started)
        outputs: list[Event] = []
        if plan.work:
            outputs = self._compute(plan, started)
        self._steps += 1
        self._emit([*outputs, self._report(plan, self._clock() - started)])
        self._told_idle = False

    def tell_idle(self) -> None:
        """Report once that there is nothing to do."""
        if not self._told_idle:
            self._told_idle = True
            self._emit([self._report(Plan(), 0)])

    def debug_state(self, token: int = 0) -> DebugState:
        """What the engine holds."""
        return DebugState(
            token=token,
            requests=list(self._requests),
            free_slots=self.scheduler.free_slots,
            total_slots=self.scheduler.num_slots,
            used_tokens=self.scheduler.used_blocks * self.scheduler.limits.block_tokens,
            capacity_tokens=self.capacity_tokens,
            steps=self._steps,
        )

    # ------------------------------------------------------------------------------------------ commands

    def _submit(self, command: Submit) -> None:
        refused = refusal(
            command,
            vocab_size=self.spec.vocab_size,
            longest=self.longest,
            known=command.request_id in self._requests,
            waiting=len(self.scheduler.waiting),
            max_waiting=self._max_waiting,
        )
        if refused is not None:
            self._emit([Failed(command.request_id, *refused)])
            return
        now = self._clock()
        stops = command.sampling.stop_token_ids
        if not command.sampling.ignore_eos:
            stops += self.spec.eos_token_ids
        request = Request(
            request_id=command.request_id,
            role=command.role,
            tokens=list(command.token_ids),
            num_prompt=command.num_prompt_tokens,
            sampling=command.sampling,
            stop_ids=stops,
            priority=command.priority,
            start_token=command.start_token,
            arrival_ns=now,
            sequence=self._sequence,
            since_ns=now,
        )
        self._sequence += 1
        self._requests[request.request_id] = request
        self.scheduler.submit(request)

    def _commit(self, command: Commit) -> None:
        request = self._reserved(command.request_id)
        if request is None:
            return
        if not self._continue(request, command.token_ids):
            return
        request.computed = len(request.tokens) - 1
        self._end_if_over(request)

    def _compute_here(self, command: ComputeHere) -> None:
        request = self._reserved(command.request_id)
        if request is not None and self._continue(request, command.token_ids) and command.token_ids:
            self._end_if_over(request)

    def _end_if_over(self, request: Request) -> None:
        """The last token, generated elsewhere, may have ended it."""
        if (reason := request.finish_reason(self.longest)) is not None:
            output = Output(
                request_id=request.request_id, index=request.num_generated, token_ids=[], finish_reason=reason
            )
            self._free(request)
            self._emit([output])

    def _continue(self, request: Request, token_ids: Sequence[int]) -> bool:
        """A reserved request runs, after tokens generated elsewhere; False: they are impossible, and it failed."""
        if any(not 0 <= token < self.spec.vocab_size for token in token_ids):
            self._emit([self._fail(request, "a token id generated elsewhere is outside the vocabulary")])
            return False
        if len(request.tokens) + len(token_ids) > self.longest:
            self._emit([self._fail(request, "more tokens were generated elsewhere than the context holds")])
            return False
        request.tokens += token_ids
        request.state = State.RUNNING
        request.since_ns = self._clock()
        return True

    def _reserved(self, request_id: str) -> Request | None:
        request = self._requests.get(request_id)
        return request if request is not None and request.state is State.RESERVED else None

    # ---------------------------------------------------------------------------------------------- step

    def _tell_reserved(self, plan: Plan, now: int) -> None:
        reserved = [request for request in plan.admitted if request.state is State.RESERVED]
        for request in reserved:
            self.pool.touch(request.slot, len(request.tokens))
        if reserved:
            self._emit([Reserved(r.request_id, r.slot, now - r.arrival_ns) for r in reserved])

    def _compute(self, plan: Plan, started: int) -> list[Event]:
        """Run and sample; returns what to tell."""
        try:
            requests, logits = self.runner.run(plan.work, lambda layer: self._tell_ready(plan.work, layer))
        except RuntimeError as error:  # what torch raises: out of memory, shapes a kernel does not take
            return [self._fail(work.request, f"the step failed: {error}") for work in plan.work]
        for work in plan.work:
            work.request.computed += work.count
        rows = [_row(request) for request in requests]
        events: list[Event] = []
        try:
            tokens = sample(logits, rows)
        except InvalidRows as error:
            events += [self._fail(requests[row], str(error)) for row in error.rows]
            kept = [row for row in range(len(rows)) if row not in error.rows]
            requests = [requests[row] for row in kept]
            tokens = sample(logits[kept], [rows[row] for row in kept])
        ended = self._clock()
        for work in plan.work:
            work.request.served(started, ended, 0 if work.decodes else work.count)
        events += [_progress(work.request) for work in plan.work if not work.samples]
        events += [self._advance(request, token) for request, token in zip(requests, tokens, strict=True)]
        return events

    def _tell_ready(self, work: Sequence[Work], layer: int) -> None:
        """Keys and values of a layer are there: those of prompts computed for others may leave."""
        ready = [
            KvReady(w.request.request_id, w.request.slot, layer, first, w.start + w.count)
            for w in work
            if w.request.role is Role.PREFILL and (first := max(w.start, w.request.start_token)) < w.start + w.count
        ]
        if ready:
            self._emit(ready)

    def _advance(self, request: Request, token: int) -> Output:
        """Give a request its next token."""
        index = request.num_generated
        request.proven = request.computed
        request.tokens.append(token)
        reason = request.finish_reason(self.longest)
        output = Output(
            request_id=request.request_id,
            index=index,
            token_ids=[token],
            finish_reason=reason,
            compute_ns=request.compute_ns,
            queue_ns=request.queue_ns,
            preemptions=request.preemptions,
            chunks=request.untold_chunks(),
        )
        if request.role is Role.PREFILL:
            request.state = State.HELD
        elif reason is not None:
            self._free(request)
        return output

    def _fail(self, request: Request, message: str) -> Failed:
        self._free(request, clean=False)
        return Failed(request.request_id, FailureReason.INTERNAL, message)

    def _free(self, request: Request, *, clean: bool = True) -> None:
        """Take everything back. What is not known to be finite is wiped.

        It is known once a token was sampled after it, for NaN in sight of that token's row would have failed it. Where
        all was computed here, NaN of an earlier layer is in the last one's keys too, so that only its sight counts.
        """
        self._told_idle = False
        slot = request.slot
        layers = self.spec.layers if request.role is Role.RECEIVE else self.spec.layers[-1:]
        sight = min(layer.window or layer.chunk or self.layout.slot_tokens for layer in layers)
        known = 0 < request.computed == request.proven <= sight
        self.scheduler.free(request)
        del self._requests[request.request_id]
        if slot >= 0:
            self._release(request, slot, clean=clean and known)

    def _release(self, request: Request, slot: int, *, clean: bool) -> None:
        if not clean and request.role is Role.RECEIVE:
            self.pool.touch(slot, self.layout.slot_tokens)  # the front may have written behind the request's tokens
        self.pool.release(slot, clean=clean)

    def _report(self, plan: Plan, duration_ns: int) -> StepReport:
        used = self.scheduler.used_blocks * self.scheduler.limits.block_tokens
        return StepReport(
            step=self._steps,
            duration_ns=duration_ns,
            prefill_tokens=plan.prefill_tokens,
            decode_requests=plan.decode_requests,
            running=len(self.scheduler.holding),
            waiting=len(self.scheduler.waiting),
            used_tokens=used,
            free_tokens=self.capacity_tokens - used,
            preempted=len(plan.preempted),
        )


def _progress(request: Request) -> Progress:
    return Progress(
        request_id=request.request_id,
        compute_ns=request.compute_ns,
        queue_ns=request.queue_ns,
        chunks=request.untold_chunks(),
    )


def _row(request: Request) -> SampleRow:
    return SampleRow(
        sampling=request.sampling,
        position=len(request.tokens),
        prompt=request.prompt,
        output=request.output,
        blocked=request.blocked,
        penalties=request.penalties,
    )
