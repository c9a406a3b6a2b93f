"""Counter-based random numbers: one uniform number per (seed, absolute position), with no state to keep or hand over.

SplitMix64 (Steele, Lea, Flood 2014). The seed is mixed once on its own, so that neighbouring seeds give unrelated
streams rather than shifted copies of one; position p then takes the stream's p-th output.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: consecutive states visit all 64-bit numbers


def mix64(z: int) -> int:
    """SplitMix64's finalizer: a bijection of 64-bit numbers in which every input bit flips every output bit."""
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1), a multiple of 2^-53, that decides the token at `position`.

    Args:
        seed: unsigned 64 bit; taken modulo 2^64.
        position: absolute, counted from the first prompt token; not negative.
    """
    return (mix64(mix64(seed + _GAMMA) + (position + 1) * _GAMMA) >> 11) * 2.0**-53
