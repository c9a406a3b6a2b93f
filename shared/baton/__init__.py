"""Baton: a gRPC mesh that serves language models from separate prefill and decode tiers."""

__version__ = "0.1.0"
