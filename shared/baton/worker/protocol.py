"""The number of the internal protocol: what services of different releases must have in common to work together."""

from __future__ import annotations

from typing import Final

PROTOCOL: Final = 1
"""Raised when a release's internal messages mean something else than they did, or something that used to be optional is
needed; not when fields are added that may be ignored. Router and workers with equal numbers work together, whatever
their versions."""
