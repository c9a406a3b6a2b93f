"""Draw one token from one row of logits: inverse CDF over the candidates, most likely first."""

from __future__ import annotations

import numpy as np

from baton.engine.messages import SamplingParams

# Candidates are taken down to these logarithms of the weight relative to the most likely token's, the second and third
# only when the ones before do not settle the draw. e^-6 holds a few tokens of a trained model's typical distribution,
# so sorting a whole vocabulary is rare. A threshold, unlike a count, never cuts between equal logits.
_FLOORS = (-6.0, -12.0, -np.inf)


def draw(logits: np.ndarray, peak: float, sampling: SamplingParams, u: float) -> int:
    """The token that the number `u` picks.

    Weights are exp((logit - peak) / temperature); candidates are ordered by (-logit, id). Min-p keeps weights of at
    least min_p (the peak's is 1), top-k the first k of these, top-p the shortest prefix of those whose mass reaches
    top_p of theirs. The token is the first whose cumulative mass exceeds u times the mass kept. Sums are float64 over
    the sorted order, so a prefix sums to the same number however many candidates follow it.

    Args:
        logits: float32 [V], no NaN; -inf is never drawn.
        peak: its maximum, finite.
        sampling: temperature > 0.
        u: in [0, 1).
    """
    with np.errstate(over="ignore"):  # at tiny temperatures the far tail becomes -inf, weight 0, as it should
        x = logits - np.float32(peak)
        x /= np.float32(sampling.temperature)
    for floor in _FLOORS:
        ids = np.flatnonzero(x >= floor) if floor > -np.inf else np.flatnonzero(x > -np.inf)
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        weights = np.exp(x[ids], dtype=np.float64)
        place = _pick(x, weights, sampling, u, complete=floor == -np.inf)
        if place is not None:
            return int(ids[place])
    raise AssertionError("the complete candidates settle every draw")


def _pick(x: np.ndarray, weights: np.ndarray, sampling: SamplingParams, u: float, *, complete: bool) -> int | None:
    """Index of the drawn one among `weights`, float64 descending; None if it depends on weights not among them."""
    kept = len(weights)
    closed = complete  # whether all that is kept so far lies within weights[:kept]
    if sampling.min_p > 0:
        kept = int(np.searchsorted(-weights, -sampling.min_p, side="right"))
        kept = max(kept, 1)
        closed = closed or kept < len(weights)
    if sampling.top_k and kept >= sampling.top_k:
        kept, closed = sampling.top_k, True
    if not closed and (sampling.min_p > 0 or sampling.top_k):
        return None
    cumulative = np.cumsum(weights[:kept])
    # float32 exponentials are exact enough here: what lies within their error of the edge is settled by the next floor.
    mass = float(cumulative[-1]) if closed else float(np.exp(x).sum(dtype=np.float64))
    if sampling.top_p < 1:
        cut = int(np.searchsorted(cumulative, sampling.top_p * mass, side="left"))
        if cut >= kept and not closed:
            return None
        kept, closed = min(cut + 1, kept), True
        mass = float(cumulative[kept - 1])
    place = int(np.searchsorted(cumulative[:kept], u * mass, side="right"))
    if place < kept:
        return place
    # u * mass may round up to mass; the last token that adds to it is then the one, not a weightless one behind.
    return int(np.searchsorted(cumulative[:kept], mass, side="left")) if closed else None
