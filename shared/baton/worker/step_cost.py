"""What the steps of an engine take, and from that what a prompt costs. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from baton.internal.v1 import worker_pb2

CHANCE: Final = 0.2
"""By so much two measurements of the same steps may differ."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step, as a function of what it does.

    One that only goes on with r answers takes decode_seconds + r x seconds_per_decode. One that computes t tokens of
    prompts as well takes prefill_seconds + t x seconds_per_token + pairs x seconds_per_pair + r x seconds_per_decode,
    where pairs are those of a prompt token and a token it attends to: the time attention takes.

    No figure is negative; step_tokens, of a step at most, is above 0.
    """

    decode_seconds: float
    seconds_per_decode: float
    prefill_seconds: float
    seconds_per_token: float
    seconds_per_pair: float
    step_tokens: int

    def __post_init__(self) -> None:
        assert self.step_tokens > 0

    def steps(self, tokens: int, running: int = 0) -> int:
        """Steps that compute so many prompt tokens while `running` answers go on."""
        return -(-tokens // max(1, self.step_tokens - running))

    def decode(self, running: int) -> float:
        """Seconds of a step of so many answers; 0 if there are none."""
        return self.decode_seconds + running * self.seconds_per_decode if running else 0.0

    def prefill(self, tokens: int, context: int = 0, running: int = 0) -> float:
        """Seconds of the steps that compute `tokens` behind `context` others while `running` answers go on."""
        pairs = tokens * context + tokens * (tokens + 1) / 2
        per_step = self.prefill_seconds + running * self.seconds_per_decode
        return self.steps(tokens, running) * per_step + tokens * self.seconds_per_token + pairs * self.seconds_per_pair

    def about_as_fast_as(self, other: StepCost) -> bool:
        """Whether prompts take as long by both, as far as it can be measured."""
        tokens = 4 * max(self.step_tokens, other.step_tokens)
        mine, theirs = self.prefill(tokens), other.prefill(tokens)
        return max(mine, theirs) <= (1 + CHANCE) * min(mine, theirs)

    def to_proto(self) -> worker_pb2.StepCost:
        """For other services."""
        return worker_pb2.StepCost(
            decode_seconds=self.decode_seconds,
            seconds_per_decode=self.seconds_per_decode,
            prefill_seconds=self.prefill_seconds,
            seconds_per_token=self.seconds_per_token,
            seconds_per_pair=self.seconds_per_pair,
            step_tokens=self.step_tokens,
        )

    @staticmethod
    def from_proto(cost: worker_pb2.StepCost) -> StepCost | None:
        """What another service told; None if it makes no sense."""
        figures = (
            cost.decode_seconds,
            cost.seconds_per_decode,
            cost.prefill_seconds,
            cost.seconds_per_token,
            cost.seconds_per_pair,
        )
        # Written so that a NaN fails it too.
        if not all(0 <= figure < _LONGEST for figure in figures) or not cost.step_tokens:
            return None
        return StepCost(*figures, cost.step_tokens)


_LONGEST = 3600.0
"""Seconds."""
