"""The engine: commands in, steps, events out. Synchronous, single-threaded, and steppable in process.

A step is: schedule, run, sample, tell. All memory a request holds comes back in `_free`, here and nowhere else.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence

from baton.engine import events
from baton.engine.admission import impossible, refusal
from baton.engine.config import EngineConfig, Quantization
from baton.engine.layout import ModelSpec, PoolLayout
from baton.engine.loader import LoadedModel, OnProgress, load
from baton.engine.memory import Memory
from baton.engine.messages import (
    Command,
    Commit,
    ComputeHere,
    DebugState,
    Event,
    Failed,
    FailureReason,
    Inspect,
    Output,
    PrefixChanges,
    Ready,
    Release,
    Role,
    StepReport,
    Stop,
    Submit,
)
from baton.engine.pool import Pool
from baton.engine.prefix import PrefixIndex, keyed_hash
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
        self.pool, self.runner = self._build(config, model, memory_fd)
        self.memory = Memory(self.pool, self.spec.layers)
        prefixes = PrefixIndex(config.block_tokens, keyed_hash(secrets.token_bytes(32)))
        self._prefixes = prefixes if config.prefix_cache else None
        self.scheduler = Scheduler(limits, config.num_slots, self._prefixes)
        self.exact = self._self_test(model)
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
        if model.module.device.type != "cpu":
            from baton.engine.cuda.engine import DeviceEngine  # it extends this class

            cls = DeviceEngine
        return cls(config, model, emit, memory_fd)

    def _build(self, config: EngineConfig, model: LoadedModel, memory_fd: int) -> tuple[Pool, Runner]:
        """Memory and arithmetic."""
        pool = Pool(self.layout, self.capacity_tokens * self.layout.bytes_per_token, memory_fd)
        quantized = config.quantization is not Quantization.NONE
        return pool, Runner(model, pool, kernels=config.kernels, quantized=quantized)

    def _self_test(self, model: LoadedModel) -> bool:
        """Whether all steps give the same bits. Raises UnsupportedModel: they do not give the model's own logits."""
        return self.runner.self_test()

    def ready(self, pid: int) -> Ready:
        """What a front must know to begin."""
        return Ready(
            spec=self.spec,
            layout=self.layout,
            capacity_tokens=self.capacity_tokens,
            max_context=self.longest,
            exact=self.exact,
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
        self._arrange()
        self._tell_admitted(plan, started)
        outputs = self._compute(plan, started)
        self._steps += 1
        self._emit([*outputs, *self._prefix_changes(), self._report(plan, self._clock() - started)])
        self._told_idle = False

    def tell_idle(self) -> None:
        """Report once that there is nothing to do."""
        if not self._told_idle:
            self._told_idle = True
            self._emit([*self._prefix_changes(), self._report(Plan(), 0)])

    def debug_state(self, token: int = 0) -> DebugState:
        """What the engine holds."""
        return events.debug_state(self.scheduler, list(self._requests), self.capacity_tokens, self._steps, token)

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
        request = Request.of(command, self.spec.eos_token_ids, self._clock(), self._sequence)
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
            output = events.output(request, [], reason)
            self.scheduler.completed(request)
            self._free(request)
            self._emit([output])

    def _continue(self, request: Request, token_ids: Sequence[int]) -> bool:
        """A reserved request runs, after tokens generated elsewhere; False: they are impossible, and it failed."""
        limits = {"vocab_size": self.spec.vocab_size, "longest": self.longest}
        if (message := impossible(token_ids, have=len(request.tokens), **limits)) is not None:
            self._emit([self._fail(request, message)])
            return False
        request.tokens += token_ids
        request.state = State.RUNNING
        request.since_ns = self._clock()
        return True

    def _reserved(self, request_id: str) -> Request | None:
        request = self._requests.get(request_id)
        return request if request is not None and request.state is State.RESERVED else None

    # ---------------------------------------------------------------------------------------------- step

    def _arrange(self) -> None:
        self.memory.carry_out(self.scheduler.slots.drain())

    def _tell_admitted(self, plan: Plan, now: int) -> None:
        for request in plan.admitted:
            if request.state is State.RESERVED:
                self.pool.touch(request.slot, len(request.tokens))
        reserved = events.reserved(plan.admitted, now)
        there = events.already_there(plan.admitted, len(self.spec.layers))
        if reserved or there:
            self._emit([*reserved, *there])

    def _compute(self, plan: Plan, started: int) -> list[Event]:
        """Run and sample; returns what to tell."""
        if not plan.work:
            return []
        try:
            requests, logits = self.runner.run(plan.work, lambda layer: self._tell_ready(plan.work, layer))
        except RuntimeError as error:  # what torch raises: out of memory, shapes a kernel does not take
            return [self._fail(work.request, f"the step failed: {error}") for work in plan.work]
        for work in plan.work:
            work.request.computed += work.count
        rows = [sample_row(request) for request in requests]
        told: list[Event] = []
        try:
            tokens = sample(logits, rows)
        except InvalidRows as error:
            told += [self._fail(requests[row], str(error)) for row in error.rows]
            kept = [row for row in range(len(rows)) if row not in error.rows]
            requests = [requests[row] for row in kept]
            tokens = sample(logits[kept], [rows[row] for row in kept])
        ended = self._clock()
        for work in plan.work:
            work.request.served(started, ended, 0 if work.decodes else work.count)
        told += [events.progress(work.request) for work in plan.work if not work.samples]
        told += [self._advance(request, token) for request, token in zip(requests, tokens, strict=True)]
        return told

    def _tell_ready(self, work: Sequence[Work], layer: int) -> None:
        if ready := events.kv_ready(work, layer):
            self._emit(ready)

    def _advance(self, request: Request, token: int) -> Output:
        """Give a request its next token."""
        chunk = request.computed - request.proven
        self.memory.sampled(request)
        if chunk > 1:
            self.scheduler.slots.publish(request)
        request.tokens.append(token)
        reason = request.finish_reason(self.longest)
        output = events.output(request, [token], reason)
        if request.role is Role.PREFILL:
            request.state = State.HELD
        elif reason is not None:
            self.scheduler.completed(request)
            self._free(request)
        return output

    def _fail(self, request: Request, message: str) -> Failed:
        request.computed = request.proven = 0  # nothing it leaves counts
        self._free(request)
        return Failed(request.request_id, FailureReason.INTERNAL, message)

    def _free(self, request: Request) -> None:
        """Take everything back. What is not known to be finite is wiped."""
        self._told_idle = False
        if self.scheduler.slots.looks_up(request):
            self.memory.inspect(request)
        self.scheduler.free(request)
        del self._requests[request.request_id]
        self._arrange()

    def _prefix_changes(self) -> list[PrefixChanges]:
        return events.prefix_changes(self._prefixes) if self._prefixes is not None else []

    def _report(self, plan: Plan, duration_ns: int) -> StepReport:
        return events.report(self.scheduler, self.capacity_tokens, self._steps, plan, duration_ns)


def sample_row(request: Request) -> SampleRow:
    """How a request's next token is sampled."""
    return SampleRow(
        sampling=request.sampling,
        position=len(request.tokens),
        prompt=request.prompt,
        output=request.output,
        blocked=request.blocked,
        penalties=request.penalties,
    )
