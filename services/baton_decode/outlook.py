"""What a decode worker knows of its own queue and of the prefill services, besides what the router says. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from baton.engine.messages import StepReport
from baton.internal.v1 import decode_pb2
from baton.worker.step_cost import StepCost
from baton_decode.placement import Estimate, Here, Prompt, There

_TARGETS: Final = 256  # remembered, those used last
_SEEN: Final = 9  # observations of each
_MEMORY_SECONDS: Final = 60.0  # older ones say nothing: a service that was slow once gets another chance
_FIRST_OVERHEAD: Final = 0.004
"""Seconds, of a service that was not asked lately. Little: who expects much never asks, and never learns better."""
_FIRST_BANDWIDTH: Final = 1e9  # bytes per second


@dataclass(slots=True)
class _Past:
    """What was seen of one prefill service: (when, value)."""

    overheads: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_SEEN))
    seconds_per_byte: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_SEEN))
    asked: int = 0  # requests of this worker that wait for their first token
    busy_until: float = 0.0  # by when they should have it


class Outlook:
    """Knows what is needed to place a prompt. All instants are seconds of one monotonic clock.

    Args:
        bytes_per_token: of KV.
    """

    def __init__(self, bytes_per_token: int) -> None:
        self._bytes_per_token = bytes_per_token
        self._report: StepReport | None = None
        self._reported = 0.0  # when
        self._unseen: deque[tuple[float, int]] = deque()  # prompts given to the engine that its report does not count
        self._past: OrderedDict[str, _Past] = OrderedDict()

    def reported(self, report: StepReport, now: float) -> None:
        """The engine made a step, or has nothing to do."""
        self._report, self._reported = report, now
        began = now - report.duration_ns / 1e9
        while self._unseen and self._unseen[0][0] < began:
            self._unseen.popleft()

    def computing_here(self, prompt: Prompt, now: float) -> None:
        """The engine was told to compute a prompt. There are never more than it has slots."""
        self._unseen.append((now, prompt.missing))

    def here(self, cost: StepCost, now: float) -> Here:
        """This worker now.

        The step that runs now began with the last report, with all prompts that were there; or, if there were none and
        no streams, with the first prompt after.
        """
        running = self._report.decode_requests if self._report is not None else 0
        known = self._report.waiting_prompt_tokens if self._report is not None else 0
        waiting = known + sum(tokens for _, tokens in self._unseen)
        began = self._reported
        in_step = known + sum(tokens for sent, tokens in self._unseen if sent <= began)
        if not running and not in_step and self._unseen:
            began, in_step = self._unseen[0]
        if not running and not in_step:
            return Here(cost, 0.0, 0, 0)
        in_step = min(in_step, max(1, cost.step_tokens - running))
        step = cost.prefill(in_step, 0, running) if in_step else cost.decode(running)
        return Here(cost, max(0.0, step - (now - began)), waiting - in_step, running)

    def there(self, candidate: decode_pb2.PrefillCandidate, like: StepCost, now: float) -> There:
        """A prefill service now; one that tells no step cost, or none that makes sense, is taken to be like this.

        So is one that is about as fast: what two workers measure of equal steps differs by chance, and chance must not
        decide to compute a long prompt beside running streams.
        """
        told = StepCost.from_proto(candidate.step_cost) if candidate.HasField("step_cost") else None
        cost = told if told is not None and not told.about_as_fast_as(like) else like
        past = self._past.get(candidate.target) or _Past()
        # What it had to do when it told has become less since; what this worker asked since, it did not tell yet.
        reported = cost.prefill(candidate.waiting_prompt_tokens) - candidate.age_ms / 1e3
        asked = past.busy_until - now if past.asked else 0.0
        return There(
            target=candidate.target,
            cost=cost,
            queue_seconds=max(0.0, reported, asked),
            overhead_seconds=_recent(past.overheads, now, _FIRST_OVERHEAD),
            seconds_per_token=_recent(past.seconds_per_byte, now, 1 / _FIRST_BANDWIDTH) * self._bytes_per_token,
            cached_tokens=candidate.cached_tokens if candidate.HasField("cached_tokens") else None,
        )

    def asked(self, estimate: Estimate, overhead: float, now: float) -> None:
        """A prefill service is asked for a prompt; `answered` or `failed` follows."""
        past = self._remember(estimate.target)
        past.asked += 1
        past.busy_until = max(past.busy_until, now + estimate.first_token - overhead)

    def answered(self, target: str, overhead: float | None, now: float) -> None:
        """The wait for the first token is over.

        Args:
            target: that was asked.
            overhead: seconds it took beside queue and computation; None: there was no token, for reasons of ours.
            now: the instant.
        """
        past = self._remember(target)
        past.asked = max(0, past.asked - 1)
        if overhead is not None:
            past.overheads.append((now, max(0.0, overhead)))

    def moved(self, target: str, size: int, seconds: float, now: float) -> None:
        """KV of so many bytes came in so long a time."""
        if size > 0:
            self._remember(target).seconds_per_byte.append((now, max(0.0, seconds) / size))

    def _remember(self, target: str) -> _Past:
        past = self._past.setdefault(target, _Past())
        self._past.move_to_end(target)
        if len(self._past) > _TARGETS:
            self._past.popitem(last=False)
        return past


def _recent(seen: deque[tuple[float, float]], now: float, otherwise: float) -> float:
    """Median of what was seen lately: neither a hiccup nor one lucky request decides."""
    fresh = [value for when, value in seen if now - when <= _MEMORY_SECONDS]
    return median(fresh) if fresh else otherwise
