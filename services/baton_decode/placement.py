"""Where a prompt is computed: here, or by one of the prefill services. Pure: plain values in, a choice out.

Every way has an estimate of what it costs in seconds of waiting: the request's own for its first token, its own for KV
that is still on the way after that, and that of the streams which run here and would wait for the steps of its prompt.
See docs/placement.md.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from baton.worker.step_cost import StepCost

HERE: Final = ""
"""The target of a prompt that is computed here."""


class PrefillPlacement(enum.StrEnum):
    """How a decode service is told to place prompts."""

    AUTO = "auto"  # by estimated cost
    LOCAL = "local"  # here
    REMOTE = "remote"  # by a prefill service, while there is one
    THRESHOLD = "threshold"  # here if no more than local_prefill_tokens are missing


@dataclass(frozen=True, slots=True)
class Prompt:
    """What has to be computed: `missing` tokens, 1 or more, behind `context` that lie in the slot already."""

    missing: int
    context: int = 0

    def __post_init__(self) -> None:
        assert self.missing > 0
        assert self.context >= 0


@dataclass(frozen=True, slots=True)
class Here:
    """This worker, now."""

    cost: StepCost
    step_seconds: float
    """Until the step that runs now is over; 0 if none runs."""
    queued_tokens: int
    """Of other prompts, which later steps compute."""
    running: int
    """Streams that get a token from every step."""


@dataclass(frozen=True, slots=True)
class There:
    """A prefill service, as known here."""

    target: str
    cost: StepCost
    queue_seconds: float
    """Until it will have computed what it was asked for."""
    overhead_seconds: float
    """From asking to the first token, beside queue and computation."""
    seconds_per_token: float
    """Of moving KV."""
    cached_tokens: int | None = None
    """Of the prompt, in its prefix cache, as the router knows; None: it does not, and it is taken to have what the slot
    here has.
    """


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a way costs, seconds."""

    target: str
    first_token: float
    """The request waits so long for its first token."""
    exposed: float = 0.0
    """And then for KV."""
    harm: float = 0.0
    """Others wait so long, all of them together."""

    def cost(self, harm_weight: float) -> float:
        """Of everybody."""
        return self.first_token + self.exposed + harm_weight * self.harm


@dataclass(frozen=True, slots=True)
class Policy:
    """How to choose.

    Attributes:
        harm_weight: a second of a running stream counts as so many of the request's; 0: not at all.
        slack: the request waits for its first token at most this share longer than it must, to spare running streams.
    """

    harm_weight: float = 1.0
    slack: float = 0.05


def here(prompt: Prompt, worker: Here) -> Estimate:
    """What it costs to compute a prompt here, after the prompts that wait and beside the streams that run."""
    cost, running = worker.cost, worker.running
    plain = cost.decode(running)
    alone = cost.prefill(prompt.missing, prompt.context, running)
    # What waits shares steps with it: together they take less than one after the other.
    queue = cost.prefill(worker.queued_tokens, 0, running) if worker.queued_tokens else 0.0
    shared = cost.steps(worker.queued_tokens, running) + cost.steps(prompt.missing, running)
    shared -= cost.steps(worker.queued_tokens + prompt.missing, running)
    saved = shared * (cost.prefill_seconds + running * cost.seconds_per_decode)
    first_token = worker.step_seconds + queue + alone - saved
    longer = max(0.0, alone - cost.steps(prompt.missing, running) * plain)
    return Estimate(HERE, first_token, harm=longer * running)


def there(prompt: Prompt, worker: There) -> Estimate:
    """What it costs to have a prompt computed by a prefill service: nobody waits for it here."""
    cost, tokens = worker.cost, prompt.context + prompt.missing
    cached = prompt.context if worker.cached_tokens is None else min(worker.cached_tokens, tokens - 1)
    compute = cost.prefill(tokens - cached, cached)
    # KV moves while later chunks compute: the last chunk's follows the token, and what the link did not manage before.
    last = min(prompt.missing, tokens - cached - (cost.steps(tokens - cached) - 1) * cost.step_tokens)
    exposed = max(last * worker.seconds_per_token, prompt.missing * worker.seconds_per_token - compute)
    return Estimate(worker.target, worker.queue_seconds + compute + worker.overhead_seconds, exposed)


def choose(estimates: Sequence[Estimate], policy: Policy) -> Estimate:
    """The way that costs everybody least, of those whose first token comes about as early as it can.

    Args:
        estimates: one or more; of equals, the first is taken.
        policy: how to weigh.
    """
    earliest = min(estimate.first_token for estimate in estimates)
    early = [estimate for estimate in estimates if estimate.first_token <= (1 + policy.slack) * earliest]
    return min(early, key=lambda estimate: estimate.cost(policy.harm_weight))
