"""What a worker says of itself to who watches it."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from baton.internal.v1 import worker_pb2, worker_pb2_grpc
from tests.fixtures.mesh import Mesh, Service
from tests.fixtures.models import random_llama


async def model_of(service: Service) -> worker_pb2.WorkerModel:
    async with grpc.aio.insecure_channel(service.address) as channel:
        async for state in worker_pb2_grpc.WorkerStub(channel).Watch(worker_pb2.WatchRequest()):
            return state.model
    raise AssertionError("no state")


async def test_quantized_weights_are_told_and_leave_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = str(random_llama(tmp_path / "model"))
    mesh = Mesh(tmp_path)
    try:
        plain = await model_of(await mesh.start("decode-plain", "--model", model))
        int8 = await model_of(await mesh.start("decode-int8", "--model", model, "--quantization", "int8"))
    finally:
        await mesh.close()
    assert (plain.quantization, int8.quantization) == ("none", "int8")
    assert plain.fingerprint == int8.fingerprint
