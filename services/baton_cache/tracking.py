"""Hear of every change of an answer in Redis, by its client-side caching, and keep the local tier to it.

A connection to each server, in RESP3, gets the names of all answers that change, expire or are evicted (CLIENT TRACKING
in broadcast mode): whoever changed them, and whichever connection read them. The local tier is on only while all these
connections are; a connection that is silent is asked for a sign of life, and without one it is lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ResponseError

from baton_cache.finders import UNREACHABLE
from baton_cache.local import LocalTier
from baton_cache.metrics import LOCAL_INVALIDATIONS
from baton_cache.redis_url import Address
from baton_cache.servers import Servers

log = logging.getLogger(__name__)

_CONNECT_SECONDS: Final = 0.5
_PAUSE: Final = 0.2
"""Seconds until a lost connection is tried again."""
_PAUSE_UNABLE: Final = 30.0
"""Seconds until a server that cannot do it, or does not let us, is asked again."""
_LOST: Final = (*UNREACHABLE, AttributeError, IndexError, TypeError)
"""What a lost connection looks like; the last three: redis-py's parser, when something else than Redis talks."""
_PUSHED: Final = object()


class Unable(Exception):
    """The server does not tell of changes."""


class Moved(Exception):
    """The servers are no longer those that are listened to."""


class Tracking:
    """Listens to all servers.

    Args:
        servers: who they are.
        prefix: what the names of answers begin with.
        local: what is kept to what they say.
        ping_seconds: of silence until a sign of life is asked for, and until it must have come.
    """

    def __init__(self, servers: Servers, prefix: str, local: LocalTier, ping_seconds: float) -> None:
        self._servers = servers
        self._prefix = prefix
        self._local = local
        self._ping_seconds = ping_seconds
        self._ending = False
        self._said = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Listen for the length of the block."""
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._run())
            try:
                yield
            finally:
                self._ending = True
                task.cancel()
                self._local.turn_off()

    async def _run(self) -> None:
        # Told by a flag besides: in Python 3.11, a connection that fails while cancelled wins over the cancellation.
        # Task.cancelling() does not tell either: a task group that failed leaves it raised.
        while not self._ending:
            pause = _PAUSE
            try:
                await self._listen_to_all()
            except* Unable as errors:
                pause = _PAUSE_UNABLE
                self._say(logging.WARNING, f"the local tier is off: Redis does not tell of changes: {_first(errors)}")
            except* (Moved, *_LOST):
                self._say(logging.INFO, "the local tier is off: the connection that tells of changes is lost")
            finally:
                self._local.turn_off()
            if not self._ending:
                await asyncio.sleep(pause)

    async def _listen_to_all(self) -> None:
        addresses = self._addresses()
        if not addresses:
            raise ExceptionGroup("", [Moved()])
        waiting = set(addresses)

        def tracked(address: Address) -> None:
            waiting.discard(address)
            if not waiting:
                self._local.turn_on()
                self._say(logging.INFO, "the local tier is on")

        async with asyncio.TaskGroup() as group:
            for address in addresses:
                group.create_task(self._listen(address, addresses, tracked))

    async def _listen(self, address: Address, addresses: frozenset[Address], tracked: Any) -> None:
        connection = self._servers.options.connection(address)
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await self._turn_tracking_on(connection)
            tracked(address)
            silent = False
            while True:
                # Half a push that was read when the time is over stays in the buffer of redis-py's parser.
                heard = await connection.read_response(timeout=self._ping_seconds, push_request=True)
                if self._addresses() != addresses:
                    raise Moved
                if heard is not None:
                    silent = False
                elif silent:
                    raise TimeoutError
                else:
                    silent = True
                    async with asyncio.timeout(_CONNECT_SECONDS):
                        await connection.send_command("PING")
        finally:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await connection.disconnect(nowait=True)

    async def _turn_tracking_on(self, connection: AbstractConnection) -> None:
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            connection._get_parser().set_invalidation_push_handler(self._changed)  # type: ignore[attr-defined]
            await connection.send_command("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", self._prefix)
            await connection.read_response()
        except ResponseError as error:
            raise Unable(error.status_code or str(error).partition(",")[0][:60]) from None

    async def _changed(self, message: list[Any]) -> object:
        """Take a push: `invalidate`, and names; none: all of them. Must not fail: redis-py would go on without it."""
        match message:
            case [_, [*names]]:
                LOCAL_INVALIDATIONS.labels("name").inc(len(names))
                for name in names:
                    self._local.changed(name.decode(errors="replace") if isinstance(name, bytes) else str(name))
            case _:
                LOCAL_INVALIDATIONS.labels("all").inc()
                self._local.drop()
        return _PUSHED

    def _addresses(self) -> frozenset[Address]:
        return frozenset(server.address for server in self._servers.all())

    def _say(self, level: int, what: str) -> None:
        if what != self._said:
            self._said = what
            log.log(level, what)


def _first(errors: BaseExceptionGroup[Unable]) -> Exception:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
