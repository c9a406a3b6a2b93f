"""Put the cache service together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from baton.internal.v1 import cache_admin_pb2_grpc, response_cache_pb2_grpc
from baton.rpc.breaker import Breaker
from baton.rpc.service import Runtime
from baton_cache.admin import CacheAdminServicer
from baton_cache.answers import Answers
from baton_cache.flights import Flights
from baton_cache.key import Keys
from baton_cache.local import LocalTier
from baton_cache.names import Names
from baton_cache.semantic.build import semantic_cache
from baton_cache.servicer import Lifetimes, ResponseCacheServicer
from baton_cache.settings import CacheSettings
from baton_cache.store import Store
from baton_cache.tracking import Tracking

_IN_THE_MAKING = 4  # times the longest stored value: followers get answers that are too long to be stored, too


@asynccontextmanager
async def build(settings: CacheSettings, runtime: Runtime) -> AsyncIterator[None]:
    """Connect to Redis if it is there, register the servicer; close the connections on exit."""
    secret = settings.secret()
    url, options = settings.redis()

    def breaker() -> Breaker:
        return Breaker(settings.breaker_failures, settings.breaker_seconds)

    async with Store.connected(url, options, breaker, settings.of_sentinels()) as store:
        names = Names(settings.key_prefix)
        local = LocalTier(settings.local_bytes, settings.local_entries)
        answers = Answers(store, local, names, settings.max_answer_bytes)
        flights = Flights(store, names, answers, settings.max_flights, _IN_THE_MAKING * settings.max_answer_bytes)
        lifetimes = Lifetimes(settings.default_ttl_seconds, settings.max_ttl_seconds)
        keys = Keys(secret)
        admin = CacheAdminServicer(url.mode.value, store, names, keys, answers, local)
        cache_admin_pb2_grpc.add_CacheAdminServicer_to_server(admin, runtime.admin)
        runtime.register_admin("baton.internal.v1.CacheAdmin")
        async with AsyncExitStack() as running:
            semantic = await running.enter_async_context(semantic_cache(settings, store, names, keys, answers))
            servicer = ResponseCacheServicer(keys, answers, flights, lifetimes, semantic)
            response_cache_pb2_grpc.add_ResponseCacheServicer_to_server(servicer, runtime.server)
            runtime.register("baton.internal.v1.ResponseCache")
            if settings.local_bytes:
                tracking = Tracking(store.servers, names.answers, local, settings.local_ping_seconds)
                await running.enter_async_context(tracking.running())
            await running.enter_async_context(flights.owned(runtime.draining))
            yield
