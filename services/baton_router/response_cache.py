"""The response cache as the router uses it: a failure is a miss, and costs no more than its timeout."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import blake2b

import grpc

from baton.internal.v1 import response_cache_pb2, response_cache_pb2_grpc
from baton.rpc.channel import ChannelPool
from baton.rpc.patience import patience
from baton.telemetry import tracing
from baton.v1 import inference_pb2, sampling_pb2
from baton_router.flight import Flight
from baton_router.join import CacheLost, Join
from baton_router.metrics import CACHE_FAILURES
from baton_router.replicas import Replica, Replicas
from baton_router.validate import ResolvedRequest

log = logging.getLogger(__name__)

_SERVICE = "baton.internal.v1.ResponseCache"
FILL_SECONDS = 2.0
_OF_THE_REQUEST = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
"""Statuses by which a replica says that it works, and that a request is wrong."""
MAX_FILLS = 64


def cacheable(request: ResolvedRequest) -> bool:
    """Whether its answer is the same every time, and whole: it is deterministic, and starts from the beginning."""
    return request.deterministic and not request.delivered


def may_share(request: ResolvedRequest) -> bool:
    """Whether it may have the answer of an equal request, stored or in the making, and give its own to others."""
    return cacheable(request) and request.cache_mode == inference_pb2.CACHE_MODE_USE


def cache_key(request: ResolvedRequest, fingerprint: str, text_digest: str) -> response_cache_pb2.CacheKey:
    """Everything the answer depends on; the seed of a greedy request is not among it."""
    sampling = sampling_pb2.SamplingParams()
    sampling.CopyFrom(request.sampling)
    if sampling.temperature == 0:
        sampling.ClearField("seed")
    return response_cache_pb2.CacheKey(
        tenant=request.tenant,
        model_fingerprint=fingerprint,
        text_digest=text_digest,
        token_ids=request.prompt_ids,
        sampling=sampling,
        cache_salt=request.cache_salt,
    )


def _place(
    asked: response_cache_pb2.LookupRequest | response_cache_pb2.FillRequest | response_cache_pb2.JoinStart,
) -> bytes:
    """What chooses the replica: the key, but where similar questions count the same for all of them."""
    if not asked.HasField("question"):
        return digest(asked.key)
    rest = response_cache_pb2.CacheKey()
    rest.CopyFrom(asked.key)
    del rest.token_ids[:]
    rest.text_digest += asked.question.context.hex()
    return digest(rest)


def digest(question: response_cache_pb2.CacheKey | response_cache_pb2.JoinStart) -> bytes:
    """32 bytes that stand for a question here, and choose its replica. Never kept: another version's may differ."""
    return blake2b(question.SerializeToString(deterministic=True), digest_size=32).digest()


class ResponseCache:
    """Client of the cache service.

    Args:
        channels: to the cache service.
        replicas: of it.
        timeout: seconds a lookup may take.
        similar_timeout: seconds it may take where similar questions are looked for, too.
    """

    def __init__(self, channels: ChannelPool, replicas: Replicas, timeout: float, similar_timeout: float) -> None:
        self._channels = channels
        self._replicas = replicas
        self._timeout = timeout
        self._similar_timeout = similar_timeout
        self._fills: asyncio.TaskGroup | None = None
        self._filling = 0

    @property
    def enabled(self) -> bool:
        """Whether there is a cache service."""
        return self._replicas.configured

    @asynccontextmanager
    async def filling(self) -> AsyncIterator[None]:
        """Own the fills for the length of the block; those still running at its end get their time to finish."""
        async with asyncio.TaskGroup() as self._fills:
            yield
        self._fills = None

    async def lookup(self, request: response_cache_pb2.LookupRequest) -> response_cache_pb2.LookupResponse | None:
        """The cache's answer; None when it gave none in time."""
        replica = self._replicas.choose(_place(request))
        if replica is None:
            return None
        timeout = self._similar_timeout if request.HasField("question") else self._timeout
        try:
            async with self._channels.channel(replica.target) as channel:
                lookup = response_cache_pb2_grpc.ResponseCacheStub(channel).Lookup
                found = await tracing.call(f"{_SERVICE}/Lookup", lookup, request, timeout, replica.target)
        except grpc.aio.AioRpcError as error:
            _failed(replica, "lookup", error)
            return None
        replica.answered()
        return found

    @asynccontextmanager
    async def join(self, start: response_cache_pb2.JoinStart, flight: Flight) -> AsyncIterator[Join | None]:
        """Take a seat among those who ask the same; None when the cache gave none in time. Leaving the block leaves
        the seat.
        """
        replica = self._replicas.choose(_place(start))
        if replica is None:
            yield None
            return
        timeout = self._similar_timeout if start.HasField("question") else self._timeout
        async with self._channels.channel(replica.target) as channel:
            join = Join(flight, start)
            stub = response_cache_pb2_grpc.ResponseCacheStub(channel).Join
            call = tracing.call(f"{_SERVICE}/Join", stub, None, None, replica.target)
            speaking = asyncio.create_task(join.speak(call))
            seated = False
            try:
                try:
                    async with patience(timeout):
                        await join.take_seat(aiter(call))
                    replica.answered()
                    seated = True
                except TimeoutError:
                    _failed(replica, "join", CacheLost("too slow"))
                except (grpc.aio.AioRpcError, CacheLost) as error:
                    _failed(replica, "join", error)
                yield join if seated else None
            finally:
                call.cancel()
                speaking.cancel()
                await asyncio.wait([speaking])

    def fill(self, request: response_cache_pb2.FillRequest) -> None:
        """Store a complete answer in the background. Dropped when too many are on their way."""
        if self._fills is None or self._filling >= MAX_FILLS:
            CACHE_FAILURES.labels("fill_dropped").inc()
            return
        self._filling += 1
        self._fills.create_task(self._fill(request))

    async def _fill(self, request: response_cache_pb2.FillRequest) -> None:
        try:
            replica = self._replicas.choose(_place(request))
            if replica is None:
                CACHE_FAILURES.labels("fill_dropped").inc()
                return
            try:
                async with self._channels.channel(replica.target) as channel:
                    fill = response_cache_pb2_grpc.ResponseCacheStub(channel).Fill
                    await tracing.call(f"{_SERVICE}/Fill", fill, request, FILL_SECONDS, replica.target)
            except grpc.aio.AioRpcError as error:
                _failed(replica, "fill", error)
        finally:
            self._filling -= 1


def _failed(replica: Replica, what: str, error: grpc.aio.AioRpcError | CacheLost) -> None:
    code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
    if code in _OF_THE_REQUEST:
        replica.answered()
    else:
        replica.failed()
    CACHE_FAILURES.labels(what).inc()
    log.debug("%s at %s failed: %s", what, replica.target, error if code is None else code.name)
