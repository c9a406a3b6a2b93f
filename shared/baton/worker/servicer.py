"""`baton.internal.v1.Worker`: a worker's state as a stream, and what it holds, for debugging."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc

from baton import __version__
from baton.engine.client import EngineClient
from baton.engine.messages import StepReport
from baton.internal.v1 import worker_pb2, worker_pb2_grpc
from baton.rpc.service import Runtime
from baton.worker.calls import Calls
from baton.worker.settings import WorkerSettings
from baton.worker.step_meter import StepMeter

_MIN_INTERVAL = 0.05  # seconds between two load messages of one stream


class WorkerServicer(worker_pb2_grpc.WorkerServicer):
    """Serves Watch and DebugState of one worker."""

    def __init__(
        self,
        role: worker_pb2.WorkerRole.ValueType,
        settings: WorkerSettings,
        engine: EngineClient,
        meter: StepMeter,
        calls: Calls,
        runtime: Runtime,
    ) -> None:
        self._role = role
        self._settings = settings
        self._engine = engine
        self._meter = meter
        self._calls = calls
        self._runtime = runtime
        self._report: StepReport | None = None
        engine.on_report.append(self._on_report)

    def register(self, runtime: Runtime) -> None:
        """Serve other services, and operators."""
        for server in {runtime.server, runtime.admin}:
            worker_pb2_grpc.add_WorkerServicer_to_server(self, server)
        runtime.register("baton.internal.v1.Worker")
        runtime.register_admin("baton.internal.v1.Worker")

    async def Watch(
        self, request: worker_pb2.WatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[worker_pb2.WatchResponse]:
        """The state at once, then whenever it moved, at least every interval, until the worker stops."""
        interval = max(_MIN_INTERVAL, (request.interval_ms or 1000) / 1000)
        silent = 0.0
        last: worker_pb2.WatchResponse | None = None
        # The stream ends with the process: it must not hold the drain up.
        while not self._runtime.draining.is_set():
            state = self.state()
            if state != last or silent >= interval:
                yield state
                last, silent = state, 0.0
            await asyncio.sleep(_MIN_INTERVAL)
            silent += _MIN_INTERVAL
        yield self.state()

    async def DebugState(
        self, request: worker_pb2.DebugStateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DebugStateResponse:
        """Everything the worker holds now."""
        held = await self._engine.inspect()
        return worker_pb2.DebugStateResponse(
            engine_requests=held.requests,
            calls=self._calls.ids(),
            free_slots=held.free_slots,
            total_slots=held.total_slots,
            used_tokens=held.used_tokens,
            capacity_tokens=held.capacity_tokens,
            tasks=len(asyncio.all_tasks()),
            open_files=_open_files(),
            incarnation=self._engine.incarnation,
            steps=held.steps,
            cached_slots=held.kept_slots,
            cached_tokens=held.kept_tokens,
        )

    def state(self) -> worker_pb2.WatchResponse:
        """What Watch sends now."""
        spec = self._engine.spec
        report = self._report
        cost = self._meter.cost()
        return worker_pb2.WatchResponse(
            role=self._role,
            incarnation=self._engine.incarnation,
            version=__version__,
            model=worker_pb2.WorkerModel(
                name=self._settings.served_name(),
                fingerprint=spec.fingerprint,
                tokenizer_digest=spec.tokenizer_digest,
                max_context=self._engine.max_context,
                vocab_size=spec.vocab_size,
                eos_token_ids=spec.eos_token_ids,
                dtype=spec.dtype.value,
                quantization=self._settings.quantization.value,
                exact=self._engine.exact,
            ),
            capacity=worker_pb2.Capacity(kv_tokens=self._engine.capacity_tokens, slots=self._engine.layout.num_slots),
            load=worker_pb2.Load(
                running=report.running if report else 0,
                waiting=report.waiting if report else 0,
                kv_used_tokens=report.used_tokens if report else 0,
                steps=report.step if report else 0,
                waiting_prompt_tokens=report.waiting_prompt_tokens if report else 0,
                step_cost=cost.to_proto() if cost else None,
            ),
            draining=self._runtime.draining.is_set() or self._engine.stalled,
        )

    def _on_report(self, report: StepReport) -> None:
        self._report = report


def _open_files() -> int:
    """Open descriptors of this process; 0 where the system does not say."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0
