"""How a service ends without failing anybody: what it serves may finish, what comes late is sent elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

from baton.rpc.errors import Unavailable

_OPEN: Final = ("/grpc.health.v1.Health/", "/grpc.reflection.", "/baton.internal.v1.Worker/")
"""Methods that are served to the end: they tell of the drain, and never hold it up."""
_TELL_SECONDS: Final = 0.25  # for their streams to end by themselves, once the calls are over
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
        self._open: set[asyncio.Task[Any]] = set()  # calls of such methods
        self._cut_off: set[asyncio.Task[Any]] = set()

    @property
    def calls(self) -> int:
        """Calls being served that a drain waits for."""
        return len(self._calls)

    @asynccontextmanager
    async def serving(self, method: str) -> AsyncIterator[None]:
        """Serve a call within the block.

        Args:
            method: full name, as "/baton.v1.Inference/Generate".

        Raises:
            Unavailable: the service is draining, or stopped before the call had finished.
        """
        is_open = method.startswith(_OPEN)
        if self.begun.is_set() and not is_open:
            raise Unavailable("this service is draining", retry_after=0.0)
        task = asyncio.current_task()
        assert task is not None
        calls = self._open if is_open else self._calls
        calls.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._cut_off:
                raise  # by the caller
            task.uncancel()
            raise Unavailable("this service stopped before the answer was complete", retry_after=0.0) from None
        finally:
            calls.discard(task)
            self._cut_off.discard(task)

    async def finish(self, seconds: float, linger: float) -> None:
        """Let what runs finish, then cut off the rest.

        Args:
            seconds: for what runs.
            linger: seconds in which late calls are answered in any case.
        """
        loop = asyncio.get_running_loop()
        start = busy = loop.time()  # busy: when calls were last there
        while True:
            now = loop.time()
            if self._calls:
                busy = now
            held_up = self._calls or (self._open and now - busy < _TELL_SECONDS)
            if now - start >= linger and not (held_up and now - start < seconds):
                break
            await asyncio.sleep(_TURN_SECONDS)
        self._cut_off |= self._calls | self._open
        for task in list(self._cut_off):
            task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(_UNWIND_SECONDS):
                while self._calls or self._open:  # noqa: ASYNC110 they leave one by one
                    await asyncio.sleep(_TURN_SECONDS / 5)
