"""All generations that callers of this replica share, and the tasks that look after them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from baton.internal.v1 import response_cache_pb2
from baton.rpc.errors import Unavailable
from baton.telemetry.ledger import Timeline
from baton.v1 import ledger_pb2
from baton_cache.answers import Answers, Missing
from baton_cache.flight import Flight
from baton_cache.key import KeyDigests
from baton_cache.metrics import FLIGHTS
from baton_cache.names import Names
from baton_cache.relay import Relay
from baton_cache.store import Store

log = logging.getLogger(__name__)

_DRAINING: Final = "this cache is draining"


class Flights:
    """Flights by entry.

    Args:
        store: Redis, by which replicas know of each other's flights.
        names: what things are called there.
        answers: what is stored.
        limit: flights at once; whoever would start one more is alone.
        max_bytes: of an answer in the making.
    """

    def __init__(self, store: Store, names: Names, answers: Answers, limit: int, max_bytes: int) -> None:
        self._store = store
        self._names = names
        self._answers = answers
        self._limit = limit
        self._max_bytes = max_bytes
        self._flights: dict[str, Flight] = {}
        self._group: asyncio.TaskGroup | None = None
        self._draining = asyncio.Event()

    @asynccontextmanager
    async def owned(self, draining: asyncio.Event) -> AsyncIterator[None]:
        """Own the flights for the length of the block. Once `draining` is set everyone is sent elsewhere."""
        self._draining = draining
        async with asyncio.TaskGroup() as self._group:
            closing = self._group.create_task(self._close())
            try:
                yield
            finally:
                closing.cancel()
                for flight in self._flights.values():
                    flight.close(Unavailable("this cache is stopping"))
        self._group = None

    def under_way(self, entry: str) -> Flight | None:
        """The flight that brings an entry's answer."""
        return self._flights.get(entry)

    def start(self, digest: KeyDigests, *, here_only: bool) -> Flight:
        """A flight for an entry that has none. There may be none in Redis, but no await since was looked here.

        Args:
            digest: of the key.
            here_only: do not ask Redis who leads.
        """
        assert self._group is not None, "not open"
        assert digest.name not in self._flights
        relay = Relay(self._store, self._names, digest.name)

        async def find() -> response_cache_pb2.CachedAnswer | None:
            found = await self._answers.find(digest, Timeline(ledger_pb2.HOP_CACHE, ledger_pb2.KIND_CACHE))
            return None if isinstance(found, Missing) else found

        flight = Flight(relay, find, self._max_bytes, here_only)
        if self._draining.is_set():  # its caller came before, and was looking the answer up when all were sent away
            flight.close(Unavailable(_DRAINING))
            return flight
        if len(self._flights) >= self._limit:
            flight.dissolve("there are too many flights")
            return flight
        self._flights[digest.name] = flight
        FLIGHTS.set(len(self._flights))
        self._group.create_task(self._look_after(flight, digest.name))
        return flight

    async def _look_after(self, flight: Flight, entry: str) -> None:
        try:
            await flight.run()
        except Exception:
            log.exception("a shared generation failed")
            flight.dissolve("a defect")
        finally:
            del self._flights[entry]
            FLIGHTS.set(len(self._flights))

    async def _close(self) -> None:
        with suppress(asyncio.CancelledError):
            await self._draining.wait()
            for flight in self._flights.values():
                flight.close(Unavailable(_DRAINING))
