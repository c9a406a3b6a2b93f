"""Who makes a call, as its authentication says; never as a field of the request says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller.

    Attributes:
        tenant: whose limits, caches and figures the call counts to. Empty: nobody in particular.
        subject: who it is within the tenant, for example a token's subject; for people to read. Empty: not told.
    """

    tenant: str = ""
    subject: str = ""


ANONYMOUS: Final = Caller()
"""Whoever calls where nothing is asked for."""

_current: ContextVar[Caller] = ContextVar("current_caller", default=ANONYMOUS)


def current_caller() -> Caller:
    """Who makes the call that this task serves; `ANONYMOUS` outside of any."""
    return _current.get()


@contextmanager
def calling_as(caller: Caller) -> Iterator[None]:
    """Run the block, and the tasks that it starts, as on behalf of this caller."""
    token = _current.set(caller)
    try:
        yield
    finally:
        _current.reset(token)
