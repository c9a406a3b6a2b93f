"""A service process: it ends when told to, at any time, and says why it cannot start."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from pathlib import Path

import grpc
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.fixtures.models import random_llama

Status = health_pb2.HealthCheckResponse


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return random_llama(tmp_path / "model")


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )


async def rest(call: grpc.aio.UnaryStreamCall) -> list[int]:
    statuses: list[int] = []
    while (message := await call.read()) is not grpc.aio.EOF:
        statuses.append(message.status)
    return statuses


async def test_sigterm_while_loading(model: Path, tmp_path: Path) -> None:
    """It does not finish loading first, and its engine goes with it."""
    ready = tmp_path / "ready.json"
    process = await start("baton_decode", "--model", str(model), "--listen", "127.0.0.1:0", "--ready-file", str(ready))
    try:
        engine: list[psutil.Process] = []
        async with asyncio.timeout(30):
            while not engine:
                engine = psutil.Process(process.pid).children()
                await asyncio.sleep(0.02)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output, _ = await asyncio.wait_for(process.communicate(), 10)
        assert process.returncode == 0, output.decode()
        assert time.monotonic() - started < 3
        assert not ready.exists()
        assert not psutil.wait_procs(engine, timeout=5)[1]
    finally:
        if process.returncode is None:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("baton_prefill", "--model", "{empty}"), "no config.json"),
        pytest.param(
            ("baton_prefill", "--model", "{model}", "--device", "cuda"),
            "device 'cuda'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it could start here"),
        ),
        (("baton_router", "--model", "{empty}"), "cannot be read"),
    ],
)
async def test_says_why_it_cannot_start(arguments: tuple[str, ...], reason: str, model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    process = await start(*(part.format(empty=empty, model=model) for part in arguments), "--listen", "127.0.0.1:0")
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert reason in output.decode()
    assert "Traceback" not in output.decode()


@pytest.mark.parametrize("service", ["router", "cache", "prefill", "decode"])
async def test_help_says_how_the_service_is_started(service: str) -> None:
    process = await start(f"baton_{service}", "--help")
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    assert out.decode().startswith(f"usage: python -m baton_{service} ")
    assert "--listen" in out.decode()


async def test_who_watches_health_is_told_of_the_drain_and_does_not_prolong_it(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    process = await start("baton_cache", "--listen", "127.0.0.1:0", "--ready-file", str(ready), "--drain-seconds", "20")
    try:
        async with asyncio.timeout(30):
            while not ready.exists():  # noqa: ASYNC110 a file has no event
                await asyncio.sleep(0.05)
        async with grpc.aio.insecure_channel(json.loads(ready.read_text())["grpc"]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
            names = ("", "baton.internal.v1.ResponseCache", "nobody")
            calls = [stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in names]
            first = [(await call.read()).status for call in calls]
            assert first == [Status.SERVING, Status.SERVING, Status.SERVICE_UNKNOWN]
            process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            last = [await rest(call) for call in calls]
            assert last == [[Status.NOT_SERVING], [Status.NOT_SERVING], []]
            output, _ = await asyncio.wait_for(process.communicate(), 10)
            assert process.returncode == 0, output.decode()
            assert time.monotonic() - started < 5
    finally:
        if process.returncode is None:
            process.kill()
