"""One request in an engine process, as its front holds it: commands go in, events wait here until they are read."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from baton.engine.messages import Command, Commit, ComputeHere, Failed, KvReady, Output, Progress, Reserved

RequestEvent = Reserved | KvReady | Progress | Output | Failed


class EngineDied(Exception):
    """The engine process is gone, and with it every request it had."""


class Client(Protocol):
    """What a request needs of the engine it is in."""

    @property
    def dead(self) -> bool:
        """Whether the engine is gone."""

    @property
    def epitaph(self) -> str:
        """How it went, once it is gone."""

    def send(self, command: Command) -> None:
        """Queue a command."""


class RequestHandle:
    """One request in the engine. Events wait here; there are at most a few per layer and chunk, and one per token."""

    def __init__(self, client: Client, engine_id: str) -> None:
        self._client = client
        self._id = engine_id
        self._events: deque[RequestEvent] = deque()
        self._changed = asyncio.Event()
        self._gather_until = 0.0  # on the event loop's clock

    async def next(self, seconds: float) -> RequestEvent | None:
        """The next event; None when none came in so many seconds.

        Raises:
            EngineDied: the engine is gone.
        """
        if not self._events:
            await self._wait(seconds)
        if self._events:
            return self._events.popleft()
        if self._client.dead:
            raise EngineDied(self._client.epitaph)
        return None

    async def next_all(self, seconds: float, gather: float = 0.0) -> list[RequestEvent]:
        """All events that are here, up to 256, as soon as one is; nothing when none came in so many seconds.

        Args:
            seconds: to wait at most.
            gather: for so many seconds from now, tokens that end nothing wait for what comes after, or for `seconds`.

        Raises:
            EngineDied: the engine is gone, and no event is left.
        """
        self._gather_until = asyncio.get_running_loop().time() + gather if gather else 0.0
        try:
            if not any(self._wakes(event) for event in self._events):
                await self._wait(seconds)
        finally:
            self._gather_until = 0.0
        events = [self._events.popleft() for _ in range(min(256, len(self._events)))]
        if events or not self._client.dead:
            return events
        raise EngineDied(self._client.epitaph)

    def commit(self, token_ids: Sequence[int]) -> None:
        """The slot holds the KV of all tokens before the last of `token_ids`, which were generated elsewhere."""
        self._client.send(Commit(self._id, list(token_ids)))

    def compute_here(self, token_ids: Sequence[int] = ()) -> None:
        """Compute in the reserved slot; `token_ids` were generated elsewhere already."""
        self._client.send(ComputeHere(self._id, list(token_ids)))

    def push(self, event: RequestEvent) -> None:
        """Called by the reader."""
        self._events.append(event)
        if self._wakes(event):
            self._changed.set()

    def wake(self) -> None:
        """Called by the client when the engine is gone."""
        self._changed.set()

    async def _wait(self, seconds: float) -> None:
        """Until an event that wakes or the engine's end, for so many seconds at most."""
        if self._client.dead:
            return
        self._changed.clear()
        # A timer that wakes the waiter, not asyncio.timeout with its bookkeeping: this runs once per token.
        timer = asyncio.get_running_loop().call_later(seconds, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            timer.cancel()

    def _wakes(self, event: RequestEvent) -> bool:
        """Whether it is not to wait for others."""
        gathers = self._gather_until and isinstance(event, Output) and event.finish_reason is None
        return not gathers or asyncio.get_running_loop().time() >= self._gather_until
