"""No tenant ever gets what another one stored: a real cache, a real Redis, and tenants that look alike."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.cli.redis_server import EmbeddedRedis
from baton.internal.v1 import response_cache_pb2, response_cache_pb2_grpc
from tests.cache.conftest import an_answer, cache_key, running_cache

ALIKE = ["", "a", "A", "a ", "aa", "a\0", "á", "á", "{a}", "a}", "a:b", "a-", "*", "a*", "[a]", "tenant", "tenant2"]
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["fill", "look up"]),
        st.sampled_from(ALIKE) | st.text(max_size=3),
        st.sampled_from([(1,), (1, 2)]),
    ),
    min_size=10,
    max_size=40,
)


@contextmanager
def serving(**given: object) -> Iterator[response_cache_pb2_grpc.ResponseCacheStub]:
    """A cache on a loop of its own, for a test that cannot wait: hypothesis' are plain functions."""
    redis = EmbeddedRedis()
    redis.start()
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()
    running = running_cache(redis.url, **given)

    def wait(coroutine: object) -> object:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)  # type: ignore[arg-type]

    try:
        cache = wait(running.__aenter__())
        with grpc.insecure_channel(cache.address) as channel:  # type: ignore[attr-defined]
            yield response_cache_pb2_grpc.ResponseCacheStub(channel)
        wait(running.__aexit__(None, None, None))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        redis.close()


@pytest.fixture(
    scope="module", params=[{}, {"key_secret": "s"}, {"local_bytes": 10**6}], ids=["plain", "keyed", "local"]
)
def stub(request: pytest.FixtureRequest) -> Iterator[response_cache_pb2_grpc.ResponseCacheStub]:
    with serving(**request.param) as one:
        yield one


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS)
def test_no_tenant_gets_anothers_answer(
    stub: response_cache_pb2_grpc.ResponseCacheStub, operations: list[tuple[str, str, tuple[int, ...]]]
) -> None:
    stored: dict[tuple[str, tuple[int, ...]], str] = {}
    for what, tenant, ids in operations:
        key = cache_key((*ids, 9), tenant=tenant)
        if what == "fill":
            assert stub.Fill(response_cache_pb2.FillRequest(key=key, answer=an_answer(repr(tenant))), timeout=10).stored
            stored[tenant, ids] = repr(tenant)
        else:
            found = stub.Lookup(response_cache_pb2.LookupRequest(key=key), timeout=10)
            # What an earlier example stored may be found, too: under the same name, it is the same.
            if found.hit:
                assert found.answer == an_answer(repr(tenant))
            assert found.hit or (tenant, ids) not in stored
