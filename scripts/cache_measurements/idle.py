"""A router that does nothing for an answer: what gRPC and one hop take by themselves."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import grpc

from baton.v1 import inference_pb2_grpc
from cache_measurements.asking import Stub

_START_SECONDS: Final = 30.0


@asynccontextmanager
async def idle_server() -> AsyncIterator[Stub]:
    """A router that answers at once and does nothing for it, in a process of its own."""
    with TemporaryDirectory(prefix="baton-measure-") as directory:
        ready = Path(directory, "ready.json")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "baton.bench.reference", "--ttft-ms", "0", "--itl-ms", "0"),
            *("--listen", "127.0.0.1:0", "--metrics-listen", "", "--ready-file", str(ready)),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            address = await asyncio.wait_for(asyncio.to_thread(_address, ready), _START_SECONDS)
            async with grpc.aio.insecure_channel(address) as channel:
                yield inference_pb2_grpc.InferenceStub(channel)
        finally:
            process.terminate()
            await process.wait()


def _address(ready: Path) -> str:
    """Wait for a ready file; the address in it."""
    deadline = time.monotonic() + _START_SECONDS
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return str(json.loads(ready.read_text(encoding="utf-8"))["grpc"])
