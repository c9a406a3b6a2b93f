"""What this router has at one worker: the part of its load that is known at once, and not when it next tells. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

UNSEEN_SECONDS: Final = 0.1
"""A request sent so long before a worker told its load may not be in it: it was on the way, or the word was."""


@dataclass(slots=True, eq=False)
class Sent:
    """One request at a worker.

    Attributes:
        at: when it was sent, seconds of a monotonic clock.
        prompt_tokens: of it that are expected to be computed there; 0 once they are.
        kv_tokens: it is expected to hold in the end.
    """

    at: float
    prompt_tokens: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class Unseen:
    """What was sent too late to be in what a worker told."""

    requests: int
    prompt_tokens: int
    kv_tokens: int


class InFlight:
    """Requests of this router at one worker.

    Attributes:
        kv_tokens: they are expected to hold in the end, all of them.
    """

    def __init__(self) -> None:
        self.kv_tokens = 0
        self._sent: dict[Sent, None] = {}  # in order

    def __len__(self) -> int:
        return len(self._sent)

    def add(self, sent: Sent) -> None:
        """A request is sent. None before was sent later."""
        self._sent[sent] = None
        self.kv_tokens += sent.kv_tokens

    def remove(self, sent: Sent) -> None:
        """It is there no more."""
        del self._sent[sent]
        self.kv_tokens -= sent.kv_tokens

    def unseen(self, told: float) -> Unseen:
        """What is not in what the worker told then."""
        requests = prompt_tokens = kv_tokens = 0
        for sent in reversed(self._sent):
            if sent.at < told - UNSEEN_SECONDS:
                break
            requests += 1
            prompt_tokens += sent.prompt_tokens
            kv_tokens += sent.kv_tokens
        return Unseen(requests, prompt_tokens, kv_tokens)
