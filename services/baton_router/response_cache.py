"""The response cache as the router uses it: a failure is a miss, and costs no more than its timeout."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from baton.internal.v1 import response_cache_pb2, response_cache_pb2_grpc
from baton.rpc.breaker import Breaker
from baton.rpc.channel import ChannelPool
from baton.telemetry import tracing
from baton.v1 import inference_pb2, sampling_pb2
from baton_router.metrics import CACHE_FAILURES
from baton_router.validate import ResolvedRequest

log = logging.getLogger(__name__)

_SERVICE = "baton.internal.v1.ResponseCache"
FILL_SECONDS = 2.0
MAX_FILLS = 64

_READS = (inference_pb2.CACHE_MODE_USE, inference_pb2.CACHE_MODE_ONLY)
_WRITES = (inference_pb2.CACHE_MODE_USE, inference_pb2.CACHE_MODE_REFRESH)


def may_read(request: ResolvedRequest) -> bool:
    """Whether a stored answer may be this request's: it is deterministic, allowed, and from the start."""
    return request.deterministic and not request.delivered and request.cache_mode in _READS


def may_write(request: ResolvedRequest) -> bool:
    """Whether this request's answer may be stored."""
    return request.deterministic and not request.delivered and request.cache_mode in _WRITES


def cache_key(
    request: ResolvedRequest, fingerprint: str, text_digest: str, tenant: str = ""
) -> response_cache_pb2.CacheKey:
    """Everything the answer depends on; the seed of a greedy request is not among it."""
    sampling = sampling_pb2.SamplingParams()
    sampling.CopyFrom(request.sampling)
    if sampling.temperature == 0:
        sampling.ClearField("seed")
    return response_cache_pb2.CacheKey(
        tenant=tenant,
        model_fingerprint=fingerprint,
        text_digest=text_digest,
        token_ids=request.prompt_ids,
        sampling=sampling,
    )


class ResponseCache:
    """Client of the cache service.

    Args:
        channels: to the cache service.
        target: its address; empty: there is none, and every lookup is a miss without a call.
        timeout: seconds a lookup may take.
    """

    def __init__(self, channels: ChannelPool, target: str, timeout: float) -> None:
        self._channels = channels
        self._target = target
        self._timeout = timeout
        self._breaker = Breaker(failures=3, pause_seconds=1.0)
        self._fills: asyncio.TaskGroup | None = None
        self._filling = 0

    @property
    def enabled(self) -> bool:
        """Whether there is a cache service."""
        return bool(self._target)

    @asynccontextmanager
    async def filling(self) -> AsyncIterator[None]:
        """Own the fills for the length of the block; those still running at its end get their time to finish."""
        async with asyncio.TaskGroup() as self._fills:
            yield
        self._fills = None

    async def lookup(self, key: response_cache_pb2.CacheKey) -> response_cache_pb2.LookupResponse | None:
        """The cache's answer; None when it gave none in time."""
        if not self._breaker.allows():
            return None
        try:
            async with self._channels.channel(self._target) as channel:
                lookup = response_cache_pb2_grpc.ResponseCacheStub(channel).Lookup
                request = response_cache_pb2.LookupRequest(key=key)
                found = await tracing.call(f"{_SERVICE}/Lookup", lookup, request, self._timeout, self._target)
        except grpc.aio.AioRpcError as error:
            self._breaker.failed()
            CACHE_FAILURES.labels("lookup").inc()
            log.debug("lookup failed: %s", error.code().name)
            return None
        self._breaker.worked()
        return found

    def fill(
        self,
        key: response_cache_pb2.CacheKey,
        answer: response_cache_pb2.CachedAnswer,
        ttl_seconds: float | None,
    ) -> None:
        """Store a complete answer in the background. Dropped when too many are on their way."""
        if self._fills is None or self._filling >= MAX_FILLS or not self._breaker.allows():
            CACHE_FAILURES.labels("fill_dropped").inc()
            return
        request = response_cache_pb2.FillRequest(key=key, answer=answer)
        if ttl_seconds is not None:
            request.ttl.FromNanoseconds(int(ttl_seconds * 1e9))
        self._filling += 1
        self._fills.create_task(self._fill(request))

    async def _fill(self, request: response_cache_pb2.FillRequest) -> None:
        try:
            async with self._channels.channel(self._target) as channel:
                fill = response_cache_pb2_grpc.ResponseCacheStub(channel).Fill
                await tracing.call(f"{_SERVICE}/Fill", fill, request, FILL_SECONDS, self._target)
        except grpc.aio.AioRpcError as error:
            self._breaker.failed()
            CACHE_FAILURES.labels("fill").inc()
            log.debug("fill failed: %s", error.code().name)
        finally:
            self._filling -= 1
