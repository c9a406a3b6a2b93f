"""Decides for each request where its prompt is computed, says why, and learns from what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from prometheus_client import Counter, Histogram

from baton.engine.messages import StepReport
from baton.internal.v1 import decode_pb2, timing_pb2
from baton.telemetry import tracing
from baton.telemetry.tracing import Attribute
from baton.v1 import ledger_pb2
from baton.worker.step_meter import StepMeter
from baton_decode.outlook import Outlook
from baton_decode.placement import HERE, Estimate, Policy, PrefillPlacement, Prompt, choose, here, there
from baton_decode.prefill_client import PrefillLost

DECISIONS = Counter(
    "baton_placement_decisions_total", "Decisions where to compute a prompt, and what decided", ["placement", "reason"]
)
ACTUAL = Histogram(
    "baton_placement_actual_ratio",
    "Time from the decision to the first token, over the time predicted",
    ["placement"],
    buckets=(0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2, 4, 8),
)
_REASONS: Final = ("cost", "setting", "no_candidate")
for _place in ("local", "remote"):
    ACTUAL.labels(_place)
    for _reason in _REASONS:
        DECISIONS.labels(_place, _reason)  # a zero is a figure, no data is a question


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a prompt is to be computed.

    Attributes:
        target: of the prefill service; HERE.
        reason: what decided.
        prompt: what is missing.
        overhead: seconds assumed beside queue and computation; 0 here.
        estimate: what this way should cost; None: not known.
        made: when, seconds of a monotonic clock.
    """

    target: str
    reason: str
    prompt: Prompt
    overhead: float
    estimate: Estimate | None
    made: float

    @property
    def place(self) -> str:
        """For a label."""
        return "local" if self.target == HERE else "remote"


class Asking:
    """One prefill service, asked for one prompt."""

    def __init__(self, decision: Decision, outlook: Outlook, clock: Callable[[], float]) -> None:
        self._decision = decision
        self._outlook = outlook
        self._clock = clock
        self._waiting = True

    def first_token(self, timing: timing_pb2.HopTiming) -> None:
        """It is here; `timing` is the service's account until it was sampled."""
        now = self._clock()
        kinds = (ledger_pb2.KIND_QUEUE, ledger_pb2.KIND_COMPUTE)
        served = sum(entry.duration_ns for entry in timing.entries if entry.kind in kinds) / 1e9
        self._over(now - self._decision.made - served, now)
        learn_ratio(self._decision, now)

    def moved(self, size: int, duration_ns: int) -> None:
        """All KV is here."""
        self._outlook.moved(self._decision.target, size, duration_ns / 1e9, self._clock())

    def end(self, *, lost: bool) -> None:
        """Nothing more comes. A service that was lost cost all the time until then."""
        if self._waiting:
            now = self._clock()
            self._over(now - self._decision.made if lost else None, now)

    def _over(self, overhead: float | None, now: float) -> None:
        self._waiting = False
        self._outlook.answered(self._decision.target, overhead, now)


class Placer:
    """Places prompts.

    Args:
        mode: who decides.
        threshold: most missing tokens computed here, where that decides: in that mode, and while costs are not known.
        policy: for estimates.
        meter: of this worker's engine.
        bytes_per_token: of KV.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        mode: PrefillPlacement,
        threshold: int,
        policy: Policy,
        meter: StepMeter,
        bytes_per_token: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mode = mode
        self._threshold = threshold
        self._policy = policy
        self._meter = meter
        self._clock = clock
        self._outlook = Outlook(bytes_per_token)

    def reported(self, report: StepReport) -> None:
        """The engine made a step."""
        self._outlook.reported(report, self._clock())

    def decide(self, prompt: Prompt, candidates: Sequence[decode_pb2.PrefillCandidate]) -> Decision:
        """Where to compute a prompt.

        Args:
            prompt: what is missing.
            candidates: prefill services that may be asked, the router's first choice first.
        """
        now = self._clock()
        candidates = [candidate for candidate in candidates if not candidate.fallback] or candidates
        estimates: list[Estimate] = []
        overheads = {HERE: 0.0}
        if (cost := self._meter.cost()) is not None:
            estimates.append(here(prompt, self._outlook.here(cost, now)))
            for candidate in candidates:
                worker = self._outlook.there(candidate, cost, now)
                overheads[worker.target] = worker.overhead_seconds
                estimates.append(there(prompt, worker))
        target, reason = self._choose(prompt, [candidate.target for candidate in candidates], estimates)
        estimate = next((e for e in estimates if e.target == target), None)
        decision = Decision(target, reason, prompt, overheads.get(target, 0.0), estimate, now)
        DECISIONS.labels(decision.place, reason).inc()
        tracing.set_call_attributes(_attributes(decision, estimates))
        return decision

    def computing_here(self, decision: Decision) -> None:
        """The engine was told to."""
        self._outlook.computing_here(decision.prompt, self._clock())

    @contextmanager
    def asking(self, decision: Decision) -> Iterator[Asking]:
        """A prefill service is asked within the block."""
        if decision.estimate is not None:
            self._outlook.asked(decision.estimate, decision.overhead, self._clock())
        asking = Asking(decision, self._outlook, self._clock)
        lost = False
        try:
            yield asking
        except PrefillLost:
            lost = True
            raise
        finally:
            asking.end(lost=lost)

    def ended_here(self, decision: Decision, first_token: float) -> None:
        """A prompt was computed here; its first token was known then, unless that was before the decision."""
        if first_token > decision.made:
            learn_ratio(decision, first_token)

    def _choose(self, prompt: Prompt, targets: Sequence[str], estimates: Sequence[Estimate]) -> tuple[str, str]:
        """(target, what decided)."""
        if not targets:
            return HERE, "no_candidate"
        if self._mode is PrefillPlacement.AUTO and estimates:
            return choose(estimates, self._policy).target, "cost"
        match self._mode:
            case PrefillPlacement.LOCAL:
                local = True
            case PrefillPlacement.REMOTE:
                local = False
            case PrefillPlacement.THRESHOLD | PrefillPlacement.AUTO:
                local = prompt.missing <= self._threshold
        return (HERE if local else targets[0]), "setting"


def learn_ratio(decision: Decision, now: float) -> None:
    """A first token came: was it when it was expected?"""
    if decision.estimate is not None and decision.estimate.first_token > 0:
        ACTUAL.labels(decision.place).observe((now - decision.made) / decision.estimate.first_token)


def _attributes(decision: Decision, estimates: Sequence[Estimate]) -> dict[str, Attribute]:
    """For the request's span: what was chosen, and what each kind of way should have cost at best."""
    told: dict[str, Attribute] = {
        "baton.placement": decision.place,
        "baton.placement.reason": decision.reason,
        "baton.placement.missing_tokens": decision.prompt.missing,
    }
    for estimate in reversed(estimates):  # of several prefill services, the router's first choice is told
        place = "local" if estimate.target == HERE else "remote"
        told[f"baton.placement.{place}_ms"] = estimate.first_token * 1e3
        told[f"baton.placement.{place}_exposed_ms"] = estimate.exposed * 1e3
        told[f"baton.placement.{place}_harm_ms"] = estimate.harm * 1e3
    return told
