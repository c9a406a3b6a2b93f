"""What a receiver can read KV from besides the call: the pools of prefill services, by shared memory or NIXL."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from baton.handoff import nixl, shm
from baton.handoff.receiver import Piece
from baton.handoff.transport import Transport, TransportFailed
from baton.internal.v1 import prefill_pb2
from baton.v1 import inference_pb2

_KEPT: Final = 64  # pools mapped at most
_PIECE_BYTES: Final = 1024 * 1024  # copied in one go: nothing else runs here meanwhile


class Source(Protocol):
    """A pool that can be read from here."""

    async def read(self, pieces: Sequence[Piece]) -> None:
        """Bring pieces into the own pool.

        Raises:
            TransportFailed: it cannot be read any more.
        """

    def held(self, lease: prefill_pb2.Lease) -> bool:
        """Whether the call certainly held, until now, what was read of it. False: only its Done can say."""


class SharedMemorySource:
    """Reads a pool that is mapped."""

    def __init__(self, pool: shm.LentPool, memory: memoryview) -> None:
        self._pool = pool
        self._memory = memory

    async def read(self, pieces: Sequence[Piece]) -> None:
        """As `Source.read`."""
        copied = 0
        for piece in pieces:
            for at in range(0, piece.size, _PIECE_BYTES):
                if copied >= _PIECE_BYTES:
                    copied = 0
                    await asyncio.sleep(0)
                size = min(_PIECE_BYTES, piece.size - at)
                source, target = piece.source + at, piece.target + at
                if source + size > len(self._pool.memory):
                    raise TransportFailed("the prefill service names memory that it did not lend, or it is gone")
                self._memory[target : target + size] = self._pool.memory[source : source + size]
                copied += size

    def held(self, lease: prefill_pb2.Lease) -> bool:
        """As `Source.held`."""
        return self._pool.held(lease)


class Sources:
    """All pools this process can read, opened when first needed.

    Args:
        memory: the own pool, which is written.
        shm_directory: where prefill services of this host lend theirs.
        nixl_reader: what reads by NIXL; None: nothing does.
    """

    def __init__(self, memory: memoryview, shm_directory: Path, nixl_reader: nixl.Reader | None = None) -> None:
        self._memory = memory
        self._directory = shm_directory
        self._nixl = nixl_reader
        self._pools: OrderedDict[str, shm.LentPool] = OrderedDict()
        self._opening: dict[str, asyncio.Task[shm.LentPool]] = {}

    async def open(self, transport: Transport, accepted: prefill_pb2.PrefillAccepted) -> Source:
        """What a prefill service offers.

        Raises:
            TransportFailed: it cannot be had here.
        """
        if transport == inference_pb2.TRANSPORT_SHM:
            return SharedMemorySource(await self._pool(accepted.shared_memory), self._memory)
        if self._nixl is None:
            raise TransportFailed("this worker has no NIXL")
        return await self._nixl.open(accepted.nixl)

    def mapped(self, name: str) -> bool:
        """Whether the pool that a prefill service lends under this name can be read without asking for it."""
        return name in self._pools

    def close(self) -> None:
        """Let all pools go."""
        for opening in self._opening.values():
            opening.cancel()
        for name in list(self._pools):
            self._drop(name)
        if self._nixl is not None:
            self._nixl.close()

    async def _pool(self, offer: prefill_pb2.SharedMemory) -> shm.LentPool:
        name = offer.name
        if (pool := self._pools.get(name)) is not None:
            self._pools.move_to_end(name)
            return pool
        # Requests that meet a new prefill service together map it once, or wait for the same failure; a service that
        # does not answer keeps nobody from another one.
        if (opening := self._opening.get(name)) is None:
            opening = self._opening[name] = asyncio.create_task(self._map(offer))
            opening.add_done_callback(lambda done: self._opened(name, done))
        return await asyncio.shield(opening)

    async def _map(self, offer: prefill_pb2.SharedMemory) -> shm.LentPool:
        pool = await shm.borrow(self._directory, offer)
        self._pools[offer.name] = pool
        asyncio.get_running_loop().add_reader(pool.connection, self._drop, offer.name)
        if len(self._pools) > _KEPT:
            self._drop(next(iter(self._pools)))
        return pool

    def _opened(self, name: str, opening: asyncio.Task[shm.LentPool]) -> None:
        del self._opening[name]
        if not opening.cancelled():
            opening.exception()  # told to those who wait; they may all have left

    def _drop(self, name: str) -> None:
        """The lender is gone, or is not needed: who still reads from it fails, and takes another way."""
        pool = self._pools.pop(name, None)
        if pool is not None:
            with suppress(RuntimeError):  # a loop that is closed watches nothing
                asyncio.get_running_loop().remove_reader(pool.connection)
            pool.close()
