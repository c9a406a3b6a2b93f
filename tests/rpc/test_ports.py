"""A service's two ports, as tools find them: what is on which, and reflection in both of its versions."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from baton.internal.v1 import cache_admin_pb2, cache_admin_pb2_grpc, response_cache_pb2, response_cache_pb2_grpc

REFLECTION = {"grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"}
TOKEN = "o" * 32


@contextlib.asynccontextmanager
async def running_cache(tmp_path: Path) -> AsyncIterator[dict[str, Any]]:
    ready = tmp_path / "ready.json"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "baton_cache", "--ready-file", str(ready), "--drain-seconds", "1",
        env={"BATON_ADMIN_TOKEN": TOKEN}, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(30):
            while not ready.exists():
                assert process.returncode is None
                await asyncio.sleep(0.05)
        said: dict[str, Any] = json.loads(ready.read_text())
        yield said
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 15)


async def reflect(channel: grpc.aio.Channel, version: str, **asked: str) -> reflection_pb2.ServerReflectionResponse:
    ask = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    (answer,) = [one async for one in ask(iter([reflection_pb2.ServerReflectionRequest(**asked)]), timeout=10)]
    return answer


async def test_what_is_on_which_port(tmp_path: Path) -> None:
    common = REFLECTION | {"grpc.health.v1.Health"}
    async with running_cache(tmp_path) as ready:
        for port, service in (("grpc", "baton.internal.v1.ResponseCache"), ("admin", "baton.internal.v1.CacheAdmin")):
            async with grpc.aio.insecure_channel(ready[port]) as channel:
                for version in ("v1", "v1alpha"):
                    listed = (await reflect(channel, version, list_services="*")).list_services_response.service
                    assert {one.name for one in listed} == common | {service}
                    for name in {service, *common}:
                        files = (await reflect(channel, version, file_containing_symbol=name)).file_descriptor_response
                        found = [
                            f"{file.package}.{one.name}"
                            for data in files.file_descriptor_proto
                            for file in [descriptor_pb2.FileDescriptorProto.FromString(data)]
                            for one in file.service
                        ]
                        assert name in found
                health = health_pb2_grpc.HealthStub(channel)
                for name in ("", service):
                    answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING
                assert set((await health.List(health_pb2.HealthListRequest(), timeout=10)).statuses) >= {"", service}
                admin = cache_admin_pb2_grpc.CacheAdminStub(channel)
                lookup = response_cache_pb2_grpc.ResponseCacheStub(channel).Lookup
                operator = (("authorization", f"Bearer {TOKEN}"),)
                stats = admin.GetStats(cache_admin_pb2.GetStatsRequest(), metadata=operator, timeout=10)
                asked = lookup(response_cache_pb2.LookupRequest(), metadata=operator, timeout=10)
                here, elsewhere = (stats, asked) if port == "admin" else (asked, stats)
                assert await here.code() in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT)
                assert await elsewhere.code() is grpc.StatusCode.UNIMPLEMENTED
                bare = await admin.GetStats(cache_admin_pb2.GetStatsRequest(), timeout=10).code()
                assert bare is (grpc.StatusCode.UNAUTHENTICATED if port == "admin" else grpc.StatusCode.UNIMPLEMENTED)


async def test_metadata_have_a_bound(tmp_path: Path) -> None:
    async with running_cache(tmp_path) as ready, grpc.aio.insecure_channel(ready["grpc"]) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check
        for size, expected in ((15_000, grpc.StatusCode.OK), (17_000, grpc.StatusCode.RESOURCE_EXHAUSTED)):
            for _ in range(5):
                call = health(health_pb2.HealthCheckRequest(), metadata=(("x-much", "m" * size),), timeout=10)
                assert await call.code() is expected
