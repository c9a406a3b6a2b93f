"""What `baton cache` shows, and removes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis

from baton.cli.redis_server import EmbeddedRedis
from baton.internal.v1 import cache_admin_pb2, cache_admin_pb2_grpc
from baton_cache.key import Keys
from tests.cache.conftest import Cache, an_answer, cache_key, eventually, running_cache
from tests.cache.redis_lab import FREEZE, a_cluster, join, running

ENTRY = Keys(b"").digests(cache_key()).name


async def run(cache: Cache, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`baton cache`, asking this cache."""
    command = [sys.executable, "-m", "baton.cli", "cache", *arguments]
    environment = os.environ | {"BATON_CACHE_ADMIN_TARGET": cache.address, "COLUMNS": "200"}
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60, env=environment, stdin=subprocess.DEVNULL
    )


async def as_json(cache: Cache, *arguments: str) -> dict[str, Any]:
    """What it says, for a program."""
    done = await run(cache, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def admin(channel: grpc.aio.Channel) -> cache_admin_pb2_grpc.CacheAdminAsyncStub:
    return cache_admin_pb2_grpc.CacheAdminStub(channel)


async def code_of(call: grpc.aio.UnaryUnaryCall) -> grpc.StatusCode:  # type: ignore[type-arg]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def test_stats(cache: Cache, stored: redis.Redis) -> None:
    for i in range(20):
        assert await cache.fill(cache_key((i,)), an_answer())
    for i in range(30):
        stored.set(f"other:{i}", "x")
    before = await as_json(cache, "stats")
    for i in range(5):
        await cache.lookup(cache_key((i,)))
    await cache.lookup(cache_key((99,)))
    stats = await as_json(cache, "stats")
    assert stats["mode"] == "single"
    (server,) = stats["servers"]
    assert (server["entries"], server["keys"], server["estimated"]) == ("20", "50", False)
    weight = sum(stored.memory_usage(name) or 0 for name in stored.scan_iter("baton:answer:*"))
    assert int(server["entry_bytes"]) == weight
    assert server["version"] == stored.info()["redis_version"]
    assert (server["role"], server["eviction_policy"]) == ("master", "allkeys-lru")
    assert int(server["max_memory_bytes"]) == 64 * 1024 * 1024
    rise = {name: int(stats["lookups"][name]) - int(before["lookups"][name]) for name in stats["lookups"]}
    assert rise == {"local_hits": 0, "redis_hits": 5, "absent": 1, "store_failed": 0, "corrupt": 0}


async def test_many_entries_are_estimated(cache: Cache, stored: redis.Redis) -> None:
    pipeline = stored.pipeline(transaction=False)
    for i in range(40_000):
        name = f"baton:answer:{{{i:016x}-{i:064x}}}" if i % 4 == 0 else f"other:{i}"
        pipeline.set(name, bytes(100))
    pipeline.execute()
    (server,) = (await as_json(cache, "stats"))["servers"]
    assert server["estimated"]
    assert server["keys"] == "40000"
    assert 9_000 < int(server["entries"]) < 11_000


async def test_stats_for_a_person(cache: Cache, stored: redis.Redis) -> None:
    stored.config_set("maxmemory-policy", "noeviction")
    await cache.fill(cache_key(), an_answer())
    shown = await run(cache, "stats")
    assert shown.returncode == 0, shown.stderr
    for part in ("single Redis", "1 of 1 keys", "noeviction", "allkeys-lru"):
        assert part in shown.stdout, part


async def test_stats_without_redis(redis_server: EmbeddedRedis) -> None:
    async with running_cache(redis_server.url, redis_timeout=0.2) as cache:
        os.kill(redis_server.pid, FREEZE)
        shown = await run(cache, "stats")
        assert shown.returncode == 1
        assert "does not answer" in shown.stdout


async def test_flush_of_a_tenant(cache: Cache, stored: redis.Redis) -> None:
    tenants = ("", "a", "b", "*", "a*")
    for tenant in tenants:
        for i in range(30):
            assert await cache.fill(cache_key((i,), tenant=tenant), an_answer())
    stored.set("other", "x")
    for flushed in ("a", "*", ""):
        assert await as_json(cache, "flush", "--tenant", flushed) == {"removed": "30"}
        for tenant in tenants:
            gone = tenants.index(tenant) in {1, *([3] if flushed != "a" else []), *([0] if flushed == "" else [])}
            assert (await cache.lookup(cache_key((7,), tenant=tenant))).hit != gone, (flushed, tenant)
    assert stored.dbsize() == 61


async def test_flush_of_all(cache: Cache, stored: redis.Redis) -> None:
    for i in range(1500):
        stored.set(f"baton:answer:{{{i:016x}-{i:064x}}}", "x")
    stored.set("baton:lead:{x}", "x")
    stored.set("other:{x}", "x")
    refused = await run(cache, "flush", "--all")
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    assert stored.dbsize() == 1502
    assert await as_json(cache, "flush", "--all", "--yes") == {"removed": "1501"}
    assert stored.keys() == [b"other:{x}"]


@pytest.mark.parametrize("arguments", [("--all", "--yes"), ("--tenant", "a")])
async def test_a_flush_leaves_a_longer_prefix_alone(
    redis_server: EmbeddedRedis, stored: redis.Redis, arguments: tuple[str, ...]
) -> None:
    stored.set("baton:jobs:{x}", "of another program")
    key = cache_key(tenant="a")
    async with (
        running_cache(redis_server.url) as cache,
        running_cache(redis_server.url, key_prefix="baton:staging:") as other,
    ):
        assert await cache.fill(key, an_answer())
        assert await other.fill(key, an_answer())
        assert await as_json(cache, "flush", *arguments) == {"removed": "1"}
        assert not (await cache.lookup(key)).hit
        assert (await other.lookup(key)).hit
    assert stored.exists("baton:jobs:{x}")


@pytest.mark.parametrize("arguments", [(), ("--all", "--tenant", "a")])
async def test_flush_of_what(cache: Cache, arguments: tuple[str, ...]) -> None:
    assert (await run(cache, "flush", *arguments)).returncode == 2
    async with grpc.aio.insecure_channel(cache.address) as channel:
        request = cache_admin_pb2.FlushRequest(all=bool(arguments), tenant="a" if arguments else None)
        assert await code_of(admin(channel).Flush(request)) is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_flush_reaches_memory_everywhere(redis_server: EmbeddedRedis) -> None:
    local = {"local_bytes": 10**6, "local_ping_seconds": 0.1}
    async with running_cache(redis_server.url, **local) as one, running_cache(redis_server.url, **local) as two:
        assert await one.fill(cache_key(), an_answer())

        async def held() -> bool:
            assert (await one.lookup(cache_key())).hit
            assert (await two.lookup(cache_key())).hit
            return int((await as_json(two, "stats"))["local"]["entries"]) == 1

        async def gone() -> bool:
            return not (await one.lookup(cache_key())).hit and not (await two.lookup(cache_key())).hit

        await eventually(held, 30)
        await as_json(one, "flush", "--tenant", "")
        await eventually(gone, 10)


async def test_flush_of_a_cluster(tmp_path: Path) -> None:
    servers = a_cluster(tmp_path)
    with running(*servers):
        await asyncio.to_thread(join, servers)
        async with running_cache(f"redis+cluster://127.0.0.1:{servers[0].port}") as cache:
            for i in range(60):
                assert await cache.fill(cache_key((i,), tenant="ab"[i % 2]), an_answer())
            stats = await as_json(cache, "stats")
            assert sum(int(server["entries"]) for server in stats["servers"]) == 60
            assert len(stats["servers"]) == 3
            assert await as_json(cache, "flush", "--tenant", "a") == {"removed": "30"}
            found = [(await cache.lookup(cache_key((i,), tenant="ab"[i % 2]))).hit for i in range(60)]
            assert found == [False, True] * 30
            servers[1].signal(FREEZE)
            failed = await run(cache, "flush", "--tenant", "b")
            assert failed.returncode == 1
            assert "not everything is removed" in failed.stderr


async def test_an_entry(cache: Cache) -> None:
    answer = an_answer("the fox ", chunks=100)
    await cache.fill(cache_key(), answer, ttl=100)
    assert (await cache.lookup(cache_key())).entry == ENTRY
    entry = await as_json(cache, "get", ENTRY)
    assert (entry["finish_reason"], entry["chunks"], entry["text"]) == ("FINISH_REASON_LENGTH", 100, "")
    assert entry["usage"]["completion_tokens"] == 200
    assert int(entry["stored_bytes"]) < int(entry["answer_bytes"]) == answer.ByteSize()
    assert 80 < float(entry["ttl"].rstrip("s")) <= 100
    shown = await run(cache, "get", ENTRY)
    assert "length" in shown.stdout
    assert "the fox" not in shown.stdout
    assert "the fox 0the fox 1" in (await run(cache, "get", ENTRY, "--text")).stdout


async def test_no_such_entry(cache: Cache, stored: redis.Redis, redis_server: EmbeddedRedis) -> None:
    absent = await run(cache, "get", ENTRY)
    assert absent.returncode == 1
    assert "NOT_FOUND" in absent.stderr
    assert (await run(cache, "get", "*")).returncode == 1
    stored.set("baton:answer:{" + ENTRY + "}", "garbage")
    async with grpc.aio.insecure_channel(cache.address) as channel:
        stub = admin(channel)
        request = cache_admin_pb2.GetEntryRequest(entry=ENTRY)
        assert await code_of(stub.GetEntry(request)) is grpc.StatusCode.FAILED_PRECONDITION
        assert stored.exists("baton:answer:{" + ENTRY + "}"), "looking removes nothing"
        for name in ("", "*", ENTRY.upper(), ENTRY + "x"):
            request = cache_admin_pb2.GetEntryRequest(entry=name)
            assert await code_of(stub.GetEntry(request)) is grpc.StatusCode.INVALID_ARGUMENT
        redis_server.close()
        request = cache_admin_pb2.GetEntryRequest(entry=ENTRY)
        assert await code_of(stub.GetEntry(request)) is grpc.StatusCode.UNAVAILABLE


async def test_nobody_answers(unused_tcp_port: int) -> None:
    cache = Cache(None, f"127.0.0.1:{unused_tcp_port}", None)  # type: ignore[arg-type]
    failed = await run(cache, "stats")
    assert failed.returncode == 1
    assert "nothing answers" in failed.stderr
