"""Metrics that every service has."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter

REFUSED: Final = Counter(
    "baton_refused_calls",
    "Calls refused for who made them, by method and reason (UNAUTHENTICATED, PERMISSION_DENIED).",
    ["method", "reason"],
)
