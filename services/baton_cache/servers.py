"""The servers of Redis: which one holds a name, found anew in the background whenever that seems to have changed.

No call ever waits for the search. While nobody knows the server, a call fails at once, which is a miss.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from redis.asyncio import Redis

from baton.rpc.breaker import Breaker
from baton_cache.finders import ClusterServers, Finder, NotFound, Sentinels, close_all
from baton_cache.layout import Layout
from baton_cache.redis_client import ClientOptions, Credentials
from baton_cache.redis_url import Address, Mode, RedisUrl

log = logging.getLogger(__name__)

_PAUSE: Final = 0.1
"""Seconds between two searches, however much seems wrong."""


@dataclass(slots=True, eq=False)
class Server:
    """One server.

    Attributes:
        client: pool of connections to it.
        breaker: whether it is left alone.
    """

    address: Address
    client: Redis
    breaker: Breaker


class Servers:
    """All servers that are known.

    Args:
        options: how each is reached.
        breaker: makes the breaker of each.
        finder: finds them; None: they do not change.
    """

    def __init__(self, options: ClientOptions, breaker: Callable[[], Breaker], finder: Finder | None) -> None:
        self.options = options
        self._breaker = breaker
        self._finder = finder
        self._layout: Layout | None = None
        self._servers: dict[Address, Server] = {}
        self._suspected = asyncio.Event()
        self._lost = False

    @classmethod
    @asynccontextmanager
    async def at(
        cls, url: RedisUrl, options: ClientOptions, breaker: Callable[[], Breaker], of_sentinels: Credentials
    ) -> AsyncIterator[Servers]:
        """The servers of a URL. That none is there is no error: they may come."""
        finder: Finder | None = None
        if url.mode is Mode.SENTINEL:
            finder = Sentinels(url.addresses, url.service, options, of_sentinels)
        elif url.mode is Mode.CLUSTER:
            finder = ClusterServers(url.addresses, options)
        servers = cls(options, breaker, finder)
        try:
            if finder is None:
                await servers._install(Layout.of_one(url.addresses[0]))
                yield servers
            else:
                await servers._find(finder)
                async with asyncio.TaskGroup() as group:
                    following = group.create_task(servers._follow(finder))
                    try:
                        yield servers
                    finally:
                        following.cancel()
        finally:
            if finder is not None:
                await finder.close()
            await close_all([server.client for server in servers.all()])

    def all(self) -> list[Server]:
        """All of them."""
        return list(self._servers.values())

    def of(self, name: str) -> Server | None:
        """The server that holds a name; None: not known."""
        address = None if self._layout is None else self._layout.owner(name)
        return None if address is None else self._servers[address]

    def at_address(self, address: Address) -> Server | None:
        """The server at an address; None: not known."""
        return self._servers.get(address)

    def suspect(self) -> None:
        """Something is not where it was: look soon."""
        self._suspected.set()

    async def _follow(self, finder: Finder) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(finder.poll_seconds):
                    await self._suspected.wait()
            self._suspected.clear()
            await self._find(finder)
            await asyncio.sleep(_PAUSE)

    async def _find(self, finder: Finder) -> None:
        try:
            layout = await finder.find()
        except NotFound as error:
            self._suspected.set()
            if not self._lost:
                log.warning("Redis is not found: %s", error)
            self._lost = True
            return
        if self._lost:
            log.info("Redis is found again")
        self._lost = False
        if layout != self._layout:
            await self._install(layout)

    async def _install(self, layout: Layout) -> None:
        known, wanted = self._servers.keys(), layout.servers()
        gone = [self._servers[address] for address in known - wanted]
        added = {address: Server(address, self.options.client(address), self._breaker()) for address in wanted - known}
        self._servers = {address: each for address, each in self._servers.items() if address in wanted} | added
        if self._layout is not None:
            log.info("Redis moved", extra={"servers": sorted(map(str, wanted))})
        self._layout = layout
        await close_all([server.client for server in gone])
