"""Put the prefill service together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from baton.internal.v1 import worker_pb2
from baton.rpc.service import Runtime
from baton.worker.calls import Calls
from baton.worker.engine import running_engine
from baton.worker.servicer import WorkerServicer
from baton.worker.step_meter import StepMeter
from baton_prefill.lending import lending
from baton_prefill.prefill import PrefillServicer
from baton_prefill.settings import PrefillSettings


@asynccontextmanager
async def build(settings: PrefillSettings, runtime: Runtime) -> AsyncIterator[None]:
    """Start the engine, register the servicers; stop the engine on exit."""
    meter = StepMeter(settings.step_tokens)
    async with (
        running_engine(settings, runtime, meter) as engine,
        lending(settings.transport, settings.shm_dir, engine) as offers,
    ):
        calls = Calls()
        PrefillServicer(engine, offers, calls, runtime).register(runtime.server)
        worker = WorkerServicer(worker_pb2.WORKER_ROLE_PREFILL, settings, engine, meter, calls, runtime)
        worker.register(runtime)
        runtime.register("baton.internal.v1.Prefill")
        yield
