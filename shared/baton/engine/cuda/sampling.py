"""Sampling on the device: the tokens of `baton.engine.sampler`, for the rows that need no history, without a wait.

The arithmetic is the host's: float32 up to the logarithms of the weights, float64 sums over candidates in the order of
(-logit, id). What may differ is the last bit of an exponential, and the order in which a sum is taken. So every
comparison that decides something (the draw, the edge of top-p, that of min-p) is made with a margin, and a row in which
one is closer than that is left to the host: it comes out as UNSETTLED. The cases:

- the draw falls within 1e-12 of the mass from the edge between two tokens;
- the mass is that of the whole vocabulary, from float32 exponentials on both sides, as without top-k and min-p: then
  the margin of the draw, or of the edge of top-p, is 1e-6;
- a weight is within 1e-12 of min-p;
- the decision needs more than the CANDIDATES most likely tokens, or one that ties with the last of them: top-k above
  that number, flat distributions;
- the highest logit is not finite: the host says what is wrong.

Greedy rows with a finite highest logit are always settled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from baton.engine.cuda.rng import signed, uniforms
from baton.engine.penalties import needs_history
from baton.engine.sampler import GREEDY_BELOW, SampleRow

UNSETTLED = -1
"""In place of a token: the row is left to the host."""

CANDIDATES = 1024
_EXACT = 1e-12  # what the order of a float64 sum over CANDIDATES, and the last bits of its terms, may change
_ROUGH = 1e-6  # twice what float32 exponentials may be off by, on either side


def needs_host(row: SampleRow) -> bool:
    """Whether only the host can sample a row: its logits are changed first."""
    return bool(row.blocked) or bool(row.sampling.logit_bias) or needs_history(row.sampling)


class SamplingInputs:
    """Settings of up to `rows` rows on the device, copied in one piece per kind of number.

    Args:
        rows: at most.
        device: where.
        pinned: whether the host's side is page-locked.
    """

    def __init__(self, rows: int, device: torch.device, *, pinned: bool) -> None:
        # Two of each, used in turn: a copy may be under way when the next step's is filled.
        self._whole = [torch.zeros(3 * rows, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._real = [torch.zeros(3 * rows, dtype=torch.float64, pin_memory=pinned) for _ in range(2)]
        self._device = device
        self._turn = 0

    def sample(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
        """Sample every row of `logits`, float32 [R, V], without waiting for the device.

        Returns:
            int64 [R]; UNSETTLED where the host must decide, which includes all rows it alone can sample.
        """
        self._turn = 1 - self._turn
        count = len(rows)
        whole, real = (side[self._turn][: 3 * count].view(3, count) for side in (self._whole, self._real))
        whole.numpy()[:] = np.array([[signed(r.sampling.seed), r.position, r.sampling.top_k] for r in rows]).T
        # A row for the host is greedy here: the cheapest way to no answer.
        real.numpy()[:] = np.array(
            [[0.0 if needs_host(r) else r.sampling.temperature, r.sampling.top_p, r.sampling.min_p] for r in rows]
        ).T
        greedy = all(r.sampling.temperature < GREEDY_BELOW or needs_host(r) for r in rows)
        tokens, peaks = logits.argmax(dim=1), logits.amax(dim=1)  # argmax: the first of equal ones
        if not greedy:
            wholes = whole.to(self._device, non_blocking=True)
            reals = real.to(self._device, non_blocking=True)
            drawn = draw(logits, peaks, wholes, reals)
            tokens = torch.where(reals[0] < GREEDY_BELOW, tokens, drawn)
        tokens = tokens.masked_fill(~peaks.isfinite(), UNSETTLED)
        for i, row in enumerate(rows):
            if needs_host(row):
                tokens[i] = UNSETTLED
        return tokens


def draw(logits: torch.Tensor, peaks: torch.Tensor, wholes: torch.Tensor, reals: torch.Tensor) -> torch.Tensor:
    """Draw a token per row: see `baton.engine.draw.draw`, whose answers these are.

    Args:
        logits: float32 [R, V].
        peaks: float32 [R], their maxima.
        wholes: int64 [3, R]: seeds, positions, top-k (0: off).
        reals: float64 [3, R]: temperatures (rows below GREEDY_BELOW get some answer or other), top-p, min-p.

    Returns:
        int64 [R], tokens or UNSETTLED.
    """
    vocabulary = logits.shape[1]
    limit = min(CANDIDATES, vocabulary)
    complete = limit == vocabulary
    u = uniforms(wholes[0], wholes[1])
    top_k, top_p, min_p = wholes[2], reals[1], reals[2]
    # A tensor by a tensor: by a scalar, a device multiplies with the reciprocal.
    scale = reals[0].clamp(min=GREEDY_BELOW).float().view(-1, 1)
    found, ids = logits.topk(limit, dim=1)
    ids, by_id = ids.sort(dim=1)
    found, by_logit = found.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, by_logit)
    weights = ((found - peaks.view(-1, 1)) / scale).double().exp()
    # Of several tokens that tie at the end, some may be missing: there the candidates end.
    have = torch.full_like(top_k, limit)
    if not complete:
        have = (found > found[:, -1:]).sum(dim=1)

    kept, closed = have.clone(), torch.full_like(have, complete, dtype=torch.bool)
    index = torch.arange(limit, device=logits.device).view(1, -1)
    inside = index < have.view(-1, 1)
    by_min_p = (inside & (weights >= min_p.view(-1, 1))).sum(dim=1).clamp(min=1)
    has_min_p, has_top_k = min_p > 0, top_k > 0
    kept = torch.where(has_min_p, torch.minimum(kept, by_min_p), kept)
    closed = closed | (has_min_p & (kept < have))
    unsettled = has_min_p & (inside & ((weights - min_p.view(-1, 1)).abs() <= _EXACT)).any(dim=1)
    by_top_k = has_top_k & (kept >= top_k)
    kept = torch.where(by_top_k, top_k, kept)
    closed = closed | by_top_k
    unsettled |= ~closed & (has_min_p | has_top_k)

    cumulative = torch.where(index < kept.view(-1, 1), weights, 0.0).cumsum(dim=1)
    last = (kept - 1).clamp(min=0).view(-1, 1)
    kept_mass = cumulative.gather(1, last).squeeze(1)
    whole_mass = ((logits - peaks.view(-1, 1)) / scale).exp().sum(dim=1, dtype=torch.float64)
    # Without min-p and top-k the host may have taken the mass from float32 exponentials even where all fits.
    rough = ~(has_min_p | has_top_k)
    mass = torch.where(closed, kept_mass, whole_mass)
    margin = torch.where(rough, _ROUGH, _EXACT) * mass

    has_top_p = top_p < 1
    edge = top_p * mass
    inside = index < kept.view(-1, 1)
    cut = (inside & (cumulative < edge.view(-1, 1))).sum(dim=1)
    near = (inside & ((cumulative - edge.view(-1, 1)).abs() <= margin.view(-1, 1))).any(dim=1)
    unsettled |= has_top_p & (near | ((cut >= kept) & ~closed))
    by_top_p = torch.minimum(cut + 1, kept)
    kept = torch.where(has_top_p, by_top_p, kept)
    cut_mass = cumulative.gather(1, (kept - 1).clamp(min=0).view(-1, 1)).squeeze(1)
    mass = torch.where(has_top_p, cut_mass, mass)
    margin = torch.where(has_top_p, _EXACT * mass, margin)

    target = u * mass
    inside = index < kept.view(-1, 1)
    place = (inside & (cumulative <= target.view(-1, 1))).sum(dim=1)
    # Zero is no edge: nothing lies before the first token.
    near = (inside & ((cumulative - target.view(-1, 1)).abs() <= margin.view(-1, 1))).any(dim=1)
    unsettled |= near | (place >= kept) | (kept < 1)
    token = ids.gather(1, place.clamp(max=limit - 1).view(-1, 1)).squeeze(1)
    return token.masked_fill(unsettled, UNSETTLED)
