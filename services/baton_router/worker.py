"""One worker process as this router sees it: what it last told, what it was sent since, and the calls it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from baton.internal.v1 import decode_pb2, worker_pb2
from baton.worker.step_cost import StepCost
from baton_router.in_flight import InFlight, Sent
from baton_router.placement import UNQUANTIZED, Candidate
from baton_router.prefixes import KnownPrefixes


class Cancellable(Protocol):
    """A call in progress."""

    def cancel(self) -> bool: ...


class Worker:
    """One worker process, from its first state message until it leaves the view and nothing runs there.

    Args:
        target: its address.
        model: name clients call its model by.
        state: what it said first.
        now: seconds of a monotonic clock.

    Attributes:
        state: what it last said.
        told: when.
        in_flight: what this router has there.
        prefixes: what its prefix cache holds.
        hung: it fell silent, and its calls were cancelled for that.
    """

    __slots__ = ("_calls", "_cost", "hung", "in_flight", "model", "prefixes", "state", "target", "told")

    def __init__(self, target: str, model: str, state: worker_pb2.WatchResponse, now: float | None = None) -> None:
        self.target = target
        self.model = model
        self.in_flight = InFlight()
        self.prefixes = KnownPrefixes()
        self.hung = False
        self._calls: set[Cancellable] = set()
        self.take(state, now)

    def take(self, state: worker_pb2.WatchResponse, now: float | None = None) -> None:
        """It told its state. What it told of prefixes is another matter."""
        self.state, self.told = state, time.monotonic() if now is None else now
        load = state.load
        self._cost = StepCost.from_proto(load.step_cost) if load.HasField("step_cost") else None

    def candidate(self, cached_tokens: int = 0, now: float | None = None) -> Candidate:
        """As placement sees it.

        Args:
            cached_tokens: of the prompt that is placed, in the prefix cache here.
            now: seconds of a monotonic clock.
        """
        now = time.monotonic() if now is None else now
        state, load, unseen = self.state, self.state.load, self.in_flight.unseen(self.told)
        used = max(load.kv_used_tokens + unseen.kv_tokens, self.in_flight.kv_tokens)
        return Candidate(
            target=self.target,
            incarnation=state.incarnation,
            fingerprint=state.model.fingerprint,
            quantization=state.model.quantization or UNQUANTIZED,
            draining=state.draining,
            streams=max(load.running + load.waiting + unseen.requests, len(self.in_flight)),
            waiting=load.waiting > 0,
            slots=state.capacity.slots,
            free_tokens=state.capacity.kv_tokens - used,
            queued_tokens=self._still_queued(now) + unseen.prompt_tokens,
            cached_tokens=cached_tokens,
            cost=self._cost,
        )

    def prefill_candidate(self, seen: Candidate, *, fallback: bool) -> decode_pb2.PrefillCandidate:
        """As decode is told of it, which decides whether to use it."""
        return decode_pb2.PrefillCandidate(
            target=self.target,
            waiting_prompt_tokens=seen.queued_tokens,
            step_cost=self.state.load.step_cost if self._cost is not None else None,
            cached_tokens=seen.cached_tokens if self.prefixes.told else None,
            fallback=fallback,
        )

    @property
    def busy(self) -> bool:
        """Whether anything of this router is there."""
        return bool(self._calls) or len(self.in_flight) > 0

    @contextmanager
    def holding(self, prompt_tokens: int, kv_tokens: int) -> Iterator[Sent]:
        """A request is there for the length of the block.

        Args:
            prompt_tokens: of it that are expected to be computed there.
            kv_tokens: it is expected to hold in the end.
        """
        sent = Sent(time.monotonic(), prompt_tokens, kv_tokens)
        self.in_flight.add(sent)
        try:
            yield sent
        finally:
            self.in_flight.remove(sent)

    @contextmanager
    def running(self, call: Cancellable) -> Iterator[None]:
        """Have the call cancelled should the worker fall silent."""
        self._calls.add(call)
        try:
            yield
        finally:
            self._calls.discard(call)

    def silent(self) -> None:
        """It hangs: end what runs there."""
        self.hung = True
        for call in list(self._calls):
            call.cancel()

    def _still_queued(self, now: float) -> int:
        """Prompt tokens it told of, less what it should have computed since."""
        told = self.state.load.waiting_prompt_tokens
        if not told or self._cost is None:
            return told
        per_token = self._cost.seconds_per_token + self._cost.prefill_seconds / self._cost.step_tokens
        return max(0, told - int((now - self.told) / per_token)) if per_token else told
