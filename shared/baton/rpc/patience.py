"""A timeout that does not take this process's own lateness for its peer's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

_TURNS: Final = 8
"""Turns of the event loop from the arrival of an answer to who waits for it: a few with redis-py, so many with gRPC."""


@asynccontextmanager
async def patience(seconds: float) -> AsyncIterator[None]:
    """Like `asyncio.timeout`, but what has arrived by then is taken first.

    A process that is busy finds an answer and the end of the timeout in the same turn of its event loop, and ends the
    wait although the answer was there in time. So a few turns pass before the wait ends. An idle loop takes
    microseconds for them; a busy one as long as it is late anyway.

    Raises:
        TimeoutError: nothing came.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.Handle
    async with asyncio.timeout(None) as limit:

        def due(turns: int) -> None:
            nonlocal timer
            if turns:
                timer = loop.call_soon(due, turns - 1)
            else:
                limit.reschedule(loop.time())

        timer = loop.call_later(seconds, due, _TURNS)
        try:
            yield
        finally:
            timer.cancel()
