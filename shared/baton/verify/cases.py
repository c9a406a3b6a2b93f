"""What is injected where, and which entry of the ledger must show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from baton.verify.lab import Lab

DELAY: Final = 0.05
"""Seconds of each injected delay."""
TOKENS: Final = 3
"""Generated tokens of a request."""
LONG_TOKENS: Final = 150
"""The same where the client stops reading: more than the buffers on the way to it hold."""
HANDOFF_BYTES_PER_SECOND: Final = 2_000_000


@dataclass(frozen=True, slots=True)
class Case:
    """One experiment.

    Attributes:
        name: what is wrong.
        inject: makes it so.
        hop, kind: the entry that must grow.
        seconds: by how much; None: by as much as the whole request does.
        cached: the request is asked of the response cache, and hits.
        stall_seconds: how long the client stops reading in the middle.
        prompt_tokens: length of the prompt.
    """

    name: str
    inject: Callable[[Lab], None]
    hop: str
    kind: str
    seconds: float | None
    cached: bool = False
    stall_seconds: float = 0.0
    prompt_tokens: int = 32


def _forward(link: str) -> Callable[[Lab], None]:
    def inject(lab: Lab) -> None:
        lab.links[link].forward.delay_seconds = DELAY

    return inject


def _backward(link: str) -> Callable[[Lab], None]:
    def inject(lab: Lab) -> None:
        lab.links[link].backward.delay_seconds = DELAY

    return inject


def _steps(tier: str) -> Callable[[Lab], None]:
    def inject(lab: Lab) -> None:
        lab.slow_steps(tier, DELAY)

    return inject


def _narrow_handoff(lab: Lab) -> None:
    lab.links["prefill-0"].backward.bytes_per_second = HANDOFF_BYTES_PER_SECOND


CASES: Final = (
    Case("router to decode, +50 ms", _forward("decode-0"), "decode", "network", DELAY),
    Case("decode to router, +50 ms", _backward("decode-0"), "decode", "network", DELAY),
    Case("decode to prefill, +50 ms", _forward("prefill-0"), "prefill", "network", DELAY),
    Case("prefill to decode, +50 ms", _backward("prefill-0"), "prefill", "network", DELAY),
    Case("router to cache, +50 ms", _forward("cache"), "cache", "network", DELAY, cached=True),
    Case("cache to router, +50 ms", _backward("cache"), "cache", "network", DELAY, cached=True),
    Case("slow Redis, +50 ms", _forward("redis"), "cache", "cache", DELAY, cached=True),
    Case("slow prefill step, +50 ms", _steps("prefill"), "prefill", "compute", DELAY),
    Case("slow decode steps, +50 ms each", _steps("decode"), "decode", "compute", DELAY * (TOKENS - 1)),
    Case("handoff at 2 MB/s", _narrow_handoff, "decode", "transfer", None, prompt_tokens=1000),
    Case("client stops reading for 4 s", lambda lab: None, "router", "stall", None, stall_seconds=4.0),
)
