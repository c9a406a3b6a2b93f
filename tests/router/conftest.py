"""A router in this process, over real gRPC, with scripted workers behind it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest

from baton.rpc.channel import SERVER_OPTIONS
from baton.rpc.gate import OPEN, Gate
from baton.rpc.interceptor import RimInterceptor
from baton.rpc.service import Runtime
from baton.v1 import inference_pb2_grpc
from baton_router.app import build
from baton_router.settings import RouterSettings
from tests.router.scripted import ScriptedWorker
from tests.text.conftest import write_text_model


@pytest.fixture(scope="session")
def router_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("router-models") / "little", context=128)


class Router:
    """A running router and a stub to it."""

    def __init__(self, stub: inference_pb2_grpc.InferenceAsyncStub, address: str, runtime: Runtime) -> None:
        self.stub = stub
        self.address = address
        self.runtime = runtime


@contextlib.asynccontextmanager
async def running_router(model: Path, gate: Gate = OPEN, **settings: object) -> AsyncIterator[Router]:
    """Start a router; at its end no task of it may be left."""
    server = grpc.aio.server(interceptors=[RimInterceptor(gate=gate)], options=SERVER_OPTIONS)
    runtime = Runtime("router", server)
    async with build(RouterSettings(model=model, **settings), runtime):  # type: ignore[arg-type]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        address = f"127.0.0.1:{port}"
        options = [("grpc.max_send_message_length", -1)]
        try:
            async with grpc.aio.insecure_channel(address, options=options) as channel:
                yield Router(inference_pb2_grpc.InferenceStub(channel), address, runtime)
        finally:
            await server.stop(0)  # of a failed test too: a server that runs on keeps the process from ending


@pytest.fixture
async def worker(router_model: Path) -> AsyncIterator[ScriptedWorker]:
    async with ScriptedWorker.running(router_model) as one:
        yield one


@pytest.fixture
async def router(router_model: Path, worker: ScriptedWorker) -> AsyncIterator[Router]:
    async with running_router(router_model, decode_targets=worker.address) as one:
        yield one


async def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 any state can be waited for
            await asyncio.sleep(0.005)
