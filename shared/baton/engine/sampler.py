"""From logits to tokens.

The token of a row is a pure function of (logits, sampling settings, seed, absolute position, tokens before): no row
sees another one, and no state is kept between steps, except a cache of counts. Order of operations, as in vLLM's V1
sampler where that defines it:

1. logits to float32
2. logit bias
3. repetition, then frequency, then presence penalty
4. blocked tokens (minimum length) to -inf
5. greedy: the highest logit, lowest id on a tie
6. otherwise temperature, min-p, top-k, top-p (of what min-p and top-k left), and one uniform number inverts the CDF

Unlike vLLM, top-k keeps exactly k tokens where several logits tie at the edge: those of the lowest ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from baton.engine.draw import draw
from baton.engine.errors import InvalidLogits
from baton.engine.messages import SamplingParams
from baton.engine.penalties import PenaltyState, needs_history
from baton.engine.rng import uniform

GREEDY_BELOW = 1e-5  # temperatures below are greedy, as in vLLM: they would only overflow on the way to the same token


@dataclass(slots=True)
class SampleRow:
    """How to sample one row of logits, and after which tokens.

    `prompt` and `output` are read only if `needs_history(sampling)`; they may be empty otherwise. `blocked` are tokens
    that must not come next: end-of-sequence and stop tokens before min_tokens were generated. `penalties` may be kept
    from step to step, one per request, to save recounting; without one the row is counted afresh. Bias and blocks of
    ids outside the vocabulary have nothing to act on and are ignored.
    """

    sampling: SamplingParams
    position: int  # absolute, of the token to be sampled: len(prompt) + len(output)
    prompt: Sequence[int]
    output: Sequence[int]
    blocked: tuple[int, ...] = ()
    penalties: PenaltyState | None = field(default=None, repr=False)


class InvalidRows(InvalidLogits):
    """Some rows hold no logits a token can be sampled from; `rows` are their indices. The others are not to blame."""

    def __init__(self, rows: list[int], reason: str) -> None:
        super().__init__(reason)
        self.rows = rows


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Sample the next token of every row.

    Args:
        logits: [R, V], any floating type and device; not changed.
        rows: R of them.

    Returns:
        R token ids.

    Raises:
        InvalidRows: rows whose logits contain NaN or +inf, or in which every token is -inf or blocked.
        ValueError: shapes do not match.
    """
    if logits.dim() != 2 or logits.shape[0] != len(rows) or logits.shape[1] == 0:
        raise ValueError(f"logits of shape {list(logits.shape)} for {len(rows)} rows")
    if not rows:
        return []
    values: np.ndarray = logits.detach().to("cpu", torch.float32).numpy()
    tokens: list[int] = values.argmax(axis=1).tolist()  # the first of equal ones; a NaN counts as highest
    bad: dict[int, str] = {}
    for i, row in enumerate(rows):
        line = values[i]
        if _edits(row):
            line = _edited(line, row)
            tokens[i] = int(line.argmax())
        peak = float(line[tokens[i]])
        if not np.isfinite(peak):
            bad[i] = "no token left" if peak == -np.inf else f"logit of token {tokens[i]} is {peak}"
        elif row.sampling.temperature >= GREEDY_BELOW:
            tokens[i] = draw(line, peak, row.sampling, uniform(row.sampling.seed, row.position))
    if bad:
        first, reason = next(iter(bad.items()))
        raise InvalidRows(list(bad), f"cannot sample {len(bad)} of {len(rows)} rows; row {first}: {reason}")
    return tokens


def _edits(row: SampleRow) -> bool:
    return bool(row.blocked) or bool(row.sampling.logit_bias) or needs_history(row.sampling)


def _edited(line: np.ndarray, row: SampleRow) -> np.ndarray:
    """A copy of a row's logits, float32 [V], with bias, penalties and blocks applied."""
    line = line.copy()
    for token, bias in row.sampling.logit_bias.items():
        if 0 <= token < len(line):
            line[token] += np.float32(bias)
    if needs_history(row.sampling):
        state = row.penalties if row.penalties is not None else PenaltyState()
        state.update(row.prompt, row.output)
        state.apply(line, row.sampling)
    for token in row.blocked:
        if 0 <= token < len(line):
            line[token] = -np.inf
    return line
