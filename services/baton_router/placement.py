"""Which workers get a request: its decode worker, and the prefill workers that may compute its prompt, in order. Pure.

Everything is weighed in seconds, by what each worker says its steps take:

- a first token waits for the prompts queued at a worker, and for the blocks of its own that are not in the prefix cache
  there;
- at the decode worker, every token of the answer takes a step with all its streams in it, and makes theirs longer.

What a worker told is as old as its last word, so what this router sent it since counts on top. Whether the decode
worker computes a prompt itself or has it computed is its own choice (`baton_decode/placement.py`): this only says who
may. See docs/placement.md.
"""

from __future__ import annotations

import enum
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import xxhash

from baton.worker.step_cost import StepCost

MAX_PREFILL_CANDIDATES: Final = 3
UNQUANTIZED: Final = "none"
SOME_COST: Final = StepCost(0.01, 0.0002, 0.005, 0.0001, 0.0, 512)
"""Of a worker that tells none where no other does: what counts is that it is the same for all."""


_LONG_PROMPT: Final = 2048


class Strategy(enum.StrEnum):
    """What prefill workers are ordered by, and decode workers picked by."""

    PREFIX = "prefix"  # time to the first token, by what prefix caches hold
    HASH = "hash"  # the prompt's beginning chooses, unless that worker is much busier than the others
    LOAD = "load"  # queued work alone


class Reason(enum.StrEnum):
    """Why a worker was chosen."""

    ONLY = "only"  # there is no other
    PREFIX = "prefix"  # it has more of the prompt than any other
    LOAD = "load"  # it is done first, or has most room
    HASH = "hash"  # the prompt's beginning chose it
    COPY = "copy"  # the holder of a prefix that is asked for often is busy: another one gets it, too
    SPILL = "spill"  # another one has more of the prompt, or was chosen by its beginning, but is too busy


@dataclass(frozen=True, slots=True)
class Policy:
    """How to choose.

    Attributes:
        strategy: by what.
        slack_seconds: first tokens so much apart count as equally early; then the prompt's beginning decides.
        slack_share: where prompts are reused, so do first tokens that are apart by this share of what is computed.
        bound: by hash, a worker gets no more than so many times the mean of all queues, and what affinity can save.
    """

    strategy: Strategy = Strategy.PREFIX
    slack_seconds: float = 0.002
    slack_share: float = 0.5
    bound: float = 1.25


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker as placement sees it, for one request."""

    target: str
    incarnation: str
    fingerprint: str
    quantization: str = UNQUANTIZED
    """How it stores weights beyond their element type; `none` if it does not say."""
    draining: bool = False
    streams: int = 0
    """Requests there now, of all routers, as far as is known."""
    waiting: bool = False
    """Requests wait there for a slot or memory."""
    slots: int = 1
    """Requests it can hold KV of at once."""
    free_tokens: int = 0
    """KV tokens that will be free when what this router sent has grown as expected. Below zero: too few."""
    queued_tokens: int = 0
    """Of prompts, still to be computed there."""
    cached_tokens: int = 0
    """Of the prompt, in its prefix cache."""
    cost: StepCost | None = None
    """Of its steps; None: it does not say."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be placed.

    Attributes:
        tokens: of the prompt, 1 or more.
        answer_tokens: expected.
        beginning: stands for its first tokens: equal beginnings have equal ones.
        reuse: share of prompt tokens that were in prefix caches lately.
    """

    tokens: int
    answer_tokens: int = 0
    beginning: int = 0
    reuse: float = 0.0

    def __post_init__(self) -> None:
        assert self.tokens > 0


@dataclass(frozen=True, slots=True)
class Choice:
    """A worker that was chosen.

    Attributes:
        seconds: expected to the first token, if the prompt is computed there.
    """

    candidate: Candidate
    reason: Reason
    seconds: float


@dataclass(frozen=True, slots=True)
class Order:
    """Workers in the order they should be tried.

    Attributes:
        choices: the best first.
        rent: seconds that the first one's queue costs more than that of a worker which has less of the prompt.
    """

    choices: Sequence[Choice]
    rent: float = 0.0


@dataclass(slots=True)
class _Rated:
    """A candidate, and what it would take."""

    candidate: Candidate
    cost: StepCost
    queue: float
    compute: float
    rank: int
    """Of those equally good, the lowest is taken."""

    @property
    def seconds(self) -> float:
        return self.queue + self.compute


def prevailing_fingerprint(decode: Iterable[Candidate]) -> str | None:
    """The model most decode workers run, so a half-done roll-out never mixes two; the smallest of several."""
    votes = Counter(candidate.fingerprint for candidate in decode if not candidate.draining)
    return min(votes, key=lambda fingerprint: (-votes[fingerprint], fingerprint), default=None)


def answers_of(fingerprint: str, workers: Iterable[Candidate]) -> str:
    """What the answers of a model depend on: its fingerprint, and how those who serve it have quantized it.

    Which worker gets a request is not known when its answer is looked for. So workers that differ have a kind of
    answers together, which is neither the ones' nor the others'.
    """
    kinds = {w.quantization for w in workers if w.fingerprint == fingerprint and not w.draining}
    return fingerprint if kinds <= {UNQUANTIZED} else "+".join((fingerprint, *sorted(kinds)))


def order_prefill(
    prompt: Prompt, candidates: Sequence[Candidate], policy: Policy, rng: random.Random, paid: float = 0.0
) -> Order:
    """The prefill workers that may compute a prompt, MAX_PREFILL_CANDIDATES at most, the best first.

    Waiting for the worker that has a prefix is rent, computing it at another one is the price of a copy. When requests
    have paid as much rent for a prefix as a copy costs, the next one gets it a copy: so all of them together wait at
    most about twice as long as if they had known how often it would be asked for (ski rental, Karlin et al. 1988).

    Args:
        prompt: to be computed.
        candidates: that may get it.
        policy: how to choose.
        rng: for ties.
        paid: rent for the prefix that the candidates have most of, seconds.
    """
    rated = _rate(prompt, candidates, policy, rng)
    if policy.strategy is Strategy.HASH:
        ordered = _by_beginning(rated, policy)
    else:
        ordered = sorted(rated, key=lambda one: (one.seconds, one.rank))
        _favour_beginning(ordered, prompt, policy)
    choices = [Choice(one.candidate, _reason(one, rated, policy), one.seconds) for one in ordered]
    rent = 0.0
    if choices and choices[0].reason is Reason.PREFIX:
        holder = ordered[0]
        others = [i for i, one in enumerate(ordered) if one.candidate.cached_tokens < holder.candidate.cached_tokens]
        if others:
            rent = max(0.0, holder.queue - ordered[others[0]].queue)
            if rent and paid + rent >= ordered[others[0]].compute - holder.compute:
                copy = choices.pop(others[0])
                choices.insert(0, replace(copy, reason=Reason.COPY))
    return Order(choices[:MAX_PREFILL_CANDIDATES], rent)


def pick_decode(
    prompt: Prompt,
    candidates: Sequence[Candidate],
    policy: Policy,
    rng: random.Random,
    remote_seconds: float | None = None,
) -> Choice:
    """The decode worker that runs a request.

    One with room for it before one without. Of those with room, the one where first token, answer, and what the answer
    costs its neighbours add up to least. Of those without, the one that lacks least.

    Args:
        prompt: to be answered.
        candidates: that may get it, one or more.
        policy: how to choose.
        rng: for ties.
        remote_seconds: to the first token, if a prefill worker computes the prompt; None: there is none.
    """
    rated = _rate(prompt, candidates, policy, rng)
    need = prompt.tokens + prompt.answer_tokens

    def lack(one: _Rated) -> float:
        """Tokens of room that are missing; more than 0 as well while it makes others wait."""
        candidate = one.candidate
        tokens = max(0, need - candidate.cached_tokens - candidate.free_tokens)
        full = candidate.waiting or candidate.streams >= candidate.slots
        return tokens + (1 + candidate.streams / max(1, candidate.slots) if full else 0)

    def price(one: _Rated) -> float:
        """Seconds that this answer costs everybody there."""
        first_token = one.seconds if remote_seconds is None else min(one.seconds, remote_seconds)
        # Its own tokens wait for its neighbours' part of each step, and theirs for its own part.
        return first_token + prompt.answer_tokens * (2 * one.candidate.streams + 1) * one.cost.seconds_per_decode

    lacks = [lack(one) for one in rated]
    least = min(lacks)
    roomy = [one for one, tokens in zip(rated, lacks, strict=True) if tokens == least]
    if policy.strategy is Strategy.HASH:
        best = _by_beginning(roomy, policy)[0]
    else:
        prices = [price(one) for one in roomy]
        bar = min(prices) + policy.slack_seconds
        good = [one for one, seconds in zip(roomy, prices, strict=True) if seconds <= bar]
        best = min(good, key=lambda one: (one.candidate.streams, one.rank))
    return Choice(best.candidate, _reason(best, rated, policy), best.seconds)


def _rate(prompt: Prompt, candidates: Sequence[Candidate], policy: Policy, rng: random.Random) -> list[_Rated]:
    """What each one would take."""
    typical = _typical(candidates)
    beginning = prompt.beginning.to_bytes(8, "little")
    by_chance = policy.strategy is Strategy.LOAD or not prompt.beginning
    rated = []
    for candidate in candidates:
        cost = candidate.cost
        if cost is None or (cost is not typical and cost.about_as_fast_as(typical)):
            cost = typical  # what two workers measure of equal steps differs by chance
        cached = min(candidate.cached_tokens, prompt.tokens - 1) if policy.strategy is Strategy.PREFIX else 0
        queue = cost.prefill(candidate.queued_tokens) if candidate.queued_tokens else 0.0
        compute = cost.prefill(prompt.tokens - cached, cached)
        rank = rng.getrandbits(64) if by_chance else xxhash.xxh3_64_intdigest(beginning + candidate.target.encode())
        rated.append(_Rated(candidate, cost, queue, compute, rank))
    return rated


def _typical(candidates: Sequence[Candidate]) -> StepCost:
    """The cost of the worker in the middle, by how long a long prompt takes."""
    costs = [candidate.cost for candidate in candidates if candidate.cost is not None]
    return sorted(costs, key=lambda cost: cost.prefill(_LONG_PROMPT))[len(costs) // 2] if costs else SOME_COST


def _favour_beginning(ordered: list[_Rated], prompt: Prompt, policy: Policy) -> None:
    """Of those that are about as early as the earliest, the beginning's own goes first: equal ones meet there.

    Where prompts are reused, it may wait a little for that: what it leaves at its own place is found again.
    """
    if len(ordered) > 1 and policy.slack_seconds:
        slack = max(policy.slack_seconds, policy.slack_share * prompt.reuse * ordered[0].compute)
        bar = ordered[0].seconds + slack
        own = min((one for one in ordered if one.seconds <= bar), key=lambda one: one.rank)
        ordered.remove(own)
        ordered.insert(0, own)


def _by_beginning(rated: Sequence[_Rated], policy: Policy) -> list[_Rated]:
    """Consistent hashing with bounded loads (Mirrokni et al. 2018), by rendezvous: the beginning's own worker first, or
    the next in its order while that one's queue is too long.
    """
    mean = sum(one.queue for one in rated) / max(1, len(rated))
    return sorted(rated, key=lambda one: (one.queue > policy.bound * mean + one.compute, one.rank))


def _reason(chosen: _Rated, rated: Sequence[_Rated], policy: Policy) -> Reason:
    if len(rated) == 1:
        return Reason.ONLY
    if policy.strategy is Strategy.HASH:
        return Reason.HASH if chosen.rank == min(one.rank for one in rated) else Reason.SPILL
    most = max(one.candidate.cached_tokens for one in rated)
    if policy.strategy is Strategy.LOAD or not most:
        return Reason.LOAD
    return Reason.PREFIX if chosen.candidate.cached_tokens == most else Reason.SPILL
