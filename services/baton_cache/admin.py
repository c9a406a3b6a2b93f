"""What operators ask: statistics, a flush, an entry."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any, Final

import grpc
from google.protobuf.duration_pb2 import Duration
from prometheus_client import REGISTRY

from baton.internal.v1 import cache_admin_pb2, cache_admin_pb2_grpc
from baton.rpc.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from baton.rpc.interceptor import adopt_request_id
from baton_cache.answers import Answers
from baton_cache.key import Keys
from baton_cache.local import LocalTier
from baton_cache.names import Names, is_entry
from baton_cache.store import NotAValue, Store, StoreFailed
from baton_cache.survey import flush, survey
from baton_cache.value import CorruptValue, OtherVersion, TooLarge

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
_NO_ANSWER: Final = "Redis does not answer, or refuses"


class CacheAdminServicer(cache_admin_pb2_grpc.CacheAdminServicer):
    """The operators' API. Unlike the cache's own it does fail when Redis fails: who asks wants to know.

    Args:
        mode: how Redis is run, in a word.
        store: Redis.
        names: what things are called there.
        keys: tags of tenants.
        answers: what is stored.
        local: what is held in memory.
    """

    def __init__(self, mode: str, store: Store, names: Names, keys: Keys, answers: Answers, local: LocalTier) -> None:
        self._mode = mode
        self._store = store
        self._names = names
        self._keys = keys
        self._answers = answers
        self._local = local
        self._started = time.monotonic()
        self._flushing = asyncio.Lock()

    async def GetStats(
        self, request: cache_admin_pb2.GetStatsRequest, context: Context
    ) -> cache_admin_pb2.GetStatsResponse:
        """What is stored, and how well that works."""
        adopt_request_id(context)
        servers = self._store.servers.all()
        return cache_admin_pb2.GetStatsResponse(
            mode=self._mode,
            servers=sorted(
                await asyncio.gather(*(survey(self._store, self._names, server) for server in servers)),
                key=lambda server: server.address,
            ),
            lookups=cache_admin_pb2.CacheLookups(
                local_hits=_counted("hits_total", tier="local"),
                redis_hits=_counted("hits_total", tier="redis"),
                absent=_counted("lookups_total", outcome="absent"),
                store_failed=_counted("lookups_total", outcome="store_failed"),
                corrupt=_counted("lookups_total", outcome="corrupt"),
            ),
            local=cache_admin_pb2.CacheLocalTier(
                on=self._local.on,
                entries=len(self._local),
                bytes=self._local.size,
                max_bytes=self._local.max_bytes,
            ),
            uptime=_duration(time.monotonic() - self._started),
        )

    async def Flush(self, request: cache_admin_pb2.FlushRequest, context: Context) -> cache_admin_pb2.FlushResponse:
        """Remove the entries of a tenant, or all."""
        adopt_request_id(context)
        if request.all == request.HasField("tenant"):
            raise InvalidArgument("tenant", "must be set, or all instead")
        if self._flushing.locked():
            raise Unavailable("another flush is under way")
        tag = self._keys.tenant_tag(request.tenant)
        pattern = self._names.pattern() if request.all else self._names.tenant_pattern(tag)
        async with self._flushing:
            try:
                removed = await flush(self._store, self._names, pattern)
            except StoreFailed:
                raise Unavailable(f"{_NO_ANSWER}: not everything is removed") from None
        log.info("flushed", extra={"removed": removed, "everything": request.all})
        return cache_admin_pb2.FlushResponse(removed=removed)

    async def GetEntry(
        self, request: cache_admin_pb2.GetEntryRequest, context: Context
    ) -> cache_admin_pb2.GetEntryResponse:
        """One entry."""
        adopt_request_id(context)
        if not is_entry(request.entry):
            raise InvalidArgument("entry", "must be the name of an entry, as responses tell it")
        try:
            found = await self._answers.look(request.entry)
        except StoreFailed:
            raise Unavailable(_NO_ANSWER) from None
        except OtherVersion:
            raise FailedPrecondition("the entry is of another version of Baton") from None
        except TooLarge:
            raise FailedPrecondition("the entry is over the size limit of this cache") from None
        except (CorruptValue, NotAValue):
            raise FailedPrecondition("the entry is broken: the next lookup removes it") from None
        if found is None:
            raise NotFound("there is no such entry, or it has expired")
        answer, read = found
        return cache_admin_pb2.GetEntryResponse(
            finish_reason=answer.finish_reason,
            usage=answer.usage if answer.HasField("usage") else None,
            chunks=len(answer.chunks),
            stored_bytes=len(read.value),
            answer_bytes=answer.ByteSize(),
            ttl=None if math.isinf(read.ttl_seconds) else _duration(read.ttl_seconds),
            text="".join(chunk.text for chunk in answer.chunks) if request.text else "",
        )


def _counted(metric: str, **labels: str) -> int:
    return int(REGISTRY.get_sample_value(f"baton_cache_{metric}", labels) or 0)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
