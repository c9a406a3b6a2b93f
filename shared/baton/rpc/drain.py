"""How a service ends without failing anybody: what it serves may finish, what comes late is sent elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

from baton.rpc.errors import Unavailable

_OPEN: Final = ("/grpc.health.v1.Health/", "/grpc.reflection.", "/baton.internal.v1.Worker/")
"""Methods that are served to the end: they tell of the drain, and never hold it up for long."""
_TURN_SECONDS: Final = 0.05
_UNWIND_SECONDS: Final = 2.0  # for calls that were cut off to free what they hold


class Drain:
    """The calls of one process, and the way they end when it is told to stop.

    A server that is shut down drops calls that come in that instant, and cancels those it has: their callers could not
    tell that from a cancellation of their own. So the server is shut down last. Before that, new calls are answered
    UNAVAILABLE, which says "somewhere else", and so are, when their time is over, those that did not finish.

    Attributes:
        begun: nothing new is taken.
    """

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self._calls: set[asyncio.Task[Any]] = set()
        self._cut_off: set[asyncio.Task[Any]] = set()

    @property
    def calls(self) -> int:
        """Calls being served."""
        return len(self._calls)

    @asynccontextmanager
    async def serving(self, method: str) -> AsyncIterator[None]:
        """Serve a call within the block.

        Args:
            method: full name, as "/baton.v1.Inference/Generate".

        Raises:
            Unavailable: the service is draining, or stopped before the call had finished.
        """
        if self.begun.is_set() and not method.startswith(_OPEN):
            raise Unavailable("this service is draining", retry_after=0.0)
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._cut_off:
                raise  # by the caller
            task.uncancel()
            raise Unavailable("this service stopped before the answer was complete", retry_after=0.0) from None
        finally:
            self._calls.discard(task)
            self._cut_off.discard(task)

    async def finish(self, seconds: float, linger: float) -> None:
        """Let what runs finish, then cut off the rest.

        Args:
            seconds: for what runs.
            linger: seconds in which late calls are answered in any case.
        """
        loop = asyncio.get_running_loop()
        start = loop.time()
        while (waited := loop.time() - start) < linger or (self._calls and waited < seconds):  # noqa: ASYNC110
            await asyncio.sleep(_TURN_SECONDS)
        self._cut_off |= self._calls
        for task in list(self._cut_off):
            task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(_UNWIND_SECONDS):
                while self._calls:  # noqa: ASYNC110 they leave one by one
                    await asyncio.sleep(_TURN_SECONDS / 5)
