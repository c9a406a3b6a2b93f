"""Steps on a device: launched without waiting, collected later."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from baton.engine.attention import attending
from baton.engine.cuda.attention import Attention, PagedForward
from baton.engine.cuda.graphs import Capture, Graphs, capture_sizes
from baton.engine.cuda.inputs import Inputs, Rows
from baton.engine.cuda.pool import PagedPool
from baton.engine.cuda.sampling import SamplingInputs
from baton.engine.cuda.streams import Event, Streams
from baton.engine.loader import LoadedModel, forward
from baton.engine.messages import Role
from baton.engine.request import Request
from baton.engine.runner import Runner
from baton.engine.sampler import SampleRow
from baton.engine.scheduler import Work

OnLayer = Callable[[int], None]
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Departures:
    """Layers of prompts computed for others, on their way to the host.

    Attributes:
        on_layer: told of each that has arrived, in order.
    """

    on_layer: OnLayer
    _leaving: deque[tuple[int, Event]] = field(default_factory=deque)

    def add(self, layer: int, arrived: Event) -> None:
        """A layer leaves."""
        self._leaving.append((layer, arrived))

    def tell(self, *, wait: bool = False) -> None:
        """Tell of layers that have arrived; of all, if `wait`."""
        while self._leaving and (wait or self._leaving[0][1].query()):
            layer, event = self._leaving.popleft()
            event.synchronize()
            self.on_layer(layer)


@dataclass(slots=True)
class Flight:
    """A step under way.

    Attributes:
        requests: those that get a token.
        logits: float32 [requests, vocabulary], on the device.
        tokens: int64 [requests], on the device; UNSETTLED where the host must sample. Empty if none was to be sampled.
        host_tokens: the same on the host, once `done`.
        done: when all of it is computed.
        departures: what leaves for the host.
    """

    requests: list[Request]
    logits: torch.Tensor
    tokens: torch.Tensor
    host_tokens: torch.Tensor
    done: Event
    departures: Departures


class DeviceRunner(Runner):
    """Runs steps of one model over pages.

    Attributes:
        pool: where keys and values lie.
        attention: backend.
        graphs: of decode steps, once captured.

    Args:
        model: loaded, on the pool's device.
        pool: where keys and values lie.
        attention: backend.
        streams: of the device.
        step_tokens: most rows of a step.
    """

    def __init__(
        self, model: LoadedModel, pool: PagedPool, attention: Attention, streams: Streams, step_tokens: int
    ) -> None:
        super().__init__(model, pool, kernels=False)
        self.pool = pool
        self.graphs = Graphs()
        self.attention = attention
        self._streams = streams
        self._most = pool.layout.num_slots
        self._inputs = self._make_inputs(max(step_tokens, self._most, len(model.reference_ids)))
        self._sampling = SamplingInputs(self._most, pool.device, pinned=streams.pinned)
        # What was sampled last: graphs read their carried tokens here, so it never moves.
        self._before = torch.zeros(self._most, dtype=torch.int64, device=pool.device)
        self._host_tokens = [torch.zeros(self._most, dtype=torch.int64, pin_memory=streams.pinned) for _ in range(2)]
        self._turn = 0

    def capture(self, capture: Capture, limit: int) -> None:
        """Capture decode steps of up to `limit` requests. A model that cannot be captured runs without graphs."""
        try:
            self.graphs = Graphs.build(
                capture_sizes(min(limit, self._most)),
                self._padding,
                lambda size, inputs: self._forward(inputs, inputs.rows(size, size), size, None),
                capture,
            )
        except RuntimeError as error:  # an operation that waits for the device, or no memory left
            _log.warning("decode steps run without CUDA graphs: %s", error)
            self.graphs = Graphs()

    @torch.inference_mode()
    def run(self, work: Sequence[Work], on_layer: OnLayer = lambda layer: None) -> tuple[list[Request], torch.Tensor]:
        """Compute a step and wait for it: see `Runner.run`."""
        flight = self.launch(work, (), {}, on_layer)
        flight.departures.tell(wait=True)
        flight.done.synchronize()
        return flight.requests, flight.logits

    @torch.inference_mode()
    def launch(
        self,
        work: Sequence[Work],
        samples: Sequence[SampleRow],
        carried: dict[int, int],
        on_layer: OnLayer = lambda layer: None,
        before: Flight | None = None,
    ) -> Flight:
        """Start a step.

        Args:
            work: what to compute; together at least one token.
            samples: how to sample the requests that get a token, in order; empty: their logits are all that is wanted.
            carried: request's sequence number -> place among the tokens of the step before, where that is not read yet.
            on_layer: called when all new keys and values of a layer lie where the front may read them; during this
                call or a later one.
            before: the step before, whose layers may arrive meanwhile.

        Raises:
            EngineError: no page is free; the scheduler's budget should make that impossible.
            RuntimeError: the device refuses.
        """
        for w in work:
            self.pool.prepare(w.request.slot, w.start, w.start + w.count)
        requests = [w.request for w in work if w.samples]
        departures = Departures(on_layer)
        ranges = [
            (w.request.slot, first, stop)
            for w in work
            if w.request.role is Role.PREFILL
            and (first := max(w.start, w.request.start_token)) < (stop := w.start + w.count)
        ]

        def on_written(layer: int) -> None:
            if before is not None:
                before.departures.tell()
            for number, (slot, first, stop) in enumerate(ranges):
                event = self.pool.download(layer, slot, first, stop)
                if number == len(ranges) - 1:  # they leave one after another
                    departures.add(layer, event)
            departures.tell()

        graph = None
        if all(w.count == 1 and w.samples for w in work) and not ranges:
            graph = self.graphs.of(len(work))
        if graph is not None:
            graph.inputs.fill(work, carried, pad_to=graph.size)
            graph.replay()
            logits = graph.logits[: len(work)]
        else:
            spans = self._inputs.fill(work, carried)
            total = spans[-1].row + spans[-1].count
            sampled = self._inputs.sampled(len(requests))
            logits = self._forward(
                self._inputs, self._inputs.rows(total, len(spans), spans), total, sampled, on_written
            )
        # The next replay overwrites a graph's; the host may still have to sample from these.
        logits = logits.clone() if graph is not None else logits
        return self._sample(Flight(requests, logits, logits, logits, self._streams.record(), departures), samples)

    def _sample(self, flight: Flight, samples: Sequence[SampleRow]) -> Flight:
        count = len(samples)
        self._turn = 1 - self._turn
        flight.tokens = self._before[:0]
        flight.host_tokens = self._host_tokens[self._turn][:count]
        if count:
            flight.tokens = self._sampling.sample(flight.logits, samples)
            self._before[:count] = flight.tokens
            flight.host_tokens.copy_(flight.tokens, non_blocking=True)
            flight.done = self._streams.record()
        return flight

    def _forward(
        self,
        inputs: Inputs,
        rows: Rows,
        total: int,
        sampled: torch.Tensor | None,
        on_written: OnLayer = lambda layer: None,
    ) -> torch.Tensor:
        """Logits of the sampled rows, float32; None: of all."""
        with attending(PagedForward(self.pool, self.attention, rows, on_written)):
            return forward(self._model.module, inputs.ids(total, self._before), inputs.positions(total), sampled)

    def _padding(self, size: int) -> Inputs:
        """Buffers of a graph, which must be sound when it is captured."""
        inputs = self._make_inputs(size, size)
        inputs.fill((), {}, pad_to=size)
        return inputs

    def _make_inputs(self, tokens: int, requests: int = 0) -> Inputs:
        return Inputs(tokens, requests or self._most, self.pool.pages, self.pool.device, pinned=self._streams.pinned)
