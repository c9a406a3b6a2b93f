"""What replicas tell each other through Redis, when one of them was away for longer than its lease."""

from __future__ import annotations

import redis

from baton.cli.redis_server import EmbeddedRedis
from baton.internal.v1 import response_cache_pb2
from baton_cache.names import Names
from baton_cache.relay import Relay
from tests.cache.conftest import an_answer, connected_store

NAMES = Names("baton:")
ENTRY = "entry"


def part(first: int, count: int) -> response_cache_pb2.JoinChunks:
    """Some chunks of an answer, of two tokens each."""
    return response_cache_pb2.JoinChunks(index=2 * first, chunks=an_answer(chunks=9).chunks[first : first + count])


async def test_who_lost_the_lease_writes_nothing_more(redis_server: EmbeddedRedis, stored: redis.Redis) -> None:
    async with connected_store(redis_server.url) as store:
        frozen, heir, listener = (Relay(store, NAMES, ENTRY) for _ in range(3))
        assert (await frozen.claim()).ours
        assert (await frozen.hold(0, part(0, 2))).ours
        stored.delete(NAMES.lead(ENTRY))  # as if it had expired
        assert (await heir.claim()).ours
        assert (await heir.hold(0, part(0, 1))).ours
        assert not (await frozen.hold(2, part(2, 3))).ours
        assert (await heir.hold(1, part(1, 1))).ours
        heard = await listener.listen("0")
        assert heard.led
        assert heard.chunks == [(0, part(0, 1)), (1, part(1, 1))]
        assert (await heir.hold(2, None)).wanted
