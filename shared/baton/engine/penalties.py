"""Repetition, presence and frequency penalties over the tokens seen so far."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from baton.engine.messages import SamplingParams


def needs_history(sampling: SamplingParams) -> bool:
    """Whether the next token depends on earlier ones by other ways than the model: whether any penalty is on."""
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


class PenaltyState:
    """Distinct tokens of one request and how often each was generated, kept up to date step by step.

    A request carries one from step to step, so that a step costs Python work per new token only, not per token of
    context. It is a cache: built afresh from the same prompt and output it gives the same penalties.
    """

    __slots__ = ("_consumed", "_counts", "_ids", "_place", "_prompt_length")

    def __init__(self) -> None:
        self._ids = array("q")  # distinct tokens, in order of first appearance
        self._counts = array("q")  # of each: how often generated; 0 = in the prompt only
        self._place: dict[int, int] = {}  # token -> its place in both
        self._prompt_length = 0
        self._consumed = 0  # output tokens counted

    def update(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Take in what was appended to `output` since the last call; a shorter history starts over."""
        if len(output) < self._consumed or len(prompt) != self._prompt_length:
            self._start(prompt)
        for index in range(self._consumed, len(output)):
            self._add(output[index], 1)
        self._consumed = len(output)

    def apply(self, logits: np.ndarray, sampling: SamplingParams) -> None:
        """Change one row of logits, float32 [V], in place. Ids outside the row are ignored.

        Repetition first (positive logits are divided, others multiplied), then frequency, then presence.
        """
        ids = np.array(self._ids, dtype=np.int64)
        counts = np.array(self._counts, dtype=np.float32)
        if (inside := ids < len(logits)).sum() < len(ids):
            ids, counts = ids[inside], counts[inside]
        values = logits[ids]
        penalty = np.float32(sampling.repetition_penalty)
        values = np.where(values > 0, values / penalty, values * penalty)
        values -= counts * np.float32(sampling.frequency_penalty)
        values -= (counts > 0) * np.float32(sampling.presence_penalty)
        logits[ids] = values

    def _start(self, prompt: Sequence[int]) -> None:
        self._ids, self._counts, self._place = array("q"), array("q"), {}
        self._prompt_length, self._consumed = len(prompt), 0
        for token in dict.fromkeys(prompt):
            self._add(token, 0)

    def _add(self, token: int, count: int) -> None:
        place = self._place.get(token)
        if place is None:
            self._place[token] = len(self._ids)
            self._ids.append(token)
            self._counts.append(count)
        else:
            self._counts[place] += count
