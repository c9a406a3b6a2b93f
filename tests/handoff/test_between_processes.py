"""The same KV by every transport, between two real processes."""

from __future__ import annotations

import importlib.util

import grpc
import pytest

from baton.bench.handoff import run, two_processes
from baton.bench.handoff_shape import Shape
from baton.handoff.transport import FASTEST_FIRST, Transport, name
from baton.rpc.channel import MESH_CHANNEL_OPTIONS
from baton.v1 import inference_pb2

SHAPE = Shape(tokens=300, step_tokens=128, layers=3)
CREDIT = 1 << 20

needs_nixl = pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="the nixl extra is not installed")


@pytest.mark.parametrize(
    "transport", [pytest.param(t, marks=needs_nixl if name(t) == "nixl" else (), id=name(t)) for t in FASTEST_FIRST]
)
async def test_the_same_bytes(transport: Transport) -> None:
    async with (
        two_processes(SHAPE, CREDIT) as bench,
        grpc.aio.insecure_channel(bench.address, options=MESH_CHANNEL_OPTIONS) as channel,
    ):
        await bench.handoff(channel, inference_pb2.TRANSPORT_GRPC)
        expected = bytes(bench.memory)
        assert len(set(expected)) > 200
        for _ in range(2):  # the first one meets the other process
            bench.memory[:] = bytes(len(bench.memory))
            cost, seconds = await bench.handoff(channel, transport)
            assert cost.transport == transport
            assert seconds > 0
            assert bench.memory == expected


async def test_the_benchmark_reports_every_way() -> None:
    """What it measures is checked by eye; that it runs and adds up, here."""
    result = await run(SHAPE, rounds=2, credit_bytes=CREDIT)
    ways = {way.name: way for way in result.ways}
    assert {
        "memcpy",
        "tcp",
        "grpcio stream",
        "grpcio call",
        "shm",
        "shm, cold",
        "shm, after the prompt",
        "grpc",
    } <= ways.keys()
    assert all(len(way.seconds) == 2 and min(way.seconds) > 0 for way in result.ways)
    assert ways["grpc"].ratios == [
        limit / own for limit, own in zip(ways["grpcio stream"].seconds, ways["grpc"].seconds, strict=True)
    ]
    assert {"shm", "grpc"} <= result.first_contact.keys()
    assert result.to_json()["bytes"] == SHAPE.bytes
    for way in ways:
        assert f"| {way} |" in result.markdown()
