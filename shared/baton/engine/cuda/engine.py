"""The engine one step ahead: a step is launched before the one before it is looked at.

What a step computes next follows from numbers alone, except for the tokens themselves; those stay on the device, where
the next step picks them up. On the host a PLACEHOLDER stands for each until its step is collected. A request that turns
out to have ended has a row in the step under way: that row counts for nothing, and never gives a token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from baton.engine.config import EngineConfig
from baton.engine.cuda.attention import Attention, choose
from baton.engine.cuda.graphs import Capture, CudaCapture
from baton.engine.cuda.inputs import PLACEHOLDER
from baton.engine.cuda.pool import PagedPool
from baton.engine.cuda.runner import DeviceRunner, Flight
from baton.engine.cuda.sampling import UNSETTLED, needs_host
from baton.engine.cuda.selftest import self_test
from baton.engine.cuda.streams import streams_of
from baton.engine.engine import Emit, Engine, sample_row
from baton.engine.loader import LoadedModel
from baton.engine.messages import Commit, Event, KvReady, Progress, Role
from baton.engine.pool import TORCH_DTYPES
from baton.engine.request import Request, State
from baton.engine.runner import Runner
from baton.engine.sampler import InvalidRows, sample
from baton.engine.scheduler import Plan, Work


@dataclass(slots=True)
class Ahead:
    """A step that was launched, and what it will mean for its requests.

    Attributes:
        flight: the step.
        work: of it, with the tokens of a prompt each one computes; 0: it goes on by a token.
        started_ns: when it was launched.
        place: request's sequence number -> its row among the sampled ones.
        on_host: whether some row can be sampled on the host only.
        void: requests whose row counts for nothing, though they live on.
    """

    flight: Flight
    work: list[tuple[Work, int]]
    started_ns: int
    place: dict[int, int]
    on_host: bool
    void: set[int] = field(default_factory=set)


class DeviceEngine(Engine):
    """Serves one model on a device.

    Args:
        config, model, emit, memory_fd, clock: as of `Engine`.
        attention: backend; None: the fastest there is.
        capture: captures decode steps; None: as CUDA graphs on a CUDA device, not at all elsewhere.
    """

    pool: PagedPool
    runner: DeviceRunner

    def __init__(
        self,
        config: EngineConfig,
        model: LoadedModel,
        emit: Emit,
        memory_fd: int = -1,
        *,
        attention: Attention | None = None,
        capture: Capture | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._device = model.module.device
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # streams, events and graphs are made on the current one
        self._attention = attention or choose(self._device, TORCH_DTYPES[model.spec.dtype])
        self._capture = capture
        if capture is None and self._device.type == "cuda":
            self._capture = CudaCapture(self._device)
        self._ahead: Ahead | None = None
        self._collected_ns = 0
        self._tell = emit
        super().__init__(config, model, self._emit_staged, memory_fd, clock)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do something."""
        return self.in_flight or super().has_work

    @property
    def in_flight(self) -> bool:
        """Whether a step was launched whose results were not looked at."""
        return self._ahead is not None

    def _build(self, config: EngineConfig, model: LoadedModel, memory_fd: int) -> tuple[PagedPool, Runner]:
        streams = streams_of(self._device)
        pool = PagedPool(self.layout, self.capacity_tokens, self._attention.page_size, self._device, streams, memory_fd)
        runner = DeviceRunner(model, pool, self._attention, streams, config.step_tokens)
        if self._capture is not None:
            with torch.inference_mode():
                runner.capture(self._capture, config.num_slots)
        return pool, runner

    def _self_test(self, model: LoadedModel) -> bool:
        self_test(self.runner, model)
        return False  # its libraries choose kernels by the number of rows

    def _commit(self, command: Commit) -> None:
        request = self._reserved(command.request_id)
        if request is not None:
            received = len(request.tokens) + len(command.token_ids) - 1
            # Impossible numbers are refused behind; nothing is read beyond the slot for them.
            self.pool.upload(request.slot, request.computed, min(received, self.longest))
        super()._commit(command)

    def _emit_staged(self, events: Sequence[Event]) -> None:
        """Whatever the engine says lies in a slot, the front can read: prefixes from the cache come down first."""
        arriving = [
            self.pool.download(event.layer, event.slot, event.start, event.stop)
            for event in events
            if isinstance(event, KvReady)
        ]
        for event in arriving:
            event.synchronize()
        self._tell(events)

    # ---------------------------------------------------------------------------------------------- step

    def _compute(self, plan: Plan, started: int) -> list[Event]:
        """Launch this step, then look at the one before."""
        for request in plan.admitted:
            # A slot that kept more than the request shares: the rest is counted for nobody.
            self.pool.pages.trim(request.slot, request.computed)
        before, self._ahead = self._ahead, None
        failure: RuntimeError | None = None
        if plan.work:
            try:
                self._ahead = self._launch(plan.work, before, started)
            except RuntimeError as error:  # what torch raises: out of memory, shapes a kernel does not take
                failure = error
        told: list[Event] = []
        if before is not None:
            told += self._collect(before)
        if failure is not None:
            lost = [w.request for w in plan.work if w.request.state is not State.FINISHED]
            told += [self._fail(request, f"the step failed: {failure}") for request in lost]
        if self._ahead is not None and self._ahead.on_host:
            now, self._ahead = self._ahead, None
            told += self._collect(now)
        return told

    def _launch(self, work: list[Work], before: Ahead | None, started: int) -> Ahead:
        requests = [w.request for w in work if w.samples]
        samples = [sample_row(request) for request in requests]
        flight = self.runner.launch(
            work,
            samples,
            before.place if before is not None else {},
            lambda layer: self._tell_arrived(work, layer),
            before.flight if before is not None else None,
        )
        ahead = Ahead(
            flight,
            [(w, 0 if w.decodes else w.count) for w in work],
            started,
            {request.sequence: row for row, request in enumerate(requests)},
            any(needs_host(row) for row in samples),
        )
        for w in work:
            w.request.computed += w.count
        for request in requests:
            request.tokens.append(PLACEHOLDER)
            full = request.num_generated >= request.sampling.max_tokens or len(request.tokens) >= self.longest
            if request.role is Role.PREFILL or full:
                request.state = State.HELD  # nothing comes after this token, whichever it is
        return ahead

    def _collect(self, ahead: Ahead) -> list[Event]:
        """Wait for a step and give its requests their tokens."""
        flight = ahead.flight
        try:
            flight.departures.tell(wait=True)
            flight.done.synchronize()
        except RuntimeError as error:
            lost = [w.request for w, _ in ahead.work if w.request.state is not State.FINISHED]
            return [self._fail(request, f"the step failed: {error}") for request in lost]
        ended = self._clock()
        # Steps overlap on the host, not on the device: each one's time begins where the one's before ended.
        started, self._collected_ns = max(ahead.started_ns, self._collected_ns), ended
        told: list[Event] = []
        for w, prompt_tokens in ahead.work:
            if self._counts(ahead, w.request):
                w.request.served(started, ended, prompt_tokens)
                if w.request.sequence not in ahead.place:
                    told.append(_progress(w.request))
        tokens = flight.host_tokens.tolist()
        for row, request in enumerate(flight.requests):
            if self._counts(ahead, request):
                told.append(self._settle(flight, row, request, tokens[row]))
        return told

    def _settle(self, flight: Flight, row: int, request: Request, token: int) -> Event:
        """Give a request its token, as if the step after, which may have a row of it already, did not exist yet."""
        after = self._ahead
        if after is not None and (request.sequence not in after.place or self._is_void(after, request)):
            after = None
        if after is not None:
            request.tokens.pop()
            request.computed -= 1
        request.tokens.pop()
        state = request.state
        settled = token != UNSETTLED
        if not settled:
            try:
                (token,) = sample(flight.logits[row : row + 1], [sample_row(request)])
            except InvalidRows as error:
                return self._fail(request, str(error))
        output = self._advance(request, token)
        if after is not None and request.state is not State.FINISHED:
            if settled:
                request.tokens.append(PLACEHOLDER)
                request.computed += 1
                request.state = state
            else:  # the row under way began with no token, or with a wrong one
                after.void.add(request.sequence)
                request.state = State.RUNNING
        return output

    def _counts(self, ahead: Ahead, request: Request) -> bool:
        return request.state is not State.FINISHED and not self._is_void(ahead, request)

    @staticmethod
    def _is_void(ahead: Ahead, request: Request) -> bool:
        return request.sequence in ahead.void

    def _tell_arrived(self, work: Sequence[Work], layer: int) -> None:
        """Keys and values of a layer lie in the file: see `_tell_ready`. Nobody waits for those of a request gone."""
        ready = [
            KvReady(w.request.request_id, w.request.slot, layer, first, w.start + w.count)
            for w in work
            if w.request.role is Role.PREFILL
            and w.request.state is not State.FINISHED
            and (first := max(w.start, w.request.start_token)) < w.start + w.count
        ]
        if ready:
            self._tell(ready)


def _progress(request: Request) -> Progress:
    return Progress(
        request_id=request.request_id,
        compute_ns=request.compute_ns,
        queue_ns=request.queue_ns,
        chunks=request.untold_chunks(),
    )
