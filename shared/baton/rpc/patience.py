"""A timeout that does not take this process's own lateness for its peer's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

_SLICES: Final = 2
"""Parts of the wait, one after the other: a loop that is late for one adds to the wait what it was late by. Few, since
an idle loop is late by up to a millisecond for each."""
_TURNS: Final = 8
"""Turns of the event loop from the arrival of an answer to who waits for it: a few with redis-py, so many with gRPC."""


@asynccontextmanager
async def patience(seconds: float) -> AsyncIterator[None]:
    """Like `asyncio.timeout`, but of the time in which this process was able to look.

    A process that is busy for longer than the timeout finds an answer and the end of the wait in the same turn of its
    event loop, and ends the wait although the answer was there in time; and what it has to do for the answer to come,
    such as writing the question, waits as well. So the wait is cut in slices, each of which begins when the one before
    is noticed to be over, and in the end a few turns pass. An idle loop waits `seconds` and some microseconds.

    Raises:
        TimeoutError: nothing came.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.Handle
    async with asyncio.timeout(None) as limit:

        def wait(slices: int) -> None:
            nonlocal timer
            timer = loop.call_later(seconds / _SLICES, wait, slices - 1) if slices else loop.call_soon(end, _TURNS)

        def end(turns: int) -> None:
            nonlocal timer
            if turns:
                timer = loop.call_soon(end, turns - 1)
            else:
                limit.reschedule(loop.time())

        wait(_SLICES)
        try:
            yield
        finally:
            timer.cancel()
