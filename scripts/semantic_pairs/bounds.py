"""How far off a share that was counted may be: Clopper-Pearson, exact for independent trials. Pure."""

from __future__ import annotations

from collections.abc import Callable
from math import comb, exp, log, log1p

_STEPS = 60


def upper(events: int, trials: int, confidence: float = 0.95) -> float:
    """The share that is not exceeded with this confidence (one-sided)."""
    if trials == 0 or events >= trials:
        return 1.0
    return _where(lambda share: _at_most(events, trials, share) > 1 - confidence)


def lower(events: int, trials: int, confidence: float = 0.95) -> float:
    """The share that is reached at least with this confidence (one-sided)."""
    return 1 - upper(trials - events, trials, confidence)


def _where(holds: Callable[[float], bool]) -> float:
    """The share up to which something holds, by halving."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


def _at_most(events: int, trials: int, share: float) -> float:
    """Probability of so many events or fewer."""
    if share <= 0:
        return 1.0
    if share >= 1:
        return 0.0
    return sum(exp(_log_comb(trials, k) + k * log(share) + (trials - k) * log1p(-share)) for k in range(events + 1))


def _log_comb(n: int, k: int) -> float:
    """Logarithm of a number that may be too large for a float."""
    value = comb(n, k)
    shift = max(0, value.bit_length() - 52)
    return log(value >> shift) + shift * log(2)
