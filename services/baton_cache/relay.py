"""What replicas of the cache tell each other about a generation, through Redis.

The replica whose caller generates holds a lease. Others say, for as long as it is so, that they want the chunks; then
the holder appends them to a stream, which the others poll. A holder that dies stops renewing its lease, and whoever
wants the answer takes it over. All names are of one entry, and all times short: nothing has to be cleaned up.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Final

from redis.asyncio import Redis

from baton.internal.v1 import response_cache_pb2
from baton_cache.names import Names
from baton_cache.store import NotAValue, Store, StoreFailed

LEASE_MS: Final = 1500
WANTED_MS: Final = 1500
CHUNKS_MS: Final = 60_000
_BATCH: Final = 64  # entries read at once

# Only the holder may renew or end its lease, or write: it may have expired, and be another's by now.
_HOLD: Final = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return {0, 0} end
redis.call('pexpire', KEYS[1], ARGV[2])
local wanted = redis.call('exists', KEYS[2])
if #ARGV > 2 then
    if ARGV[3] == 'first' then redis.call('unlink', KEYS[3]) end
    redis.call('xadd', KEYS[3], '*', 'position', ARGV[4], 'chunks', ARGV[5])
    redis.call('pexpire', KEYS[3], ARGV[6])
end
return {1, wanted}
"""
_RELEASE: Final = (
    "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('unlink', KEYS[1], KEYS[2]) else return 0 end"
)


@dataclass(frozen=True, slots=True)
class Claim:
    """What came of asking for the lease."""

    ours: bool
    answered: bool
    """There is an answer by now."""


@dataclass(frozen=True, slots=True)
class Held:
    """A lease after its renewal."""

    ours: bool
    wanted: bool
    """Another replica wants the chunks."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What a follower found.

    Attributes:
        led: somebody holds the lease.
        answered: there is an answer by now; the lease may not have been given back.
        chunks: since the last time, with the number of chunks before each batch.
        last: where to go on reading.
    """

    led: bool
    answered: bool
    chunks: list[tuple[int, response_cache_pb2.JoinChunks]]
    last: str


class Relay:
    """One entry's lease and stream, as one replica sees it. Every method raises StoreFailed when Redis fails.

    Args:
        store: Redis.
        names: what things are called there.
        entry: whose answer is generated.
    """

    def __init__(self, store: Store, names: Names, entry: str) -> None:
        self._store = store
        self._lead = names.lead(entry)
        self._wanted = names.wanted(entry)
        self._chunks = names.chunks(entry)
        self._answer = names.answer(entry)
        self._token = secrets.token_hex(16)
        self._published = False

    async def claim(self) -> Claim:
        """Take the lease if nobody has it."""

        def commands(pipeline: Any) -> None:
            pipeline.set(self._lead, self._token, nx=True, px=LEASE_MS)
            pipeline.exists(self._answer)
            pipeline.strlen(self._lead)  # an error where something lies that is no lease: nobody leads then

        taken, answered, _ = await self._run("claim", commands)
        self._published = False
        return Claim(ours=bool(taken), answered=bool(answered))

    async def hold(self, position: int, chunks: response_cache_pb2.JoinChunks | None) -> Held:
        """Renew the lease, and let those who want them have chunks.

        Args:
            position: number of chunks before these.
            chunks: none, or the next; the first time all there are.
        """

        arguments: list[str | int | bytes] = [self._token, LEASE_MS]
        if chunks is not None:
            # What an earlier leader wrote is not gone on with.
            part = "next" if self._published else "first"
            arguments += [part, position, chunks.SerializeToString(), CHUNKS_MS]

        def commands(pipeline: Any) -> None:
            pipeline.eval(_HOLD, 3, self._lead, self._wanted, self._chunks, *arguments)

        ((renewed, wanted),) = await self._run("hold", commands)
        self._published |= chunks is not None
        return Held(ours=bool(renewed), wanted=bool(wanted))

    async def release(self) -> None:
        """Give the lease back: the answer is stored, or somebody else may go on."""
        await self._run("release", lambda pipeline: pipeline.eval(_RELEASE, 2, self._lead, self._chunks, self._token))

    async def listen(self, last: str) -> Heard:
        """Say that the chunks are wanted, and read those after `last`; "0" at the beginning."""

        def commands(pipeline: Any) -> None:
            pipeline.set(self._wanted, 1, px=WANTED_MS)
            pipeline.exists(self._lead)
            pipeline.exists(self._answer)
            pipeline.xrange(self._chunks, f"({last}" if last != "0" else "-", "+", count=_BATCH)

        _, led, answered, entries = await self._run("listen", commands)
        chunks = []
        for name, fields in entries:
            chunks.append((int(fields[b"position"]), response_cache_pb2.JoinChunks.FromString(fields[b"chunks"])))
            last = name.decode()
        return Heard(led=bool(led), answered=bool(answered), chunks=chunks, last=last)

    async def _run(self, operation: str, commands: Any) -> list[Any]:
        async def run(redis: Redis) -> list[Any]:
            async with redis.pipeline(transaction=False) as pipeline:
                commands(pipeline)
                results: list[Any] = await pipeline.execute(raise_on_error=False)
            for result in results:
                if isinstance(result, Exception):
                    raise result  # as it is: the pipeline would put a text of its own before it
            return results

        try:
            return await self._store.call(operation, self._lead, run)
        except NotAValue as error:
            raise StoreFailed("something else is there") from error
