"""Redis, with a bound on what it may cost: a call ends within the timeout, and a Redis that is down costs nothing."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from redis.asyncio import Redis
from redis.exceptions import MovedError, ReadOnlyError, ResponseError

from baton.rpc.breaker import Breaker
from baton.rpc.patience import patience
from baton_cache.finders import UNREACHABLE
from baton_cache.metrics import BREAKER_OPEN, BREAKER_OPENINGS, POOL_IN_USE, REDIS_FAILURES, REDIS_SECONDS
from baton_cache.redis_client import ClientOptions, Credentials
from baton_cache.redis_url import Address, RedisUrl
from baton_cache.servers import Server, Servers

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

_ABSENT: Final = -2
"""What PTTL says of a name that is not there."""


class StoreFailed(Exception):
    """Redis did not answer in time, refused, or was not asked because it did not answer before."""


class NotAValue(Exception):
    """Under this name lies something that is no string, so nothing of ours."""


@dataclass(frozen=True, slots=True)
class Read:
    """A value, and how much longer it may be served: for ever, if that was not asked."""

    value: bytes
    ttl_seconds: float


class Store:
    """Named values with a time to live.

    Args:
        servers: who holds them.
        timeout: seconds a call may take, connecting and waiting for a connection included.
    """

    def __init__(self, servers: Servers, timeout: float) -> None:
        self.servers = servers
        self._timeout = timeout
        self._last_refusal = ""

    @classmethod
    @asynccontextmanager
    async def connected(
        cls,
        url: RedisUrl,
        options: ClientOptions,
        breaker: Callable[[], Breaker],
        of_sentinels: Credentials = Credentials(),  # noqa: B008 it is frozen
    ) -> AsyncIterator[Store]:
        """A store at a URL; its connections are closed at the end.

        A Redis that is down is no error: it may come.
        """
        async with Servers.at(url, options, breaker, of_sentinels) as servers:
            store = cls(servers, options.timeout)
            POOL_IN_USE.set_function(store._connections_in_use)
            BREAKER_OPEN.set_function(store._left_alone)
            with suppress(StoreFailed):
                await store.call("ping", "", lambda redis: redis.ping())
            try:
                yield store
            finally:
                POOL_IN_USE.set_function(lambda: 0)
                BREAKER_OPEN.set_function(lambda: 0)

    async def get(self, name: str, most_bytes: int, with_ttl: bool) -> Read | None:
        """The value of a name; None: there is none. Of a longer one, `most_bytes` and one more.

        Args:
            name: whose.
            most_bytes: that are read and allocated, whatever is there.
            with_ttl: whether to ask for the time left. It doubles what the call costs this process: 65 us.

        Raises:
            StoreFailed: not known.
            NotAValue: something else is there.
        """

        async def command(redis: Redis) -> list[Any]:
            if with_ttl:
                async with redis.pipeline(transaction=False) as pipeline:
                    pipeline.getrange(name, 0, most_bytes)
                    pipeline.pttl(name)
                    return await pipeline.execute()
            value = await redis.getrange(name, 0, most_bytes)
            return [value, None if value else await redis.pttl(name)]  # empty, or not there?

        value, ttl_ms = await self.call("get", name, command)
        if not isinstance(value, bytes) or not isinstance(ttl_ms, int | None):
            raise StoreFailed("nonsense")
        if ttl_ms == _ABSENT:
            return None
        return Read(value, math.inf if ttl_ms is None or ttl_ms < 0 else ttl_ms / 1000)

    async def set(self, name: str, value: bytes, ttl_ms: int) -> None:
        """Store a value.

        Raises:
            StoreFailed: perhaps it was not stored.
        """
        await self.call("set", name, lambda redis: redis.set(name, value, px=ttl_ms))

    async def remove(self, name: str) -> None:
        """Remove what is there.

        Raises:
            StoreFailed: perhaps it was not removed.
        """
        await self.call("remove", name, lambda redis: redis.unlink(name))

    async def call(self, operation: str, name: str, command: Callable[[Redis], Awaitable[ResultT]]) -> ResultT:
        """Run a command, with the same bounds as all others.

        Args:
            operation: what metrics and logs call it.
            name: what it is about. All names it uses must be of the same entry: in a cluster, `command` gets the server
                that holds this one.
            command: gets the client; what it returns is returned.

        Raises:
            StoreFailed: it is not known whether it was done.
            NotAValue: something of another type is there.
        """
        server = self.servers.of(name)
        if server is None:
            REDIS_FAILURES.labels(operation, "no_server").inc()
            raise StoreFailed("nobody knows the server")
        return await self.ask(server, operation, command, self._timeout)

    async def ask(
        self, server: Server, operation: str, command: Callable[[Redis], Awaitable[ResultT]], timeout: float
    ) -> ResultT:
        """Run a command on one server, within `timeout` seconds. Otherwise as `call`."""
        began = time.perf_counter()
        try:
            async with patience(timeout):
                return await self._ask(server, operation, command, moved_before=False)
        except TimeoutError as error:
            self._did_not_answer(server, operation, error)
            raise StoreFailed("no answer in time") from error
        finally:
            REDIS_SECONDS.labels(operation).observe(time.perf_counter() - began)

    async def _ask(
        self, server: Server, operation: str, command: Callable[[Redis], Awaitable[ResultT]], moved_before: bool
    ) -> ResultT:
        if not server.breaker.allows():
            REDIS_FAILURES.labels(operation, "breaker_open").inc()
            raise StoreFailed("not asked: the breaker is open")
        try:
            result = await command(server.client)
        except TimeoutError:
            raise  # ours: the same for all that is done in a call
        except MovedError as error:
            self._answered(server)
            self.servers.suspect()
            owner = self.servers.at_address(Address(error.host or server.address.host, error.port))
            if owner is None or moved_before:
                REDIS_FAILURES.labels(operation, "moved").inc()
                raise StoreFailed("moved") from error
            return await self._ask(owner, operation, command, moved_before=True)
        except ResponseError as error:
            self._answered(server)  # what it says is about this command, not about the next one
            if "WRONGTYPE" in str(error):  # a pipeline writes in front of it
                raise NotAValue from None
            if isinstance(error, ReadOnlyError):
                self.servers.suspect()  # it was the master
            REDIS_FAILURES.labels(operation, "refused").inc()
            self._refused(operation, error)
            raise StoreFailed("refused") from error
        except UNREACHABLE as error:
            self._did_not_answer(server, operation, error)
            raise StoreFailed("no answer") from error
        self._answered(server)
        return result

    def _connections_in_use(self) -> int:
        return sum(server.client.connection_pool.get_connection_count()[1][0] for server in self.servers.all())

    def _answered(self, server: Server) -> None:
        if server.breaker.worked():
            log.info("Redis answers again")

    def _refused(self, operation: str, error: ResponseError) -> None:
        # Redis' code for it (OOM, READONLY, NOPERM) alone: the rest may quote what was sent.
        code = error.status_code or str(error).partition(" ")[0][:32]
        if code != self._last_refusal:
            self._last_refusal = code
            log.warning("Redis refuses to %s: %s", operation, code)

    def _did_not_answer(self, server: Server, operation: str, error: Exception) -> None:
        REDIS_FAILURES.labels(operation, "no_answer").inc()
        self.servers.suspect()
        if server.breaker.failed():
            # The type alone: the text of an error may quote the URL.
            log.warning("Redis does not answer: every lookup is a miss", extra={"error": type(error).__name__})
            BREAKER_OPENINGS.inc()

    def _left_alone(self) -> int:
        return sum(server.breaker.open for server in self.servers.all())
