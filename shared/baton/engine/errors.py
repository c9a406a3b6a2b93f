"""Errors of the engine."""

from __future__ import annotations


class EngineError(Exception):
    """Anything the engine raises on purpose."""


class UnsupportedModel(EngineError):
    """The model cannot be served: the message says which and why."""


class InvalidLogits(EngineError):
    """The model produced logits that no token can be sampled from."""
