"""Which worker gets a request. Pure: plain values in, a choice out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

MAX_PREFILL_CANDIDATES = 3
UNQUANTIZED = "none"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker as placement sees it."""

    target: str
    incarnation: str
    fingerprint: str
    quantization: str
    """How it stores weights beyond their element type; `none` if it does not say."""
    in_flight: int
    """Requests this router has there now; not what the worker last reported, which is older."""
    slots: int
    """Requests it can hold KV of at once."""
    draining: bool

    @property
    def pressure(self) -> float:
        """Requests per slot."""
        return self.in_flight / max(1, self.slots)


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


def pick_decode(
    decode: Iterable[Candidate], fingerprint: str, avoid: Collection[str], rng: random.Random
) -> Candidate | None:
    """The decode worker with the fewest requests per slot; chance breaks ties. None: there is none.

    Args:
        decode: known decode workers.
        fingerprint: of the model asked for.
        avoid: incarnations that already failed this request.
        rng: for ties.
    """
    usable = [c for c in decode if c.fingerprint == fingerprint and not c.draining and c.incarnation not in avoid]
    return min(usable, key=lambda candidate: (candidate.pressure, rng.random()), default=None)


def order_prefill(prefill: Iterable[Candidate], fingerprint: str, rng: random.Random) -> Sequence[Candidate]:
    """The prefill workers to try, the least busy first; chance breaks ties."""
    usable = [c for c in prefill if c.fingerprint == fingerprint and not c.draining]
    return sorted(usable, key=lambda candidate: (candidate.pressure, rng.random()))[:MAX_PREFILL_CANDIDATES]
