"""Who knows where the servers are: sentinels, or the servers of a cluster. All are asked at once: one may be frozen."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, Protocol

from redis.asyncio import Redis
from redis.exceptions import RedisError

from baton_cache.layout import Layout, of_cluster_slots, of_sentinel
from baton_cache.redis_client import ClientOptions, Credentials
from baton_cache.redis_url import Address

UNREACHABLE: Final = (RedisError, OSError, EOFError, TimeoutError, ValueError)
"""What a Redis that does not answer looks like; the last: one that does not speak its own language."""

_ANSWER_SECONDS: Final = 0.5
"""How long one is waited for: nobody's call waits with us."""
_ASKED: Final = 5
"""Servers of a cluster that are asked at once."""


class NotFound(Exception):
    """Nobody knows, or nobody answers."""


class Finder(Protocol):
    """Finds the servers."""

    poll_seconds: float
    """How often to ask when nothing seems wrong."""

    async def find(self) -> Layout:
        """Ask.

        Raises:
            NotFound: nobody knows.
        """

    async def close(self) -> None:
        """End the connections."""


class Sentinels:
    """The master that most sentinels name.

    Args:
        addresses: of the sentinels.
        service: what they call the master.
        options: how Redis itself is reached: TLS is the same.
        credentials: of the sentinels.
    """

    poll_seconds = 1.0  # a master that lost its sentinels goes on answering

    def __init__(
        self, addresses: Iterable[Address], service: str, options: ClientOptions, credentials: Credentials
    ) -> None:
        options = replace(options, timeout=_ANSWER_SECONDS, connections=1, db=0, credentials=credentials)
        self._clients = [options.client(address) for address in addresses]
        self._service = service

    async def find(self) -> Layout:
        """The master; as soon as more than half of the sentinels agree, else what most say that answer.

        Raises:
            NotFound: none knows one.
        """
        votes: Counter[Layout] = Counter()
        async for layout in _answers(self._ask(client) for client in self._clients):
            votes[layout] += 1
            if votes[layout] * 2 > len(self._clients):
                return layout
        if not votes:
            raise NotFound("no sentinel names a master")
        return votes.most_common(1)[0][0]

    async def _ask(self, client: Redis) -> Layout:
        return of_sentinel(await client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service))  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        """End the connections."""
        await close_all(self._clients)


class ClusterServers:
    """The layout that some server of a cluster tells.

    Args:
        seeds: addresses of some servers.
        options: how Redis is reached.
    """

    poll_seconds = 10.0  # a server that no longer holds a slot says so when asked for it

    def __init__(self, seeds: Iterable[Address], options: ClientOptions) -> None:
        self._options = replace(options, timeout=_ANSWER_SECONDS, connections=1)
        self._seeds = frozenset(seeds)
        self._known = self._seeds

    async def find(self) -> Layout:
        """The first layout that is told.

        Raises:
            NotFound: none of the servers that were asked answers; next time it may be others.
        """
        some = random.sample(sorted(self._known, key=str), min(_ASKED, len(self._known)))
        async for layout in _answers(self._ask(address) for address in some):
            if layout.servers():
                self._known = self._seeds | layout.servers()
                return layout
        raise NotFound("no server of the cluster tells its layout")

    async def _ask(self, address: Address) -> Layout:
        client = self._options.client(address)
        try:
            return of_cluster_slots(await client.execute_command("CLUSTER", "SLOTS"), address)  # type: ignore[no-untyped-call]
        finally:
            await close_all([client])

    async def close(self) -> None:
        """Nothing is open."""


async def _answers(questions: Iterable[Coroutine[Any, Any, Layout]]) -> AsyncIterator[Layout]:
    """Answers as they come; those that fail are left out, those that are not waited for are given up."""
    tasks = [asyncio.create_task(_in_time(question)) for question in questions]
    try:
        for next_one in asyncio.as_completed(tasks):
            with suppress(*UNREACHABLE):
                yield await next_one
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _in_time(question: Coroutine[Any, Any, Layout]) -> Layout:
    async with asyncio.timeout(_ANSWER_SECONDS):
        return await question


async def close_all(clients: Iterable[Redis]) -> None:
    """End the connections of clients, with or without the servers' help."""
    with suppress(*UNREACHABLE):
        async with asyncio.timeout(1.0):
            await asyncio.gather(*(client.aclose() for client in clients), return_exceptions=True)
