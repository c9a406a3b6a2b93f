"""Redis, with a bound on what it may cost: a call ends within the timeout, and a Redis that is down costs nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from baton.rpc.breaker import Breaker
from baton_cache.metrics import BREAKER_OPEN, REDIS_FAILURES, REDIS_SECONDS

log = logging.getLogger(__name__)

_CLOSE_SECONDS: Final = 1.0
UNREACHABLE: Final = (RedisError, OSError, EOFError, TimeoutError)
"""What a Redis that does not answer looks like."""

ResultT = TypeVar("ResultT")


class StoreFailed(Exception):
    """Redis did not answer in time, refused, or was not asked because it did not answer before."""


class NotAValue(Exception):
    """Under this name lies something that is no string, so nothing of ours."""


class Store:
    """Named values with a time to live.

    Args:
        redis: client whose pool is bounded and whose calls are never retried.
        timeout: seconds a call may take, connecting and waiting for a connection included.
        breaker: decides whether Redis is asked at all.
    """

    def __init__(self, redis: Redis, timeout: float, breaker: Breaker) -> None:
        self._redis = redis
        self._timeout = timeout
        self._breaker = breaker
        self._last_refusal = ""

    @classmethod
    @asynccontextmanager
    async def connected(cls, url: str, timeout: float, connections: int, breaker: Breaker) -> AsyncIterator[Store]:
        """A store at a redis://, rediss:// or unix:// URL; its connections are closed at the end.

        A Redis that is down is no error: it may come.
        """
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=connections,
            timeout=timeout,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),
            protocol=2,  # with no name and version to tell, connecting takes no round trip unless there is a password
            driver_info=None,
        )
        redis = Redis.from_pool(pool)
        store = cls(redis, timeout, breaker)
        with suppress(StoreFailed):
            await store.call("ping", "", lambda redis: redis.ping())
        try:
            yield store
        finally:
            with suppress(*UNREACHABLE):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await redis.aclose()

    async def get(self, name: str) -> bytes | None:
        """The value of a name; None: there is none.

        Raises:
            StoreFailed: not known.
            NotAValue: something else is there.
        """
        value = await self.call("get", name, lambda redis: redis.get(name))
        assert not isinstance(value, str)  # responses are not decoded
        return value

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
        if not self._breaker.allows():
            REDIS_FAILURES.labels(operation, "breaker_open").inc()
            raise StoreFailed("not asked: the breaker is open")
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout):
                result = await command(self._redis)
        except ResponseError as error:
            self._answered()  # what it says is about this command, not about the next one
            if str(error).startswith("WRONGTYPE"):
                raise NotAValue from None
            REDIS_FAILURES.labels(operation, "refused").inc()
            self._refused(operation, error)
            raise StoreFailed("refused") from error
        except UNREACHABLE as error:
            self._did_not_answer(error)
            REDIS_FAILURES.labels(operation, "no_answer").inc()
            raise StoreFailed("no answer") from error
        finally:
            REDIS_SECONDS.labels(operation).observe(time.perf_counter() - began)
        self._answered()
        return result

    def _answered(self) -> None:
        if self._breaker.open:
            log.info("Redis answers again")
            BREAKER_OPEN.set(0)
        self._breaker.worked()

    def _refused(self, operation: str, error: ResponseError) -> None:
        # The first word is Redis' code for it (OOM, READONLY, NOAUTH, DENIED); the rest may quote what was sent.
        code = str(error).partition(" ")[0][:32]
        if code != self._last_refusal:
            self._last_refusal = code
            log.warning("Redis refuses to %s: %s", operation, code)

    def _did_not_answer(self, error: Exception) -> None:
        was_open = self._breaker.open
        self._breaker.failed()
        if self._breaker.open and not was_open:
            # The type alone: the text of an error may quote the URL.
            log.warning("Redis does not answer: every lookup is a miss", extra={"error": type(error).__name__})
            BREAKER_OPEN.set(1)
