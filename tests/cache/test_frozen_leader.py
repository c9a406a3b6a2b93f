"""A router that freezes while it leads: its process lives, its connection stands, and nothing comes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

from baton.internal.v1 import response_cache_pb2, response_cache_pb2_grpc
from baton.rpc.channel import mesh_channel
from tests.cache.conftest import Cache, cache, cache_key, redis_server  # noqa: F401 fixtures

NOTICED_SECONDS = 20.0
"""Keepalive takes 2 s; without a bound on its pings, a minute."""


async def lead(address: str) -> None:
    """Take the lead, say so, and wait."""
    async with mesh_channel(address) as channel:
        call = response_cache_pb2_grpc.ResponseCacheStub(channel).Join()
        start = response_cache_pb2.JoinStart(key=cache_key())
        await call.write(response_cache_pb2.JoinRequest(start=start))
        print((await call.read()).seat.role, flush=True)
        await asyncio.sleep(3600)


async def test_a_frozen_leader_is_followed(cache: Cache) -> None:  # noqa: F811
    command = [sys.executable, "-m", __name__, cache.address]
    leader = subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: ASYNC220 it returns at once
    try:
        assert leader.stdout is not None
        assert int(await asyncio.to_thread(leader.stdout.readline)) == response_cache_pb2.JOIN_ROLE_LEADER
        call = cache.stub.Join()
        start = response_cache_pb2.JoinStart(key=cache_key())
        await call.write(response_cache_pb2.JoinRequest(start=start))
        assert (await call.read()).seat.role == response_cache_pb2.JOIN_ROLE_FOLLOWER
        os.kill(leader.pid, signal.SIGSTOP)
        async with asyncio.timeout(NOTICED_SECONDS):
            assert (await call.read()).seat.role == response_cache_pb2.JOIN_ROLE_LEADER
        call.cancel()
    finally:
        leader.kill()
        leader.wait()


if __name__ == "__main__":
    asyncio.run(lead(sys.argv[1]))
