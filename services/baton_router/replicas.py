"""The replicas of the cache service, and which of them to ask."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import xxhash

from baton.rpc.breaker import Breaker
from baton_router.metrics import CACHE_REPLICAS, CACHE_REPLICAS_LEFT_ALONE
from baton_router.targets import resolve_target

log = logging.getLogger(__name__)

_FAILURES: Final = 3
_PAUSE_SECONDS: Final = 1.0


class Replica:
    """One replica, and how it does.

    Attributes:
        target: its address.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self._breaker = Breaker(failures=_FAILURES, pause_seconds=_PAUSE_SECONDS)

    @property
    def left_alone(self) -> bool:
        """Whether it did not answer, so that most calls pass it by."""
        return self._breaker.open

    def allows(self) -> bool:
        """Whether to call it; a True may be the one trial of a pause."""
        return self._breaker.allows()

    def answered(self) -> None:
        """A call was answered."""
        if self._breaker.worked():
            CACHE_REPLICAS_LEFT_ALONE.dec()

    def failed(self) -> None:
        """A call was not answered."""
        if self._breaker.failed():
            CACHE_REPLICAS_LEFT_ALONE.inc()


class Replicas:
    """All replicas there are now.

    Args:
        targets: host:port, or dns:///name:port for every address of a name. Empty: there is no cache.
        resolve_every: seconds between two looks at names.
    """

    def __init__(self, targets: Sequence[str], resolve_every: float) -> None:
        self._targets = targets
        self._resolve_every = resolve_every
        self._replicas: dict[str, Replica] = {}

    @property
    def configured(self) -> bool:
        """Whether there should be any."""
        return bool(self._targets)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Know the replicas, for the length of the block."""
        await self._resolve()
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch())
            try:
                yield
            finally:
                watching.cancel()

    def choose(self, key: bytes) -> Replica | None:
        """The replica for a key: the same one for every router that sees the same replicas, and the next in line while
        that one does not answer (rendezvous hashing). None: there is none to ask.
        """
        ranked = sorted(self._replicas.values(), key=lambda one: xxhash.xxh3_64_intdigest(key + one.target.encode()))
        return next((replica for replica in ranked if replica.allows()), None)

    async def _watch(self) -> None:
        while any(target.startswith("dns:") for target in self._targets):
            await asyncio.sleep(self._resolve_every)
            await self._resolve()

    async def _resolve(self) -> None:
        found: dict[str, Replica] = {}
        for target in self._targets:
            try:
                addresses = await resolve_target(target)
            except OSError as error:
                log.debug("%s does not resolve: %s", target, error)
                return  # what was known still is
            for address in addresses:
                found[address] = self._replicas.get(address) or Replica(address)
        for address, replica in self._replicas.items():
            if address not in found and replica.left_alone:
                CACHE_REPLICAS_LEFT_ALONE.dec()
        self._replicas = found
        CACHE_REPLICAS.set(len(found))
