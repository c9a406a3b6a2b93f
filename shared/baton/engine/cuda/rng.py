"""The counter-based random numbers of `baton.engine.rng`, many at once: the same bits from int64 tensors."""

from __future__ import annotations

import torch

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # as a signed number: products and sums wrap as those of unsigned ones do
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def signed(seed: int) -> int:
    """A seed, unsigned 64 bit, taken modulo 2^64, as the signed number of the same bits."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


def uniforms(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One number in [0, 1) per row.

    Args:
        seeds: int64 [R], see `signed`.
        positions: int64 [R].

    Returns:
        float64 [R], bit by bit what `baton.engine.rng.uniform` gives.
    """
    mixed = _mix(_mix(seeds + _GAMMA) + (positions + 1) * _GAMMA)
    return _shifted(mixed, 11).double() * 2.0**-53


def _mix(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Right, with zeros coming in; torch's own shift of signed numbers brings in the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
