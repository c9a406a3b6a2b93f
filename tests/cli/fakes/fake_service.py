"""A service that loads nothing and serves at once, for tests of `baton up`: `python -m baton_decode` and the others.

The environment says how it misbehaves: FAKE_DIE names the service that dies while it loads, FAKE_DIE_AFTER the one that
dies on SIGUSR1, FAKE_DEAF the one that ignores SIGTERM.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

from pydantic import Field

from baton.internal.v1 import observe_pb2, observe_pb2_grpc, worker_pb2, worker_pb2_grpc
from baton.rpc.access import Who
from baton.rpc.service import Runtime, main
from baton.rpc.settings import ServiceSettings
from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

log = logging.getLogger("fake")


class FakeSettings(ServiceSettings):
    """The flags `baton up` gives the real ones."""

    model: str = Field("")
    model_name: str = Field("")
    decode_targets: str = Field("")
    prefill_targets: str = Field("")
    cache_target: str = Field("")
    redis_url: str = Field("")
    dtype: str = Field("")
    num_slots: int = Field(8)


class FakeRouterSettings(FakeSettings):
    """The router's port is for clients."""

    serves: ClassVar[Who] = Who.CLIENT


class FakeObserve(observe_pb2_grpc.ObserveServicer):
    """Sees one decode worker."""

    async def WatchMesh(self, request: Any, context: Any) -> AsyncIterator[observe_pb2.WatchMeshResponse]:
        state = worker_pb2.WatchResponse(role=worker_pb2.WORKER_ROLE_DECODE)
        yield observe_pb2.WatchMeshResponse(workers=[observe_pb2.WorkerView(state=state)])


class FakeInference(inference_pb2_grpc.InferenceServicer):
    """Answers every prompt with its own words."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        words = request.text.split(" ")
        start = inference_pb2.StreamStart(request_id="r", model=self._name, seed=1, prompt_tokens=len(words))
        yield inference_pb2.StreamGenerateResponse(start=start)
        for index, word in enumerate(words):
            chunk = inference_pb2.TokenChunk(index=index, token_ids=[index], text=f" {word}")
            yield inference_pb2.StreamGenerateResponse(chunk=chunk)
        summary = inference_pb2.Summary(finish_reason=sampling_pb2.FINISH_REASON_STOP)
        yield inference_pb2.StreamGenerateResponse(summary=summary)

    async def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(models=[inference_pb2.Model(name=self._name, ready=True)])


class FakeWorker(worker_pb2_grpc.WorkerServicer):
    """Reports a fixed load."""

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.WatchResponse]:
        yield worker_pb2.WatchResponse(
            capacity=worker_pb2.Capacity(kv_tokens=1000, slots=8), load=worker_pb2.Load(running=3, kv_used_tokens=250)
        )
        await asyncio.sleep(30)


def run(service: str) -> int:
    """The service of this name."""

    @asynccontextmanager
    async def build(settings: FakeSettings, runtime: Runtime) -> AsyncIterator[None]:
        log.info("loading", extra={"stage": "weights", "fraction": 0.5})
        if os.environ.get("FAKE_DIE") == service:
            raise RuntimeError("no room for the weights")
        if os.environ.get("FAKE_DEAF") == service:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGTERM, lambda: None)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, lambda: runtime.fail("the engine is gone"))
        engine = None
        if service in ("prefill", "decode"):
            # What a real one has too: a process below it.
            engine = subprocess.Popen(  # noqa: ASYNC220 a test may block
                [sys.executable, "-c", "import time; time.sleep(300)"]
            )
            worker_pb2_grpc.add_WorkerServicer_to_server(FakeWorker(), runtime.admin)
        if service == "router":
            inference_pb2_grpc.add_InferenceServicer_to_server(FakeInference(settings.model_name), runtime.server)
            observe_pb2_grpc.add_ObserveServicer_to_server(FakeObserve(), runtime.admin)
        yield
        if engine is not None:
            engine.kill()
            engine.wait()

    return main(service, FakeRouterSettings if service == "router" else FakeSettings, build)
