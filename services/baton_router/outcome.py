"""How a request can end, in the words that metrics, records and `baton top` use."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from baton.rpc.errors import BatonError

OK = "ok"
CANCELLED = "cancelled"
INTERNAL = "internal"


def outcomes() -> list[str]:
    """All of them: well, cancelled, or the reason of an error in lower case."""
    return [OK, CANCELLED, *sorted({INTERNAL, *(error.reason.lower() for error in _below(BatonError))})]


def outcome_of(error: BaseException) -> str:
    """How a request that raised this ended."""
    if isinstance(error, BatonError):
        return error.reason.lower()
    return CANCELLED if isinstance(error, asyncio.CancelledError | GeneratorExit) else INTERNAL


def _below(error: type[BatonError]) -> Iterator[type[BatonError]]:
    """An error and every kind of it."""
    yield error
    for kind in error.__subclasses__():
        yield from _below(kind)
