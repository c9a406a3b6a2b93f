"""What lies in Redis, as far as it is ours: counted or estimated, and removed. In batches: Redis serves others too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from redis.asyncio import Redis

from baton.internal.v1 import cache_admin_pb2
from baton_cache.names import Names
from baton_cache.servers import Server
from baton_cache.store import Store, StoreFailed

_BATCH: Final = 500
"""Names that Redis looks at before it serves others."""
_MOST_COUNTED: Final = 20_000
"""Names that are looked at to count; beyond it the rest is taken to be alike."""
_WEIGHED: Final = 100
"""Entries whose memory is asked for; the others are taken to be alike."""
_PATIENCE: Final = 1.0
"""Seconds for a batch: nobody's request waits for it."""


@dataclass(slots=True)
class _Count:
    looked_at: int = 0
    entries: int = 0
    weighed: int = 0
    weight: int = 0
    complete: bool = True


async def survey(store: Store, names: Names, server: Server) -> cache_admin_pb2.CacheServer:
    """What a server holds and how it is. Of one that does not answer only that."""
    found = cache_admin_pb2.CacheServer(address=str(server.address), breaker_open=server.breaker.open)
    try:
        keys = await store.ask(server, "info", lambda redis: redis.dbsize(), _PATIENCE)
    except StoreFailed:
        return found
    found.reachable = True
    found.keys = keys
    with suppress(StoreFailed):  # an ACL may deny it
        _describe(found, await store.ask(server, "info", lambda redis: redis.info(), _PATIENCE))
    with suppress(StoreFailed):
        count = await _count(store, names, server)
        share = 1.0 if count.complete else keys / max(1, count.looked_at)
        found.entries = round(count.entries * share)
        found.entry_bytes = round(count.weight / max(1, count.weighed) * found.entries)
        found.estimated = not count.complete or count.weighed < count.entries
    return found


def _describe(found: cache_admin_pb2.CacheServer, info: dict[str, Any]) -> None:
    found.version = str(info.get("redis_version", ""))
    found.role = str(info.get("role", ""))
    found.used_memory_bytes = int(info.get("used_memory", 0))
    found.max_memory_bytes = int(info.get("maxmemory", 0))
    found.eviction_policy = str(info.get("maxmemory_policy", ""))
    found.evicted_keys = int(info.get("evicted_keys", 0))
    found.expired_keys = int(info.get("expired_keys", 0))


async def _count(store: Store, names: Names, server: Server) -> _Count:
    count = _Count()
    async for looked_at, batch in _batches(store, server, "*"):
        count.looked_at += looked_at
        ours = [name for name in batch if names.entry(name.decode(errors="replace")) is not None]
        count.entries += len(ours)
        weighing = ours[: _WEIGHED - count.weighed]
        if weighing:
            for bytes_of_one in await store.ask(server, "info", partial(_weigh, names=weighing), _PATIENCE):
                if isinstance(bytes_of_one, int):  # else it is gone
                    count.weighed += 1
                    count.weight += bytes_of_one
        if count.looked_at >= _MOST_COUNTED:
            count.complete = False
            break
    return count


async def _weigh(redis: Redis, names: list[bytes]) -> list[Any]:
    async with redis.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.memory_usage(name)
        return await pipeline.execute(raise_on_error=False)


async def flush(store: Store, names: Names, pattern: str) -> int:
    """Remove all names of ours that a pattern takes, on all servers at once; how many there were.

    Raises:
        StoreFailed: not all are removed.
    """
    servers = store.servers.all()
    if not servers:
        raise StoreFailed("nobody knows the servers")
    removed = await asyncio.gather(
        *(_flush(store, names, server, pattern) for server in servers), return_exceptions=True
    )
    for result in removed:
        if isinstance(result, BaseException):
            raise result
    return sum(count for count in removed if isinstance(count, int))


async def _flush(store: Store, names: Names, server: Server, pattern: str) -> int:
    removed = 0
    async for _, batch in _batches(store, server, pattern):
        ours = [name for name in batch if names.ours(name.decode(errors="replace"))]
        if ours:
            removed += await store.ask(server, "remove", partial(_unlink, names=ours), _PATIENCE)
    return removed


async def _unlink(redis: Redis, names: list[bytes]) -> int:
    async with redis.pipeline(transaction=False) as pipeline:
        for name in names:  # one by one: in a cluster they lie in different slots
            pipeline.unlink(name)
        return sum(await pipeline.execute())


async def _batches(store: Store, server: Server, pattern: str) -> AsyncIterator[tuple[int, list[bytes]]]:
    """Names of a pattern on a server, and how many were looked at for them, about. A name may come twice."""
    cursor = 0
    while True:
        cursor, names = await store.ask(server, "scan", partial(_scan, cursor=cursor, pattern=pattern), _PATIENCE)
        yield max(_BATCH, len(names)), names
        if not cursor:
            return


async def _scan(redis: Redis, cursor: int, pattern: str) -> tuple[int, list[bytes]]:
    next_cursor, names = await redis.scan(cursor, match=pattern, count=_BATCH)
    return int(next_cursor), [name for name in names if isinstance(name, bytes)]
