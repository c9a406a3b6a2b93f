"""An index in Redis' vector sets (Redis 8): shared by all replicas, and there after a restart.

A vector set holds the vectors of a partition; the questions lie beside it, each with the time to live of its answer. So
a vector whose question is gone has expired, and is removed when it is found.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.message import DecodeError
from redis.exceptions import ResponseError

from baton.internal.v1 import response_cache_pb2
from baton_cache.key import KeyDigests
from baton_cache.names import Names
from baton_cache.semantic.index import Index, Near, Question, Vector
from baton_cache.store import NotAValue, Store

_VERSION: Final = 1


class RedisIndex:
    """Questions in vector sets.

    Args:
        store: Redis.
        names: what things are called there.
        most: questions in a partition; beyond, others of it go.
    """

    def __init__(self, store: Store, names: Names, most: int) -> None:
        self._store = store
        self._names = names
        self._most = most

    async def add(self, partition: str, question: Question, vector: Vector, ttl_ms: int) -> None:
        """As `Index.add`."""
        entry, vectors = question.answer.name, self._names.similar(partition)
        stored = response_cache_pb2.StoredQuestion(
            version=_VERSION, text=question.text, entry=entry, key_digest=question.answer.proof
        )

        async def command(redis: Any) -> int:
            async with redis.pipeline(transaction=True) as steps:
                steps.set(self._names.question(partition, entry), stored.SerializeToString(), px=ttl_ms)
                steps.execute_command("VADD", vectors, "FP32", vector.tobytes(), entry, "NOQUANT")
                steps.execute_command("PEXPIRE", vectors, ttl_ms, "NX")
                steps.execute_command("PEXPIRE", vectors, ttl_ms, "GT")
                steps.execute_command("VCARD", vectors)
                return int((await steps.execute())[-1])

        if await self._store.call("index_add", vectors, command) > self._most:
            await self._make_room(partition, entry)

    async def nearest(self, partition: str, vector: Vector, count: int) -> list[Near]:
        """As `Index.nearest`."""
        vectors = self._names.similar(partition)

        async def command(redis: Any) -> list[tuple[str, float, bytes | None]]:
            found = await redis.execute_command("VSIM", vectors, "FP32", vector.tobytes(), "WITHSCORES", "COUNT", count)
            scores = _pairs(found)
            if not scores:
                return []
            questions = await redis.mget([self._names.question(partition, entry) for entry, _ in scores])
            return [(entry, score, stored) for (entry, score), stored in zip(scores, questions, strict=True)]

        near = []
        try:
            found = await self._store.call("index_search", vectors, command)
        except NotAValue:
            return []
        for entry, score, stored in found:
            question = _question(stored, entry)
            if question is None:
                await self.remove(partition, entry)
            else:
                near.append(
                    Near(question, 2 * score - 1)
                )  # Redis' score is 1 for the same direction, 0 for the opposite
        return near

    async def remove(self, partition: str, entry: str) -> None:
        """As `Index.remove`."""
        vectors = self._names.similar(partition)

        async def command(redis: Any) -> None:
            async with redis.pipeline(transaction=True) as steps:
                steps.execute_command("VREM", vectors, entry)
                steps.unlink(self._names.question(partition, entry))
                await steps.execute()

        await self._store.call("index_remove", vectors, command)

    async def _make_room(self, partition: str, but: str) -> None:
        """Remove one that is not `but`: which one, Redis draws."""
        vectors = self._names.similar(partition)

        async def command(redis: Any) -> list[bytes]:
            drawn: list[bytes] = await redis.execute_command("VRANDMEMBER", vectors, 2)
            return drawn

        for entry in await self._store.call("index_search", vectors, command):
            if entry.decode() != but:
                await self.remove(partition, entry.decode())
                return


class DetectedIndex:
    """Redis' index where the server has vector sets, and this process' own where it has none.

    Until Redis has said which, nothing is found: else what is added here would be missed there.

    Args:
        store: Redis.
        names: what things are called there.
        shared: for a server with vector sets.
        own: for one without.
    """

    def __init__(self, store: Store, names: Names, shared: Index, own: Index) -> None:
        self._store = store
        self._probe = names.similar("probe")  # under our prefix: others may be denied to our user
        self._shared = shared
        self._own = own
        self.chosen: Index | None = None

    async def add(self, partition: str, question: Question, vector: Vector, ttl_ms: int) -> None:
        """As `Index.add`."""
        await (await self._index()).add(partition, question, vector, ttl_ms)

    async def nearest(self, partition: str, vector: Vector, count: int) -> list[Near]:
        """As `Index.nearest`."""
        return await (await self._index()).nearest(partition, vector, count)

    async def remove(self, partition: str, entry: str) -> None:
        """As `Index.remove`."""
        await (await self._index()).remove(partition, entry)

    async def _index(self) -> Index:
        if self.chosen is None:
            self.chosen = self._shared if await self._has_vector_sets() else self._own
        return self.chosen

    async def _has_vector_sets(self) -> bool:
        async def command(redis: Any) -> bool:
            try:
                # An absent key and an absent command are told apart by the error, whatever the user may list.
                await redis.execute_command("VCARD", self._probe)
            except ResponseError as error:
                said = str(error).lower()
                if said.startswith(("unknown command", "noperm")) or "no permissions" in said:
                    return False
                raise
            return True

        return await self._store.call("index_detect", self._probe, command)


def _pairs(found: Any) -> list[tuple[str, float]]:
    """Elements and scores, whichever way the protocol wrote them."""
    if isinstance(found, dict):
        return [(entry.decode(), float(score)) for entry, score in found.items()]
    flat = list(found or [])
    return [(entry.decode(), float(score)) for entry, score in zip(flat[::2], flat[1::2], strict=True)]


def _question(stored: bytes | None, entry: str) -> Question | None:
    """What was stored; None: nothing, or not for us."""
    if stored is None:
        return None
    try:
        read = response_cache_pb2.StoredQuestion.FromString(stored)
    except DecodeError:
        return None
    if read.version != _VERSION or read.entry != entry:
        return None
    return Question(read.text, KeyDigests(read.entry, read.key_digest))
